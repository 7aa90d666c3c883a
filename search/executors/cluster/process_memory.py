"""Memory settings of glibc for workers; no effect with other C libraries."""

from __future__ import annotations

import ctypes
from contextlib import suppress

KEPT_BYTES = 2**27
"""Freed memory kept at the end of the heap. By default the C library returns it at once, and the system maps and clears
the same pages again for each candidate."""

MAPPED_BYTES = 2**25
"""Smallest allocation with a mapping of its own, which is returned to the system when freed."""

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's constants


def keep_memory() -> None:
    """Keep freed memory for the next candidate."""
    with suppress(AttributeError, OSError, TypeError):
        library = ctypes.CDLL(None)
        library.mallopt(_MMAP_THRESHOLD, MAPPED_BYTES)
        library.mallopt(_TRIM_THRESHOLD, KEPT_BYTES)


def give_back_memory() -> None:
    """Return freed memory to the system: the workers of a node share it."""
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
