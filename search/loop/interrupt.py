"""Ctrl-C during a search: the first ends it after the running batch, the second at once."""

from __future__ import annotations

import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

from secateur.search.loop.loop import Observer, Outcome, Search


class Interrupt(Observer):
    """Signal handler: the first signal during a search calls `Search.stop`, any other raises KeyboardInterrupt.

    SIGTERM, which batch systems send, counts as Ctrl-C. A context manager, which restores the old handlers, and an
    observer of the search, which notices its end.

    Args:
        say: receives the messages.
        again: the command that continues the search.
    """

    def __init__(self, say: Callable[[str], None], again: str) -> None:
        self._say = say
        self._again = again
        self._search: Search | None = None
        self._before: dict[signal.Signals, Any] = {}

    def watch(self, search: Search) -> None:
        """Set the search to stop."""
        self._search = search

    def __enter__(self) -> Interrupt:
        signals = (signal.SIGINT, signal.SIGTERM)
        self._before = {number: signal.signal(number, self._on_signal) for number in signals}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._search is None:
            raise KeyboardInterrupt
        self._search.stop()
        self._search = None
        self._say(
            f"Stopping after the running batch; again to stop at once. Then continue with: {self._again}"
        )

    def on_end(self, outcome: Outcome) -> None:
        self._search = None
