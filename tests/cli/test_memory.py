"""The allocator is asked where it can be, and nothing breaks where it cannot."""

import ctypes
import sys

import pytest

from safeglasses.cli import memory


def test_glibc_keeps_freed_memory() -> None:
    if sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"):
        pytest.skip("another C library")
    assert memory.keep_freed_memory()


@pytest.mark.parametrize("error", [AttributeError, OSError, TypeError])
def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    def none(name: object) -> object:
        raise error

    monkeypatch.setattr(memory.ctypes, "CDLL", none)
    assert not memory.keep_freed_memory()
