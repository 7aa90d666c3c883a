"""A limit on the Python calls of tested code, in place of one on its time."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

MOST = 2_000_000
"""Calls of Python functions."""


@contextmanager
def few_calls() -> Iterator[None]:
    """Fail if the block calls `MOST` Python functions or more."""
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
