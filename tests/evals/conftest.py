import io
import json
import os
import sys
from pathlib import Path

import pytest
from PIL import Image

from safeglasses.data.examples import Example, Picture, Text, Turn, read_examples
from safeglasses.data.miniature import CHECKPOINT, benchmark
from safeglasses.model.vlm import VLM, load

QUIET = [
    pytest.mark.filterwarnings("ignore:The 'initial' parameter is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Unclosed <MemoryObject:ResourceWarning"),
]
"""Inspect's own calls of tenacity, and streams that it leaves to the garbage collector."""
SRC = Path(__file__).resolve().parents[2] / "src"


def png(colour: str = "red", size: tuple[int, int] = (24, 24)) -> bytes:
    """Return a picture of one colour."""
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def ask(id: str, text: str = "what is in the picture", *colours: str, **fields) -> Example:
    """Return a row with as many pictures as colours."""
    pictures = tuple(Picture(data=png(colour)) for colour in colours)
    return Example(id=id, messages=(Turn("user", (*pictures, Text(text))),), **{"split": "test", **fields})


@pytest.fixture(scope="session")
def prompts_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty test prompts of the miniature's benchmark: thirty eliciting, thirty benign."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "PROMPTS", {"test": 60})
        patch.setattr(benchmark, "PAIRS", {})
        patch.setattr(benchmark, "HARM", {})
        return benchmark.write_benchmark(tmp_path_factory.mktemp("benchmark")).prompts


@pytest.fixture(scope="session")
def prompts(prompts_file: Path) -> tuple[Example, ...]:
    """The rows of that file."""
    return read_examples(prompts_file).rows


@pytest.fixture(scope="session")
def miniature() -> VLM:
    """The miniature; leave its weights alone."""
    return load(CHECKPOINT)


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process in which the package is installed with its entry point, and nothing is online."""
    home = tmp_path_factory.mktemp("home")
    info = home / "site" / "safeglasses-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: safeglasses\nVersion: 0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text("[inspect_ai]\nsafeglasses = safeglasses.evals.registry\n", encoding="utf-8")
    url = {"url": SRC.parent.as_uri(), "dir_info": {"editable": True}}
    (info / "direct_url.json").write_text(json.dumps(url), encoding="utf-8")
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(info.parent), str(SRC)]),
        "INSPECT_DISPLAY": "plain",
        "HOME": str(home),
    }


def inspect_command(*words: object) -> list[str]:
    """Return Inspect's command line."""
    return [sys.executable, "-m", "inspect_ai", *map(str, words)]
