"""What this process asks of the C library's allocator."""

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
_ALWAYS = 2**31 - 1
_LARGE = 2**28


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory for the next allocation; return whether it could be asked.

    It hands blocks above 32 MiB back to the system at once, and every gradient step on a CPU gets the same ones
    again, zeroed page by page: a quarter of calibration's time. Only for a process of our own: a library leaves
    the allocator alone.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library; TypeError is Windows
        return False
    return all([mallopt(_MMAP_THRESHOLD, _LARGE), mallopt(_TRIM_THRESHOLD, _ALWAYS)])
