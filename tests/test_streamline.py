"""LLM-Streamline: the window that goes, and the block that is trained to stand for it."""

from __future__ import annotations

import itertools
import math
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F

from secateur.pruners.calibration.statistics import ModelStatistics
from secateur.pruners.calibration.stream import stream_states
from secateur.pruners.depth import streamline
from secateur.pruners.depth.angular import angles, by_angle
from secateur.pruners.depth.merge_targets import DroppedRun, Fitting, block_tensors, point_block
from secateur.pruners.depth.streamline import by_window, nested_order
from secateur.pruners.models.discover import dissect
from tests.structures import CONFIGS, TOKENS, build, repaired_blocks

N_BLOCKS = 6
WHOLE = ModelStatistics(N_BLOCKS, {})
QUICK = Fitting(steps=12, windows=3, learning_rate=2e-3)


@pytest.fixture(scope="module")
def anatomy():
    config = deepcopy(CONFIGS["llama-biased"])
    config.num_hidden_layers = N_BLOCKS
    return dissect(build(config))


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


# --- LLM-Streamline's choice ---


def brute_window(cosines, size):
    n_blocks = len(cosines) - 1
    windows = [range(start, start + size) for start in range(1, n_blocks - size + 1)]
    return set(max(windows, key=lambda x: cosines[x.start - 1, x.stop]))


@pytest.mark.parametrize("seed", range(5))
def test_the_window_is_the_papers_for_a_quarter_and_grows_from_there(seed):
    cosines = torch.rand(13, 13, generator=torch.Generator().manual_seed(seed))
    order = nested_order(cosines)
    assert sorted(order) == [*range(1, 12)]
    assert set(order[:3]) == brute_window(cosines, 3)
    for size in range(1, 12):
        assert max(order[:size]) - min(order[:size]) == size - 1  # one window, whatever the budget


def test_small_stacks_have_an_order():
    for n_blocks in (1, 2, 3):
        assert sorted(nested_order(torch.rand(n_blocks + 1, n_blocks + 1))) == [*range(1, n_blocks)]


def test_windows_are_scored_by_cosines_of_the_stream(anatomy):
    states = [x.flatten(0, 1) for x in stream_states(anatomy, TOKENS)]
    cosines = torch.tensor([[F.cosine_similarity(x, y, dim=-1).mean() for y in states] for x in states])
    scores = by_window(anatomy, TOKENS, WHOLE)
    assert sorted(range(N_BLOCKS), key=scores.__getitem__) == [*nested_order(cosines), 0]


# --- angular distance ---


def test_the_window_of_a_quarter_turns_the_last_token_least():
    """The slow form, over windows of dropped blocks alone."""
    config = deepcopy(CONFIGS["llama-biased"])
    config.num_hidden_layers = 8
    anatomy = dissect(build(config))
    states = [x[:, -1].double() for x in stream_states(anatomy, TOKENS)]

    def distance(start, stop):
        cosines = [F.cosine_similarity(x, y, dim=0) for x, y in zip(states[start], states[stop], strict=True)]
        return sum(math.acos(min(1.0, float(x))) / math.pi for x in cosines) / len(cosines)

    found = angles(states)
    assert float(found[2, 5]) == pytest.approx(distance(2, 5), rel=1e-6)
    scores = by_angle(anatomy, TOKENS, WHOLE)
    first = sorted(range(8), key=scores.__getitem__)[:2]
    start = min(range(1, 7), key=lambda x: distance(x, x + 2))
    assert sorted(first) == [start, start + 1]
    assert scores[0] == math.inf


# --- LLM-Streamline's replacement ---


def distance(anatomy, tensors, run):
    """Mean squared error of a merge target with these weights, over the calibration tokens."""
    states = list(stream_states(anatomy, TOKENS))
    block = anatomy.blocks[run.target]
    before = block_tensors(block)
    point_block(block, tensors)
    try:
        found = list(stream_states(anatomy, TOKENS))[run.target + 1]
    finally:
        point_block(block, before)
    return float(F.mse_loss(found, states[run.end]))


def test_training_brings_the_replacement_nearer(anatomy):
    run = DroppedRun(1, (2, 3))
    start = distance(anatomy, block_tensors(anatomy.blocks[1]), run)
    few, more = (
        repaired_blocks(anatomy, run.dropped, "streamline", TOKENS, Fitting(steps, 3, 2e-3))[1]
        for steps in (6, 30)
    )
    assert distance(anatomy, more, run) < distance(anatomy, few, run) < start


def test_training_repeats_with_its_seed(anatomy):
    def trained(seed):
        return repaired_blocks(anatomy, [2], "streamline", TOKENS, Fitting(3, 2, 1e-3, seed))[1]

    assert same(trained(0), trained(0))
    assert not same(trained(0), trained(1))


def test_half_precision_is_trained_in_full(anatomy):
    half = dissect(deepcopy(anatomy.model).bfloat16())
    found = repaired_blocks(half, [2], "streamline", TOKENS, QUICK)[1]
    full = repaired_blocks(anatomy, [2], "streamline", TOKENS, QUICK)[1]
    for name, x in found.items():
        assert x.dtype == torch.bfloat16
        assert torch.allclose(x.float(), full[name], atol=0.05)


def test_every_window_is_seen_as_often():
    batches = [*itertools.islice(streamline._batches(6, Fitting(steps=4, windows=3)), 4)]
    assert sorted([*batches[0], *batches[1]]) == sorted([*batches[2], *batches[3]]) == [*range(6)]


@pytest.mark.parametrize("name", ["steps", "windows", "learning_rate"])
def test_settings_of_the_training_are_checked(name):
    nothing = 0.0 if name == "learning_rate" else 0
    with pytest.raises(ValueError, match=f"Expected `{name}` > 0, got 0"):
        Fitting(**{name: nothing})


def test_a_loss_that_is_not_finite_is_named(anatomy):
    broken = Fitting(steps=30, windows=3, learning_rate=1e30)
    with pytest.raises(
        ValueError, match=r"finite loss of the replacement, got .* at model\.layers\.1\. Lower"
    ):
        repaired_blocks(anatomy, [2], "streamline", TOKENS, broken)


def test_memory_is_checked_before(anatomy, monkeypatch):
    monkeypatch.setattr("secateur.pruners.models.memory.available_bytes", lambda device: 1)
    with pytest.raises(ValueError, match="memory for the training of replacements of 1 runs"):
        repaired_blocks(anatomy, [2], "streamline", TOKENS)
