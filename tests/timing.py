"""Clocks that make times up, and latency tables of small models."""

from __future__ import annotations

from contextlib import contextmanager

from torch import nn
from transformers.pytorch_utils import Conv1D

from secateur.evaluators.latency.clock import Reading
from secateur.evaluators.latency.conditions import LatencySetup, conditions, key_of
from secateur.evaluators.latency.rounds import Spread
from secateur.evaluators.latency.store import MeasuredTable
from secateur.spaces.latency import PHASES, LatencyTable, Phase

SETUP = LatencySetup(prompt=8, threads=1)
VOCABULARY = 4096  # of tiny's tokenizer


class FakeSubject:
    """Takes so many milliseconds a call."""

    def __init__(self, ms: float) -> None:
        self.ms = ms

    @contextmanager
    def ready(self):
        yield lambda: self.ms


class FakeClock:
    """Asks calls how long they take, on a machine whose speed changes from one round to the next."""

    def __init__(self, n_subjects: int = 1, slowdown: float = 1.0) -> None:
        self.n_subjects = n_subjects
        self.slowdown = slowdown
        self.seen: list[float] = []

    def __call__(self, call):
        nominal = call()
        turn = max(0, len(self.seen) - 2 * self.n_subjects) // self.n_subjects  # after two warm-up rounds
        self.seen.append(nominal)
        return Reading(nominal * self.slowdown**turn, 3 * nominal)


class CountingClock:
    """5 ms, and one for each weight that projections multiply with, once a token: what is additive exactly."""

    def __call__(self, call):
        count = 0

        def add(module, args, output):
            nonlocal count
            count += (
                module.weight.numel() * args[0].shape[:-1].numel()
                if isinstance(module, nn.Linear | Conv1D)
                else 0
            )

        hook = nn.modules.module.register_module_forward_hook(add)
        try:
            call()
        finally:
            hook.remove()
        return Reading(5.0 + count, 0.0)


def table(key: str = "key", n_groups: int = 2, ffn: int = 48) -> LatencyTable:
    phase = Phase(1.0, tuple(0.5 * i for i in range(n_groups + 1)), ((0, 0.0), (ffn // 2, 0.75), (ffn, 1.25)))
    return LatencyTable(key, dict.fromkeys(PHASES, phase))


def measured(anatomy, setup=SETUP) -> MeasuredTable:
    found = conditions(anatomy, setup)
    dense = {phase: Spread(5.0, 4.5, 6.0) for phase in PHASES}
    return MeasuredTable(table(key_of(found)), found, dense, 10)
