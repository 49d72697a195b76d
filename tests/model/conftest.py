"""Loaded families, each built once a session."""

from collections.abc import Callable

import pytest

import families
from safeglasses.model.vlm import VLM, load


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
