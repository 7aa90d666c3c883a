"""What the C library does with memory that a worker frees; where it is not glibc, nothing is done."""

from __future__ import annotations

import ctypes
from contextlib import suppress

KEPT_BYTES = 2**27
"""Of freed memory at the end of the heap, until it is given back. By default the C library returns it at once, and each
candidate has the system make and clear the same pages again."""

MAPPED_BYTES = 2**25
"""Pieces of this size and more are mapped each by itself, and go back when they are freed."""

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's numbers for them


def keep_memory() -> None:
    """Keep what is freed for the next candidate."""
    with suppress(AttributeError, OSError, TypeError):
        library = ctypes.CDLL(None)
        library.mallopt(_MMAP_THRESHOLD, MAPPED_BYTES)
        library.mallopt(_TRIM_THRESHOLD, KEPT_BYTES)


def give_back_memory() -> None:
    """Return what was freed to the system: the workers of a node share what there is."""
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
