"""Measurement of a latency table: times of a model's sub-layers on its device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from scipy.optimize import isotonic_regression

from secateur.evaluators.latency.clock import Clock, clock_of, threads
from secateur.evaluators.latency.conditions import LatencySetup, conditions, key_of
from secateur.evaluators.latency.forward import Forward
from secateur.evaluators.latency.rounds import ROUNDS, Spread, Timing, time_in_turns
from secateur.evaluators.latency.stacks import cut_stack, depth, exchanged
from secateur.evaluators.latency.store import MeasuredTable
from secateur.pruners.models.anatomy import Anatomy
from secateur.pruners.models.check_kept import check_parts
from secateur.pruners.models.find_layout import find_layouts
from secateur.spaces.latency import PHASES, LatencyTable, Phase, PhaseName

MOST_POINTS = 8
"""Measured numbers of KV groups and of FFN channels; times between them are interpolated."""

DENSE, REST, FRAME = "dense", "rest", "frame"
Shape = tuple[int, int]  # KV groups and FFN channels of each block of a stack
EMPTY: Shape = (0, 0)


def measure_table(
    anatomy: Anatomy,
    setup: LatencySetup,
    *,
    rounds: int = ROUNDS,
    clock: Clock | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> MeasuredTable:
    """Time stacks of a few equal blocks for each size of the attention and of the MLP alone, beside the dense model.

    A stack runs inside the model's own forward pass, with its masks, positions and cache, so any family works; the
    time of the pass without blocks is subtracted. Calling a block takes time even if nothing is left in it, which is
    measured too: each sub-layer is given half of that, so that the two add up to the whole block. Times are means
    over the blocks of a stack, made monotone: by least squares a smaller sub-layer takes no longer than a larger one.

    Args:
        anatomy: the dense model, on the device to measure.
        setup: batch, prompt, threads.
        rounds: of `time_in_turns`.
        clock: None for that of the model's device.
        say: given progress, one line at a time.

    Raises:
        ValueError: if the model's blocks differ in shape or can't be cut, its context is shorter than the prompt, or
            there is no clock for its device.
    """
    found = conditions(anatomy, setup)
    clock = clock or clock_of(anatomy.embedding.weight.device)
    block = anatomy.blocks[0]
    groups, widths = points(block.n_kv_heads), points(block.ffn_width)
    shapes = [EMPTY, *((count, 0) for count in groups), *((0, width) for width in widths)]
    n_blocks = depth(anatomy, len(shapes))
    say(f"cutting {len(shapes)} stacks of {n_blocks} blocks")
    layouts = find_layouts(anatomy)[:n_blocks]
    check_parts(layouts, "a latency table")
    stacks = {shape: cut_stack(layouts, *shape) for shape in shapes}
    phases, dense = dict[str, Phase](), dict[str, Spread]()
    with threads(setup.n_threads):
        for phase in PHASES:
            say(f"timing {phase}, {rounds} rounds of {len(shapes) + 3}")
            timings = _time(anatomy, stacks, phase, setup, clock, rounds)
            dense[phase] = timings[DENSE].ms
            phases[phase] = _phase(timings, groups, widths, n_blocks)
    return MeasuredTable(LatencyTable(key_of(found), phases), found, dense, rounds)


def points(n: int) -> list[int]:
    """Sizes from 1 to n that are measured: all, or `MOST_POINTS` at about equal distances, n among them."""
    return sorted({round(n * i / min(n, MOST_POINTS)) for i in range(1, min(n, MOST_POINTS) + 1)})


def _time(
    anatomy: Anatomy,
    stacks: Mapping[Shape, torch.nn.ModuleList],
    phase: PhaseName,
    setup: LatencySetup,
    clock: Clock,
    rounds: int,
) -> dict[str, Timing]:
    """The dense model, the model without blocks, the same without its head, and each stack without the head."""
    empty = partial(exchanged, anatomy, torch.nn.ModuleList())
    subjects = {
        DENSE: Forward(anatomy.model, phase, setup).ready,
        REST: Forward(anatomy.model, phase, setup, changed=empty).ready,
        FRAME: Forward(anatomy.model, phase, setup, head=False, changed=empty).ready,
    }
    for shape, stack in stacks.items():
        inside = partial(exchanged, anatomy, stack)
        cached = shape[0] > 0  # else nothing is read from the cache
        subjects[str(shape)] = Forward(
            anatomy.model, phase, setup, head=False, cached=cached, changed=inside
        ).ready
    return time_in_turns(subjects, clock, rounds=rounds, of=setup.clock)


def _phase(
    timings: Mapping[str, Timing], groups: Sequence[int], widths: Sequence[int], n_blocks: int
) -> Phase:
    """Times of single sub-layers from those of stacks."""
    frame, empty = timings[FRAME].ms.median, timings[str(EMPTY)].ms.median
    call = max(empty - frame, 0.0)  # an empty block's, in both of the stacks that make up a block

    def ms(shape: Shape) -> float:
        return (timings[str(shape)].ms.median - frame - call / 2) / n_blocks

    attention = _monotone([ms((count, 0)) for count in groups])
    ffn = _monotone([ms((0, width)) for width in widths])
    every = np.interp(np.arange(groups[-1] + 1), [0, *groups], [0.0, *attention])
    return Phase(timings[REST].ms.median, tuple(every.tolist()), ((0, 0.0), *zip(widths, ffn, strict=True)))


def _monotone(ms: Sequence[float]) -> list[float]:
    """The nearest ascending times from 0 up, by least squares."""
    ascending: list[float] = np.maximum(isotonic_regression(ms).x, 0.0).tolist()
    return ascending
