"""Running counts of one process, and which shards are in them: what the histogram engine resumes from."""

import json
import time
from pathlib import Path

import torch
from jaxtyping import Bool, Int, Shaped
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from safeglasses.errors import SafeglassesError
from safeglasses.files import atomic_write_bytes
from safeglasses.find.edges import Edges
from safeglasses.find.histogram import Histogram
from safeglasses.find.moments import Moments
from safeglasses.find.passes import LENGTHS
from safeglasses.find.routed import add_parts
from safeglasses.find.statistic import Columns, Samples
from safeglasses.find.world import World

SECOND = 1.0
"""A write that takes no longer is made after every shard."""


class Tally:
    """Histogram, moments and token counts of some shards.

    The file of each process is written by it alone. After a restart with fewer processes the files of those
    that are no more are read, and added at the end: rewriting them could count a shard twice if killed.
    """

    def __init__(self, path: Path | None, world: World, samples: int, gaps: Bool[Tensor, " neuron"] | None) -> None:
        self.path, self.world, self.gaps = path, world, gaps
        self.histogram: Histogram | None = None
        self.moments: Moments | None = None
        self.lengths: Int[Tensor, "length sample"] = torch.zeros(len(LENGTHS), samples, dtype=torch.int64)
        self.shards: set[int] = set()
        self.others: list[Tally] = []
        self._saved, self._cost = time.monotonic(), 0.0

    @classmethod
    def load(
        cls, folder: Path | None, world: World, samples: int, gaps: Bool[Tensor, " neuron"] | None = None
    ) -> "Tally":
        """Read what an earlier run has counted, as far as this process can see and is responsible for it.

        Args:
            folder: where the files are.
            world: the processes of the job.
            samples: how many there are in all.
            gaps: neurons that a sample may lack (experts).

        Raises:
            SafeglassesError: a file cannot be read.
        """
        own = cls(folder / f"counts-{world.rank:05}.safetensors" if folder is not None else None, world, samples, gaps)
        if own.path is None or folder is None:
            return own
        for path in sorted(folder.glob("counts-*.safetensors")):
            rank = int(path.stem.removeprefix("counts-"))
            if rank % world.size != world.rank:
                continue
            tally = own if path == own.path else cls(path, world, samples, gaps)
            tally._read(path)
            if tally is not own:
                own.others.append(tally)
                own.shards |= tally.shards
        if own.histogram is None and own.others and own.others[0].histogram is not None:
            own.start(own.others[0].histogram.edges, moments=own.others[0].moments is not None)
        return own

    def start(self, edges: Edges, *, moments: bool) -> None:
        """Set the bins, unless that was done."""
        if self.histogram is None:
            self.histogram, self.moments = Histogram(edges), Moments() if moments else None
            if self.gaps is not None and self.moments is not None:
                self.moments = Moments.each(*edges.keys.shape[:2])

    def add(
        self,
        index: int,
        values: Shaped[Tensor, "pool neuron sample"],
        lengths: Int[Tensor, "length sample"],
        rows: Int[Tensor, " sample"],
        samples: Samples,
    ) -> None:
        """Count a shard."""
        for statistic in (self.histogram, self.moments):
            if statistic is not None and self.gaps is not None:
                add_parts(statistic, values, samples, self.gaps)
            elif statistic is not None:
                statistic.add(values, samples)
        self.lengths[:, rows] = lengths
        self.shards.add(index)

    def save(self, *, last: bool = False) -> None:
        """Write the file anew; a kill leaves the old one.

        Nothing is written while that would cost more than a tenth of the time: counts of a large model are
        gigabytes. So a kill loses one shard, or as many as are captured in ten times the seconds of a write.
        """
        start = time.monotonic()
        costly = self._cost > SECOND and start - self._saved < 9 * self._cost
        if self.path is None or self.histogram is None or (costly and not last):
            return
        tensors = {f"histogram.{name}": value for name, value in self.histogram.state().items()}
        tensors |= {f"moments.{name}": v for name, v in (self.moments.state() if self.moments else {}).items()}
        mine = self.shards.difference(*(other.shards for other in self.others))
        tensors["lengths"] = self.lengths
        header = {"safeglasses": json.dumps({"shards": sorted(mine)})}
        atomic_write_bytes(self.path, save({name: value.cpu() for name, value in tensors.items()}, header))
        self._saved = time.monotonic()
        self._cost = self._saved - start

    def gather(self) -> None:
        """Put the counts of all processes together, in every one of them."""
        if self.histogram is None:
            raise SafeglassesError("nothing was counted", given="no shard")
        for other in self.others:
            self.lengths += other.lengths
            if other.histogram is not None:
                self.histogram.merge(other.histogram)
            if self.moments is not None and other.moments is not None:
                self.moments.merge(other.moments)
        self.world.add(self.lengths)
        if self.world.size == 1:
            return
        mine = self.histogram.seen()
        self.histogram.check_room(self.world.add(mine.clone()) - mine)
        self.histogram.counts = self.world.add(self.histogram.counts.cpu())
        if self.moments is not None:
            self.moments = self._gathered(self.moments)

    def _gathered(self, moments: Moments) -> Moments:
        """Merge the moments of all processes, in their order, so that all get the same sums."""
        state = {name: value.cpu().contiguous() for name, value in moments.state().items()}
        shapes = self.world.all_say(
            {name: [list(v.shape), str(v.dtype).removeprefix("torch.")] for name, v in state.items()}
        )
        arrived: list[dict[str, Tensor]] = [{} for _ in shapes]
        for name in max(shapes, key=len):
            mine = state[name].flatten().view(torch.uint8) if name in state else torch.empty(0, dtype=torch.uint8)
            for rank, part in enumerate(self.world.exchange([mine] * self.world.size)):
                if name in shapes[rank]:
                    shape, dtype = shapes[rank][name]
                    arrived[rank][name] = part.view(getattr(torch, dtype)).view(shape)
        merged = Moments()
        for rank in range(self.world.size):
            if arrived[rank]:
                merged.merge(Moments.from_state(arrived[rank]))
        return merged

    def finish(self) -> Columns:
        """Return the statistics."""
        columns = dict(self.histogram.finish()) if self.histogram is not None else {}
        if self.gaps is not None and self.histogram is not None:
            columns |= self.histogram.counted()
        return columns | (dict(self.moments.finish()) if self.moments is not None else {})

    def _read(self, path: Path) -> None:
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
                self.shards = set(json.loads((file.metadata() or {})["safeglasses"])["shards"])
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise SafeglassesError(
                "counts cannot be read", given=f"{path} ({error})", do="delete the folder and run the same again"
            ) from error
        parts = {"histogram": {}, "moments": {}}
        for name, value in tensors.items():
            room, _, rest = name.partition(".")
            if rest:
                parts[room][rest] = value.clone()  # writable
        self.histogram = Histogram.from_state(parts["histogram"])
        self.moments = Moments.from_state(parts["moments"]) if parts["moments"] else None
        self.lengths = tensors["lengths"].clone()
