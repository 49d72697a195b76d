"""The run folder: what went in is written first, so that a rerun resumes and another run is refused."""

import logging
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safeglasses import __version__
from safeglasses.errors import SafeglassesError
from safeglasses.files import read_json, write_json

log = logging.getLogger(__name__)
SCHEMA = 1
_LIBRARIES = ("torch", "transformers", "peft", "numpy", "optuna", "safetensors", "datasets", "pillow")


@dataclass(frozen=True)
class RunFolder:
    """A folder that one set of inputs owns; every stage writes its result here and reads it when it is there."""

    path: Path
    """The folder."""
    resumed: bool
    """Whether an earlier run with the same inputs had begun it."""

    @classmethod
    def open(cls, path: Path, inputs: Mapping[str, Any], *, overwrite: bool = False) -> "RunFolder":
        """Create the folder, or resume it when the inputs are the same.

        Args:
            path: where the run lives.
            inputs: JSON-ready: everything that decides the result (hashes of files, recipe, seeds, plan).
            overwrite: delete what another run left there.

        Raises:
            SafeglassesError: as in `examine`.
        """
        if cls.examine(path, inputs, overwrite=overwrite):
            log.info("resuming the run in %s", path)
            return cls(path, resumed=True)
        if path.exists():
            shutil.rmtree(path)
        path.mkdir(parents=True)
        write_json(path / "environment.json", {"schema": SCHEMA, "inputs": dict(inputs), **environment()})
        return cls(path, resumed=False)

    @staticmethod
    def examine(path: Path, inputs: Mapping[str, Any], *, overwrite: bool = False) -> bool:
        """Say whether a run with these inputs would resume; nothing is written.

        Raises:
            SafeglassesError: the folder holds something else, or a run with other inputs (naming which differ).
        """
        record = path / "environment.json"
        if not path.exists() or (path.is_dir() and not any(path.iterdir())):
            return False
        if not record.is_file():
            raise SafeglassesError(
                "the output folder exists and is not a run of safeglasses",
                given=str(path),
                expected="a new folder, or the folder of a run to resume",
                do="choose another --out",
            )
        if overwrite:
            return False
        before = read_json(record)["inputs"]
        changed = sorted(k for k in {*before, *inputs} if before.get(k) != inputs.get(k))
        if changed:
            differences = ", ".join(f"{k} ({before.get(k)!r} → {inputs.get(k)!r})" for k in changed)
            raise SafeglassesError(
                "the output folder holds a run with other inputs",
                given=f"{path}; different: {differences}",
                expected="the same inputs, to resume it",
                do="choose another --out, or delete that run with --overwrite",
            )
        return True

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """Return the JSON record `name`, made and written by `make` the first time."""
        path = self.path / name
        if not path.exists():
            write_json(path, make())
        return read_json(path)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the seconds spent inside to ``seconds.json``; a stage cut by a kill counts what its reruns took."""
        start = time.perf_counter()
        yield
        seconds = self.seconds()
        seconds[stage] = round(seconds.get(stage, 0.0) + time.perf_counter() - start, 2)
        write_json(self.path / "seconds.json", seconds)

    def seconds(self) -> dict[str, float]:
        """Seconds per stage so far, over all resumed runs."""
        path = self.path / "seconds.json"
        return read_json(path) if path.exists() else {}


def environment() -> dict[str, Any]:
    """Versions, machine and command, for whoever wants to repeat the run."""
    return {
        "versions": {
            "safeglasses": __version__,
            "python": platform.python_version(),
            **{name: version(name) for name in _LIBRARIES},
        },
        "machine": {"system": platform.system(), "processor": platform.machine(), "cores": os.cpu_count()},
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
