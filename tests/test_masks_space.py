"""The space `masks`: units are inherited by name, varied near to what they were, and cut as they are named."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from secateur.pruners.calibration.tokens import Calibration
from secateur.pruners.models.discover import dissect
from secateur.pruners.models.shape import model_shape, prunables
from secateur.pruners.pruner import DenseModel
from secateur.pruners.structure.masks import MaskPruner
from secateur.spaces.masks.candidate import UnitMasks
from secateur.spaces.masks.settings import MaskSettings, build_masks
from secateur.spaces.masks.space import redrawn
from secateur.spaces.shape import BlockShape, ModelShape
from tests.models import random_tokens, small_llama

SHAPE = ModelShape(100_000, 2, 90_000, 256, (BlockShape(4, 200, 20, 48, 30, 20, 220, 30, 16),) * 6)


def build(**settings):
    return build_masks(MaskSettings(**settings), (), SHAPE)


def bits(candidate) -> np.ndarray:
    """Kept units of all blocks in a row."""
    rows = [block.kv_groups >> i & 1 for block in candidate.blocks for i in range(4)]
    return np.array(rows + [block.channels >> i & 1 for block in candidate.blocks for i in range(48)], bool)


@pytest.mark.parametrize(
    "text", ["masks:f/f,", "masks:0f/1", "masks:F/1", "masks:f", "mask:f/1", "masks:f/1 ", "masks:g/1"]
)
def test_only_the_canonical_text_is_accepted(text):
    with pytest.raises(ValueError, match="Expected masks"):
        UnitMasks.parse(text)


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ("f/1", "6 blocks, got 1"),
        ("1f/1" + ",f/1" * 5, "Expected some of f"),
        ("0/1" + ",f/1" * 5, "got 0 at block 0"),
    ],
)
def test_text_of_another_model_is_refused(blocks, message):
    with pytest.raises(ValueError, match=message):
        build(channels=1).parse("masks:" + blocks)


def test_runs_of_channels_must_divide_the_width():
    with pytest.raises(ValueError, match="Expected `channels` to divide the FFN width, got 7 for 48"):
        build(channels=7)


@pytest.mark.parametrize("similarity", [0.0, 0.5, 0.8, 1.0])
def test_a_new_mask_keeps_at_least_its_share_of_the_old_one(similarity):
    rng, shares = np.random.default_rng(0), []
    old = np.zeros(50, bool)
    old[rng.choice(50, 30, replace=False)] = True
    for n_kept in (30, 20, 45) * 100:
        new = redrawn(old, n_kept, similarity, rng)
        assert new.sum() == n_kept
        common = int((new & old).sum())
        assert common >= max(np.ceil(similarity * min(30, n_kept)), n_kept - 20)
        shares.append(common / min(30, n_kept))
    assert min(shares) < max(similarity, 0.4) + 0.1, "and often no more"
    assert similarity == 1 or len(set(shares)) > 5


def test_mutation_keeps_most_units_and_moves_numbers_in_half_of_the_cases():
    space, rng = build(channels=1, target=0.3, mutation=0.2, similarity=0.8), np.random.default_rng(0)
    parent = space.sample(rng, 0)
    moved, common = [], []
    for _ in range(300):
        child = space.mutate(parent, rng)
        assert child != parent
        assert space.target_of(child) == 0
        moved.append(space.kept(child) != space.kept(parent))
        common.append((bits(child) & bits(parent)).sum() / bits(parent).sum())
    assert 0.5 < np.mean(moved) < 0.75, "more than half, since a draw may change nothing"
    assert min(common) > 0.75
    still = build(channels=1, target=0.3, mutation=0.0)
    same = [still.kept(still.mutate(parent, rng)) == still.kept(parent) for _ in range(50)]
    assert not any(same), "without new masks it is numbers that move"


def test_crossover_inherits_each_mask_from_a_parent():
    space, rng = build(channels=1, target=0.3), np.random.default_rng(1)
    first = space.baselines()["uniform@0.3"]
    second = UnitMasks(tuple(block._replace(channels=moved(block.channels)) for block in first.blocks))
    assert space.kept(first) == space.kept(second)
    child = space.crossover(first, second, rng)
    parts = [(a == c, b == c) for a, b, c in zip(first.blocks, second.blocks, child.blocks, strict=True)]
    assert all(one or other for one, other in parts)
    assert child not in (first, second)


def moved(channels: int) -> int:
    """One channel replaced by another."""
    gone = next(i for i in range(48) if channels >> i & 1)
    new = next(i for i in range(48) if not channels >> i & 1)
    return channels ^ (1 << gone) ^ (1 << new)


def test_first_masks_are_the_most_important_units():
    space = build(channels=4, target=0.3)
    orders = {(block, "attention"): [2, 0, 3, 1] for block in range(6)}
    orders |= {(block, "mlp"): list(range(47, -1, -1)) for block in range(6)}
    found = space.ranked_baselines("obs", orders)["obs@0.3"]
    assert space.kept(found) == space.kept(space.baselines()["uniform@0.3"])
    for mask, kept in zip(found.blocks, space.kept(found), strict=True):
        assert mask.kv_groups == sum(1 << unit for unit in [2, 0, 3, 1][: kept.kv_groups])
        n_runs = kept.ffn // 4
        assert mask.channels == ((1 << n_runs) - 1) << (12 - n_runs), "the last runs"


@pytest.fixture
def pruner(tmp_path):
    anatomy = dissect(small_llama())
    settings = MaskSettings(target=0.3, channels=8, importance="wanda_sp", repair="obs")
    dense = DenseModel(anatomy, "model", model_shape(anatomy, 16, 4))
    space = build_masks(settings, prunables(anatomy), dense.shape)
    tokens = Calibration(random_tokens(64, 16), "docs")
    pruner = MaskPruner(settings, dense, space=space, calibration=tokens)
    pruner.prepare(tmp_path)
    pruner.space = space.with_baselines(pruner.baselines(tmp_path))
    pruner.open(tmp_path)
    return pruner


def logits(model) -> torch.Tensor:
    return model(random_tokens(2, 16, 5)).logits


def measured(pruner, config) -> torch.Tensor:
    for block, key in enumerate(pruner.keys(config)):
        pruner.apply(block, key)
    found = logits(pruner.anatomy.model)
    pruner.restore()
    return found


def test_what_is_measured_is_the_dense_model_without_the_units_that_are_not_named(pruner):
    model = pruner.anatomy.model
    dense, config = logits(model), pruner.space.config(pruner.space.sample(np.random.default_rng(3), 0))
    found = measured(pruner, config)
    assert torch.equal(logits(model), dense), "and it is restored"
    for block, units in zip(pruner.anatomy.blocks, config["units"], strict=True):
        outputs = {linear.name.rpartition(".")[2]: linear for linear in block.linears}
        for name, kept, width in (("o_proj", units["kv_groups"], 16), ("down_proj", units["channels"], 1)):
            weight = outputs[name].weight.clone()
            gone = torch.ones(weight.shape[1], dtype=torch.bool)
            for unit in kept:
                gone[unit * width : (unit + 1) * width] = False
            weight[:, gone] = 0
            outputs[name].point_to(weight)
    assert torch.allclose(logits(model), found, atol=1e-5)
    assert not torch.allclose(found, dense, atol=1e-2)


def test_a_prune_for_good_gives_what_was_measured_and_repairs_it_behind_pruned_blocks(pruner):
    candidate = pruner.space.baselines()["wanda_sp@0.3"]
    config, dense = pruner.space.config(candidate), logits(pruner.anatomy.model)
    searched, errors = measured(pruner, config), {}
    for sequential in (False, True):
        model = small_llama()
        of = DenseModel(dissect(model), "model", pruner.dense.shape)
        alone = MaskPruner(pruner.settings, of, calibration=pruner.calibration)
        alone.prune(config, sequential=sequential)
        found = logits(model)
        assert sequential or torch.allclose(found, searched, atol=1e-5)
        errors[sequential] = float((found - dense).square().mean())
        assert [list(x.channels) for x in alone.units] == [block["channels"] for block in config["units"]]
        assert sum(p.numel() for p in model.parameters()) == pruner.space.cost(candidate)["params"]
    assert errors[True] < errors[False]
