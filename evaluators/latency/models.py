"""Whole models: timed in turns, and predicted from a table by the units that their blocks keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn

from secateur.evaluators.latency.clock import Clock, clock_of, threads
from secateur.evaluators.latency.conditions import LatencySetup
from secateur.evaluators.latency.forward import Forward
from secateur.evaluators.latency.rounds import ROUNDS, Timing, time_in_turns
from secateur.pruners.export.manifest import manifest_of
from secateur.pruners.models.anatomy import Anatomy
from secateur.spaces.architecture.candidate import Kept, read_kept
from secateur.spaces.latency import PHASES, LatencyTable, PhaseName


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
                {name: Forward(model, phase, setup).ready for name, model in models.items()},
                clock,
                rounds=rounds,
                of=setup.clock,
            )
            for phase in PHASES
        }


def predicted_ms(table: LatencyTable, phase: str, blocks: Sequence[Kept]) -> float:
    """Milliseconds of a model with these kept units in its blocks."""
    times = table.phases[phase]
    return times.rest_ms + sum(times.attention(kept.kv_groups) + times.mlp(kept.ffn) for kept in blocks)


def kept_in(model: str, anatomy: Anatomy, fingerprint: str) -> tuple[Kept, ...] | None:
    """Kept units of an exported model's blocks; None if they are not known.

    Args:
        model: an exported directory.
        anatomy: of the dense model.
        fingerprint: the dense model's.
    """
    manifest = manifest_of(Path(model))
    if manifest is None or manifest.fingerprint != fingerprint or len(manifest.kept) != len(anatomy.blocks):
        return None
    return read_kept({"blocks": manifest.kept})


def all_of(anatomy: Anatomy) -> tuple[Kept, ...]:
    """All units of the dense model's blocks."""
    return tuple(block.whole for block in anatomy.blocks)
