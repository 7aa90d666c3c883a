"""How much work a call is, counted in function calls, which are the same on every machine."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

MOST = 2_000_000
"""Calls of Python functions; some seconds."""


@contextmanager
def little_work() -> Iterator[None]:
    """The block's work is bounded: it fails at its end if it called more functions than that."""
    n_calls = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal n_calls
        n_calls += event == "call"

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        yield
    finally:
        sys.setprofile(before)
    assert n_calls < MOST
