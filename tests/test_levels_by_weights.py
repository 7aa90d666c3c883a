"""Levels a fixed number of weights apart: any two linears exchange one, as in EvoPress's database."""

from __future__ import annotations

import re

import numpy as np
import pytest

from secateur.pruners.pruner import DenseModel
from secateur.pruners.weights.level_store import LevelStore, StoreKey, build_levels
from secateur.pruners.weights.method import Method
from secateur.pruners.weights.pruner import AllocationPruner
from secateur.search.errors import UsageError
from secateur.search.settings.settings import identity, load_settings, settings_from
from secateur.spaces.allocation.settings import AllocationSettings, build_allocation
from secateur.spaces.levels import levels_by_weights, n_zeros, sparsities_of
from secateur.spaces.shape import ModelShape, Prunable
from tests.models import count_zeros, random_tokens, small_anatomy

SIZES = {"q": 331776, "k": 110592, "v": 110592, "o": 331776, "gate": 884736, "up": 884736, "down": 884736}
LINEARS = tuple(
    Prunable(f"model.layers.{block}.{name}_proj", block, "mlp" if name in "gate up down" else "attention", n)
    for block in range(30)
    for name, n in SIZES.items()
)
SHAPE = ModelShape(
    n_params=134_515_008, bytes_per_param=2, macs_per_token=134_000_000, kv_bytes_per_token=23040
)
STEP = 8294  # EvoPress's default for this model: 0.5 min(s, 1 - s) / 8 levels * 576 ** 2


def build(**settings):
    settings = {"step_weights": STEP, "around": 8, "max_sparsity": 1, "target": 0.6} | settings
    return build_allocation(AllocationSettings(**settings), LINEARS, SHAPE)


def zeros_of(levels, n_weights):
    return [n_zeros(level, n_weights) for level in levels]


def test_levels_are_as_many_weights_apart_in_every_linear_and_one_is_at_the_target():
    space = build()
    for n in set(SIZES.values()):
        zeros = zeros_of(sparsities_of(space.levels, n), n)
        assert zeros[0] == 0
        assert set(np.diff(zeros[1:])) == {STEP}
        assert n_zeros(0.6, n) in zeros
    assert len(sparsities_of(space.levels, 884736)) == 1 + 17
    small = zeros_of(sparsities_of(space.levels, 110592), 110592)
    assert small[-1] == n_zeros(0.6, 110592) + 5 * STEP, "0.4 / 0.075 whole steps are left above"


def test_without_a_number_all_levels_up_to_the_highest_sparsity_are_there():
    assert zeros_of(levels_by_weights(100, 20, [0.5], 0.95, None), 100) == [0, 10, 30, 50, 70, 90]
    assert zeros_of(levels_by_weights(100, 20, [0.5], 0.95, 1), 100) == [0, 30, 50, 70]
    assert zeros_of(levels_by_weights(100, 20, [0.4, 0.75], 1, 1), 100) == [0, 20, 40, 60, 80, 100]
    assert zeros_of(levels_by_weights(100, 25, [0.5], 1, None), 100) == [0, 25, 50, 75, 100]


def test_mutation_exchanges_levels_of_any_two_linears_and_keeps_the_number_of_zeros():
    space, rng = build(), np.random.default_rng(0)
    parent = space.baselines()["uniform@0.6"]
    assert space.cost(parent)["sparsity"] == pytest.approx(0.6, abs=1e-6)
    total = sum(space.usage(slot, level) for slot, level in enumerate(parent.levels))
    pairs, numbers = set(), []
    for _ in range(2000):
        child = space.mutate(parent, rng)
        assert sum(space.usage(slot, level) for slot, level in enumerate(child.levels)) == total
        moves = np.subtract(child.levels, parent.levels)
        assert moves.sum() == 0
        up, down = np.flatnonzero(moves > 0), np.flatnonzero(moves < 0)
        numbers.append(int(np.abs(moves).sum()) // 2)
        if numbers[-1] == 1:
            pairs.add((list(SIZES)[up[0] % 7], list(SIZES)[down[0] % 7]))
    assert {(a, b) for a in SIZES for b in SIZES} == pairs, "whatever their sizes"
    shares = np.bincount(numbers, minlength=4) / len(numbers)
    assert shares[1:4] == pytest.approx([5 / 9, 3 / 9, 1 / 9], abs=0.05)


def test_several_targets_are_met_from_above():
    space = build(target=[0.5, 0.6, 0.65], around=None)
    for index, target in enumerate(space.targets):
        found = space.cost(space.baselines()[f"uniform@{target}"])["sparsity"]
        assert target - 2e-6 <= found <= target + STEP / (30 * sum(SIZES.values())) + 2e-6
        assert space.target_of(space.sample(np.random.default_rng(index), index)) == index


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"step_weights": 9, "granularity": "block"}, "Expected `granularity: linear`"),
        ({"step_weights": 9, "group_size": 4}, "`step_weights`"),
        ({"around": 4}, "Expected `space.step_weights` beside `around`"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_together_are_refused(settings, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        settings_from({"space": {"kind": "allocation", **settings}})


def test_a_search_that_says_nothing_has_the_identity_it_had_before_there_was_such_a_setting():
    assert not {"step_weights", "around"} & set(identity(load_settings())["space"])
    by_weights = ["space.step_weights=9"]
    assert identity(load_settings(None, by_weights)) != identity(load_settings())
    another = load_settings(None, [*by_weights, "space.target=0.7"])
    assert identity(another) != identity(load_settings(None, by_weights)), "level 3 is another sparsity there"


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_the_store_holds_the_levels_of_each_linear(method, tmp_path):
    anatomy = small_anatomy()
    linears = [Prunable(x.name, x.block, x.sublayer, x.n_weights) for x in anatomy.linears]
    settings = AllocationSettings(metric=method, target=0.5, step_weights=100, around=2, max_sparsity=1)
    space = build_allocation(settings, linears, SHAPE)
    key = StoreKey("model", "float32", "tokens", Method(method), space.levels)
    build_levels(tmp_path, anatomy, random_tokens(4, 16), key)
    store = LevelStore(tmp_path, anatomy, space.levels)
    for linear in anatomy.linears:
        levels = sparsities_of(space.levels, linear.n_weights)
        found = [int((store.weight(linear, level) == 0).sum()) for level in range(len(levels))]
        assert found == zeros_of(levels, linear.n_weights)
    pruner = AllocationPruner(settings, DenseModel(anatomy, "model", SHAPE), space=space)
    pruner.open(tmp_path)
    candidate = space.mutate(space.baselines()["uniform@0.5"], np.random.default_rng(0))
    for block, level in enumerate(pruner.keys(space.config(candidate))):
        pruner.apply(block, level)
    wanted = [space.usage(slot, level) for slot, level in enumerate(candidate.levels)]
    assert list(count_zeros(anatomy).values()) == wanted
    pruner.restore()
    assert not any(count_zeros(anatomy).values())
