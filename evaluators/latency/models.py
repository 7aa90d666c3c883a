"""Whole models timed beside each other: what a table's prediction is checked with."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from secateur.evaluators.latency.clock import Clock, clock_of
from secateur.evaluators.latency.forward import Forward
from secateur.evaluators.latency.rounds import ROUNDS, Timing, time_in_turns
from secateur.evaluators.latency.setup import LatencySetup
from secateur.evaluators.latency.threads import threads
from secateur.spaces.latency import PHASES, PhaseName


def time_models(
    models: Mapping[str, nn.Module],
    setup: LatencySetup,
    *,
    rounds: int = ROUNDS,
    clock: Clock | None = None,
) -> dict[PhaseName, dict[str, Timing]]:
    """Time models in turns, prefill and decode; the first one is the reference of the ratios.

    Args:
        models: by name, on one device.
        setup: batch, prompt, threads.
        rounds: of `time_in_turns`.
        clock: None for that of the device.

    Raises:
        ValueError: if there is no clock for the device, or a context is shorter than the prompt.
    """
    clock = clock or clock_of(next(next(iter(models.values())).parameters()).device)
    with threads(setup.n_threads):
        return {
            phase: time_in_turns(
                {name: Forward(model, phase, setup) for name, model in models.items()},
                clock,
                rounds=rounds,
                of=setup.clock,
            )
            for phase in PHASES
        }
