"""Offline, quiet, type-checked: what every test runs under."""

import os
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import half_torchvision

half_torchvision.mend()  # before the first import of transformers

import jaxtyping

jaxtyping.install_import_hook("safeglasses", "beartype.beartype")  # before the first import of safeglasses

# ruff: noqa: E402
import pytest
from transformers.utils import is_torchvision_available
from transformers.utils.logging import disable_progress_bar

import families
from safeglasses.model.vlm import VLM, load

disable_progress_bar()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what needs torchvision where there is none."""
    if item.get_closest_marker("torchvision") is not None and not is_torchvision_available():
        pytest.skip("needs torchvision; `make test` has a second run with it")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random llava checkpoint; treat the folder as read-only."""
    return families.build("llava", tmp_path_factory.mktemp("tiny") / "llava")


@pytest.fixture(scope="session")
def tiny_vlm(tiny: Path) -> VLM:
    """The tiny llava, loaded; shared by the session, so leave its weights alone."""
    return load(tiny)


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], VLM]:
    """Build and load a family once; leave its weights alone."""
    folder = tmp_path_factory.mktemp("families")
    loaded: dict[str, VLM] = {}

    def get(name: str) -> VLM:
        if name not in loaded:
            loaded[name] = load(families.build(name, folder / name))
        return loaded[name]

    return get
