"""Signals to a search: the first stops it, and the second interrupts."""

import signal

import pytest

from secateur.search.budget import Spent
from secateur.search.loop.interrupt import Interrupt
from secateur.search.loop.loop import Outcome


class FakeSearch:
    stopped = False

    def stop(self):
        self.stopped = True


def test_the_first_signal_stops_and_the_second_interrupts():
    said, search = [], FakeSearch()
    before = signal.getsignal(signal.SIGINT)
    with Interrupt(said.append, "secateur search s.yaml") as interrupt:
        interrupt.watch(search)
        signal.raise_signal(signal.SIGINT)
        assert search.stopped
        assert "secateur search s.yaml" in said[0]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_signal_before_or_after_a_search_interrupts():
    search = FakeSearch()
    with Interrupt([].append, "") as interrupt:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        interrupt.watch(search)
        interrupt.on_end(Outcome("budget", Spent()))
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert not search.stopped
