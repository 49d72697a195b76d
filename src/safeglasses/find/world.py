"""The processes of one job, as ``torchrun`` or ``accelerate launch`` start them; alone, all of it is free.

Only sums, exchanges and JSON go between processes, over gloo on the CPU: what is exchanged lies there anyway.
"""

import json
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor

from safeglasses.errors import SafeglassesError

PATIENCE = timedelta(days=7)
"""How long processes wait for each other: a slow one is no error, and a dead one is noticed at once."""


class Elsewhere(SafeglassesError):
    """What ended the job was told by another process: this one ends without a word."""

    told_elsewhere = True


@dataclass(frozen=True)
class World:
    """Which process this is, and how many there are."""

    rank: int = 0
    """From 0."""
    size: int = 1
    """How many processes share the work."""

    @property
    def is_first(self) -> bool:
        """Whether this process speaks for all."""
        return self.rank == 0

    @classmethod
    @contextmanager
    def join(cls, processes: int | None = None) -> Iterator["World"]:
        """Meet the other processes of the job; leave them when the block ends.

        Args:
            processes: how many there must be.

        Raises:
            SafeglassesError: there are more or fewer.
        """
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if processes is not None and processes != size:
            raise SafeglassesError(
                "the job has another number of processes than it should",
                given=f"{size} running, --processes {processes}",
                expected=f"{processes}",
                do=f"start it with `torchrun --nproc_per_node {processes} -m safeglasses …` (on a CPU, "
                "`accelerate launch --cpu` starts one process whatever it is told)",
            )
        if size == 1:
            yield cls()
            return
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=PATIENCE)
        before = signal.signal(signal.SIGTERM, _stop)  # how torchrun ends the processes that outlive another
        try:
            if dist.get_world_size() != size:
                raise SafeglassesError("the processes did not meet", given=f"{dist.get_world_size()} of {size}")
            yield cls(dist.get_rank(), size)
        finally:
            signal.signal(signal.SIGTERM, before)
            dist.destroy_process_group()

    @contextmanager
    def together(self) -> Iterator[None]:
        """Run a block in every process; if it fails anywhere, all of them end, and one of them says why.

        Raises:
            SafeglassesError: the block failed here, and this process is the first in which it did.
            Elsewhere: it failed in another process.
        """
        error: SafeglassesError | None = None
        try:
            yield
        except SafeglassesError as caught:
            error = caught
        failed = [rank for rank, bad in enumerate(self.all_say(error is not None)) if bad]
        if error is not None and failed[0] == self.rank:
            raise error
        if failed:
            raise Elsewhere("another process of the job failed", given=f"process {failed[0]}")

    def all_say(self, record: Any) -> list[Any]:
        """Return what every process says (JSON), in the order of ranks."""
        if self.size == 1:
            return [record]
        mine = torch.frombuffer(bytearray(json.dumps(record).encode()), dtype=torch.uint8)
        return [json.loads(bytes(said.tolist())) for said in self.exchange([mine] * self.size)]

    def broadcast(self, tensors: dict[str, Tensor] | None) -> dict[str, Tensor]:
        """Give the first process's tensors to all; None elsewhere."""
        if self.size == 1:
            return tensors or {}
        found: dict[str, Tensor] = {}
        meta = self.all_say(
            [(name, list(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in (tensors or {}).items()]
        )[0]
        for name, shape, dtype in meta:
            value = torch.empty(shape, dtype=getattr(torch, dtype)) if tensors is None else tensors[name].contiguous()
            with _peers():
                dist.broadcast(value.view(torch.uint8) if value.numel() else value, 0)
            found[name] = value
        return found

    def add(self, value: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        """Sum a tensor over all processes, in place."""
        if self.size > 1:
            with _peers():
                dist.all_reduce(value)
        return value

    def exchange(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Send one part to each process and return what each sent here; parts are one-dimensional."""
        if self.size == 1:
            return list(parts)
        dtype = parts[0].dtype
        bytes_ = [part.contiguous().view(torch.uint8) for part in parts]
        sizes = torch.tensor([part.numel() for part in bytes_])
        arriving = torch.empty_like(sizes)
        with _peers():
            dist.all_to_all_single(arriving, sizes)
            out = torch.empty(int(arriving.sum()), dtype=torch.uint8)
            dist.all_to_all_single(out, torch.cat(bytes_), arriving.tolist(), sizes.tolist())
        return [part.clone().view(dtype) for part in out.split(arriving.tolist())]  # clone: views need alignment


@contextmanager
def _peers() -> Iterator[None]:
    """Say in our words that a process has gone."""
    try:
        yield
    except RuntimeError as error:
        raise _gone() from error


def _stop(number: int, frame: FrameType | None) -> None:
    raise _gone()


def _gone() -> SafeglassesError:
    return SafeglassesError(
        "another process of the job has ended, or the job was told to stop",
        do="look above for its reason (none: it was killed, perhaps for want of memory), "
        "and run the same again: it goes on behind the last finished shard",
    )


def say_once(folder: Path, error: SafeglassesError) -> SafeglassesError:
    """Let one process of a dying job speak: the first to get here; for the others the error becomes silent.

    The mark is a file in the job's folder, named after the job, so that machines without a common file
    system say it once each.
    """
    if isinstance(error, Elsewhere) or "TORCHELASTIC_RUN_ID" not in os.environ:
        return error
    job = f"{os.environ['TORCHELASTIC_RUN_ID']}-{os.environ.get('MASTER_PORT', '')}"
    mark = folder / f".ended-{''.join(c for c in job if c.isalnum() or c in '-_')}"
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return Elsewhere(error.what)
    except OSError:
        pass
    return error
