"""From examples to finished statistics in one pass: exact or as histograms, resumable, over many processes.

The examples are cut into shards. Each process captures every so-manieth open shard. *Exact* keeps the pooled
values by shard and, at the end, deals the neurons out: each process gets a run of neurons of all samples, in
the order of shards, so that sums too are the same whoever captured what. *Histogram* adds each shard to
counts, which are summed over the processes at the end.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import prod
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from safeglasses.data.examples import Example
from safeglasses.errors import SafeglassesError
from safeglasses.find.edges import Edges
from safeglasses.find.moments import Moments
from safeglasses.find.passes import LENGTHS, Watch, passes, plan
from safeglasses.find.ranks import Ranks
from safeglasses.find.routed import edges_with_gaps, rate
from safeglasses.find.shards import SHARD, Shards, cut, owners_of
from safeglasses.find.statistic import Columns, Samples
from safeglasses.find.streams import gaps_of
from safeglasses.find.tally import Tally
from safeglasses.find.world import World
from safeglasses.model.sharding import is_sharded
from safeglasses.model.sites import Site
from safeglasses.model.vlm import VLM

Engine = Literal["exact", "histogram"]


@dataclass(frozen=True)
class Setup:
    """How a job is done; what decides its numbers is the same in every process and every rerun."""

    engine: Engine
    """``exact`` or ``histogram``."""
    memory: int
    """Bytes that a process may use beside the model."""
    folder: Path | None = None
    """Where shards or counts are kept, so that a rerun goes on; None: in memory, exact only."""
    batch_size: int | str = "auto"
    """Examples per forward pass."""
    shard: int = SHARD
    """Samples per shard."""
    bins: int = 256
    """Bins of a histogram."""
    seed: int = 0
    """Of the order of shards."""
    moments: bool = True
    """Whether means and their like are wanted too."""


@dataclass(frozen=True)
class Finished:
    """What a job ends in, the same in every process."""

    columns: Columns
    """Statistics by name, ``[pool, neuron]``."""
    lengths: Mapping[str, Int[Tensor, " sample"]]
    """Token counts of the examples, in their order."""
    values: Callable[[Sequence[int]], Shaped[Tensor, "pool _neuron sample"] | None]
    """Gives the values of some neurons in the order of the examples, in every process; None if none were kept."""


def shard_size(watch: Watch, neurons: int, memory: int) -> int:
    """Return samples per shard such that a shard takes a quarter of the memory at most."""
    per_sample = neurons * len(watch.pools) * watch.dtype.itemsize
    return max(16, min(SHARD, memory // 4 // per_sample))


class Job:
    """One pass over labelled examples."""

    def __init__(
        self,
        vlm: VLM,
        examples: Sequence[Example],
        samples: Samples,
        watch: Watch,
        setup: Setup,
        *,
        world: World | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.vlm, self.examples, self.samples, self.watch, self.setup = vlm, examples, samples, watch, setup
        self.world = world or World()
        self.progress = progress
        self.neurons = sum(vlm.anatomy.width(site) for site in watch.sites)
        self.shards = cut(samples.clusters, setup.shard, setup.seed)
        self.gaps = gaps_of(vlm.anatomy, watch.sites, watch.pools)

    def run(self) -> Finished:
        """Capture what is not there yet, and finish.

        Raises:
            SafeglassesError: as in `passes`; a value is NaN; another process of the job died.
        """
        return self._exact() if self.setup.engine == "exact" else self._histogram()

    def by_site(self) -> Iterator[tuple[Site, Shaped[Tensor, "pool _neuron sample"]]]:
        """Capture what is not there yet, and yield the values of whole sites, samples in the order of the examples.

        Each process gets other sites; together they get all. Memory holds one of them at a time.

        Raises:
            SafeglassesError: as in `passes`; another process of the job died.
        """
        kept, owners = self._kept()
        back = torch.tensor([row for shard in self.shards for row in shard]).argsort()
        widths = [self.vlm.anatomy.width(site) for site in self.watch.sites]
        starts = list(accumulate(widths, initial=0))
        for first in range(0, len(widths), self.world.size):
            mine = range(first, min(first + self.world.size, len(widths)))
            parts = [(starts[i], starts[i + 1]) for i in mine] + [(0, 0)] * (self.world.size - len(mine))
            dealt = [stop - start for start, stop in parts]
            values = self._deal(lambda i, p, parts=parts: kept.rows(i, *parts[p]), owners, dealt)
            if self.world.rank < len(mine):
                yield self.watch.sites[first + self.world.rank], values.index_select(2, back)

    def _kept(self) -> tuple[Shards, list[int]]:
        """Capture what is not there yet; return the shards, and who reads which."""
        kept = Shards(self.setup.folder)
        seen = self.world.all_say(sorted(kept.done() & set(range(len(self.shards)))))
        for index, values, lengths in self._captured(set().union(*seen)):
            if index is not None and values is not None and lengths is not None:
                kept.put(index, values, lengths)
        return kept, owners_of(self.world.all_say(sorted(kept.done())), len(self.shards))

    def _exact(self) -> Finished:
        kept, owners = self._kept()
        lengths = torch.zeros(len(LENGTHS), len(self.examples), dtype=torch.int64)
        for index in self._owned(owners, self.world.rank):
            lengths[:, self.shards[index]] = kept.lengths(index)
        self.world.add(lengths)
        order = torch.tensor([row for shard in self.shards for row in shard])
        samples, back = self.samples.take(order), order.argsort()
        columns: dict[str, Tensor] = {}
        for start, stop in self._runs():
            edges = [start + (stop - start) * p // self.world.size for p in range(self.world.size + 1)]
            parts = list(pairwise(edges))
            values = self._deal(lambda i, p, parts=parts: kept.rows(i, *parts[p]), owners, [b - a for a, b in parts])
            first = edges[self.world.rank]
            for name, column in self._finish_run(values, samples, first).items():
                whole = columns.setdefault(name, torch.zeros(len(column), self.neurons, dtype=torch.float64))
                whole[:, first : first + column.shape[1]] = column
        names = sorted(set().union(*self.world.all_say(sorted(columns))))
        zeros = torch.zeros(len(self.watch.pools), self.neurons, dtype=torch.float64)
        columns = {name: self.world.add(columns.get(name, zeros.clone())) for name in names}  # what others have is 0

        def picked(neurons: Sequence[int]) -> Tensor:
            widths = [len(neurons)] * self.world.size  # everybody gets all of them
            return self._deal(lambda i, _: kept.pick(i, neurons), owners, widths).index_select(2, back)

        return Finished(columns, dict(zip(LENGTHS, lengths, strict=True)), picked)

    @staticmethod
    def _owned(owners: Sequence[int], rank: int) -> list[int]:
        return [index for index, owner in enumerate(owners) if owner == rank]

    def _deal(
        self, ask: Callable[[int, int], Tensor], owners: Sequence[int], widths: Sequence[int]
    ) -> Shaped[Tensor, "pool _neuron sample"]:
        """Give every process its part of the neurons, of all samples in the order of shards.

        Args:
            ask: gives a shard's values of the neurons for a process, ``[pool, neuron, sample]``.
            owners: who reads which shard.
            widths: neurons per process.
        """
        mine, pools = self._owned(owners, self.world.rank), len(self.watch.pools)
        sent = []
        for rank in range(self.world.size):
            blocks = [ask(index, rank).flatten() for index in mine]
            sent.append(torch.cat(blocks) if blocks else torch.empty(0, dtype=self.watch.dtype))
        by_shard: dict[int, Tensor] = {}
        for rank, data in enumerate(self.world.exchange(sent)):
            theirs = self._owned(owners, rank)
            shapes = [(pools, widths[self.world.rank], len(self.shards[index])) for index in theirs]
            for index, block, shape in zip(theirs, data.split([prod(s) for s in shapes]), shapes, strict=True):
                by_shard[index] = block.view(shape)
        return torch.cat([by_shard[index] for index in range(len(self.shards))], dim=2)

    def _finish_run(self, values: Shaped[Tensor, "pool _neuron sample"], samples: Samples, first: int) -> Columns:
        def make() -> list[Ranks | Moments]:
            return [Ranks(), *([Moments()] if self.setup.moments else [])]

        if not values.shape[1]:
            return {}
        gaps = self.gaps[first : first + values.shape[1]] if self.gaps is not None else None
        return rate(values, samples, gaps, make, lambda start: self._naming(first + start))

    @contextmanager
    def _naming(self, first: int) -> Iterator[None]:
        """Say in errors about a neuron where it is; it was numbered from `first` on."""
        try:
            yield
        except SafeglassesError as error:
            match = re.fullmatch(r"neuron (\d+)", error.given)
            if match is None:
                raise
            number, site = first + int(match[1]), None
            for site in self.watch.sites:
                if number < self.vlm.anatomy.width(site):
                    break
                number -= self.vlm.anatomy.width(site)
            given = self.vlm.anatomy.address(site, number) if site is not None else error.given
            raise SafeglassesError(error.what, given=given, expected=error.expected, do=error.do) from error

    def _runs(self) -> Iterator[tuple[int, int]]:
        """Cut the neurons into runs whose values, of all samples, take a quarter of the memory at most."""
        per_neuron = len(self.watch.pools) * len(self.examples) * self.watch.dtype.itemsize
        height = max(self.world.size, self.setup.memory * self.world.size // 4 // per_neuron)
        for start in range(0, self.neurons, height):
            yield start, min(start + height, self.neurons)

    def _histogram(self) -> Finished:
        tally = Tally.load(self.setup.folder, self.world, len(self.examples), self.gaps)
        done = set().union(*self.world.all_say(sorted(tally.shards)))
        unset = not self.world.all_say(tally.histogram is not None)[0]
        if unset and done:
            raise SafeglassesError(
                "the bins of an earlier run are lost",
                given=f"{len(done)} shards are counted, and the first process finds no counts",
                do="delete the folder of counts and run the same again",
            )
        if not unset:  # more processes than before: the new ones need the bins
            known = (
                {"keys": tally.histogram.edges.keys} if tally.histogram is not None and self.world.is_first else None
            )
            tally.start(Edges(self.world.broadcast(known)["keys"], self.watch.dtype), moments=self.setup.moments)
        for index, values, lengths in self._captured(done):
            rows = torch.tensor(self.shards[index] if index is not None else [], dtype=torch.int64)
            if unset:  # the first turn: the first process has shard 0, a random sample of all
                made = None
                if self.world.is_first and values is not None:
                    with self._naming(0):
                        made = {
                            "keys": edges_with_gaps(values, self.samples.take(rows), self.setup.bins, self.gaps).keys
                        }
                tally.start(Edges(self.world.broadcast(made)["keys"], self.watch.dtype), moments=self.setup.moments)
                unset = False
            if index is not None and values is not None and lengths is not None:
                with self._naming(0):
                    tally.add(index, values, lengths, rows, self.samples.take(rows))
                tally.save()
        tally.save(last=True)
        tally.gather()
        return Finished(tally.finish(), dict(zip(LENGTHS, tally.lengths, strict=True)), lambda _: None)

    def _captured(self, done: set[int]) -> Iterator[tuple[int | None, Tensor | None, Tensor | None]]:
        """Capture this process's share of the open shards; as many turns in every process, some without a shard."""
        open_ = [index for index in range(len(self.shards)) if index not in done]
        turns = -(-len(open_) // self.world.size)
        ready = sum(len(self.shards[index]) for index in done)
        for turn in range(turns):
            here = open_[turn * self.world.size : (turn + 1) * self.world.size]
            index = here[self.world.rank] if self.world.rank < len(here) else None
            before = ready + sum(len(self.shards[i]) for i in open_[: turn * self.world.size])
            if index is not None:
                yield (index, *self._capture(self.shards[index], before))
                continue
            if is_sharded(self.vlm.model):  # its passes need this process too
                self._capture(self.shards[open_[0]], before)
            yield None, None, None

    def _capture(self, rows: list[int], before: int) -> tuple[Tensor, Tensor]:
        examples = [self.examples[row] for row in rows]
        values = torch.empty(len(self.watch.pools), self.neurons, len(rows), dtype=self.watch.dtype)
        lengths = torch.empty(len(LENGTHS), len(rows), dtype=torch.int64)
        batches = plan(self.vlm, examples, self.watch.rows(self.setup.batch_size))
        idle = 0
        if is_sharded(self.vlm.model):  # every pass needs all processes: those with fewer batches repeat one
            idle = max(self.world.all_say(len(batches))) - len(batches)
        order: list[int] = []
        for done in passes(self.vlm, examples, self.watch, [*batches, *([batches[0]] * idle)]):
            if len(order) == len(rows):
                continue
            columns = slice(len(order), len(order) + len(done.rows))
            values[:, :, columns] = done.values  # side by side, in cache lines; put in order below
            lengths[:, columns] = done.lengths
            order += done.rows
            if self.progress is not None:
                self.progress(min(before + len(order) * self.world.size, len(self.examples)), len(self.examples))
        place = torch.tensor(order).argsort()
        for some in values.flatten(0, 1).split(1024):
            some.copy_(some.index_select(1, place))
        return values, lengths[:, place]
