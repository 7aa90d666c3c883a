"""Merging and replacing blocks that are dropped, and how those methods choose them."""

from __future__ import annotations

import math
from copy import deepcopy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from secateur.pruners.calibration.statistics import ModelStatistics
from secateur.pruners.depth.laco import by_acceptance
from secateur.pruners.depth.merge_targets import DroppedRun, Fitting, block_tensors, point_block, runs_of
from secateur.pruners.depth.mka import by_similarity, diffusion_map, neighbour_similarities
from secateur.pruners.export.cut import CutModel
from secateur.pruners.export.stock import stock_model
from secateur.pruners.models.discover import dissect
from secateur.pruners.structure.pruning import prune_structure
from secateur.spaces.architecture.candidate import Kept
from secateur.spaces.methods import DEPTH_REPAIRS
from secateur.spaces.recipe.form import completed
from tests.cut_models import MODELS
from tests.cut_models import TOKENS as CUT_TOKENS
from tests.models import random_tokens, small_anatomy
from tests.structures import CONFIGS, TOKENS, build, logits, repaired_blocks

N_BLOCKS = 6
WHOLE = ModelStatistics(N_BLOCKS, {})
QUICK = Fitting(steps=12, windows=3, learning_rate=2e-3)
MERGING = [name for name, row in DEPTH_REPAIRS.items() if name != "none" and not row.trains]


@pytest.fixture(scope="module")
def anatomy():
    config = deepcopy(CONFIGS["llama-biased"])
    config.num_hidden_layers = N_BLOCKS
    return dissect(build(config))


@pytest.fixture
def live(anatomy):
    """The shared model, dense again afterwards."""
    before = [block_tensors(block) for block in anatomy.blocks]
    yield anatomy
    for block, tensors in zip(anatomy.blocks, before, strict=True):
        point_block(block, tensors)


def copies(model):
    return {name: parameter.clone() for name, parameter in model.named_parameters()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def repair_live(anatomy, *args):
    """Point the merge targets of the live model to their new parameters; the indices of these blocks."""
    found = repaired_blocks(anatomy, *args)
    for index, tensors in found.items():
        point_block(anatomy.blocks[index], tensors)
    return frozenset(found)


# --- runs and merge targets ---


def test_consecutive_blocks_have_one_merge_target():
    assert runs_of([], 6) == ()
    assert runs_of([5, 2, 3], 6) == (DroppedRun(1, (2, 3)), DroppedRun(4, (5,)))
    assert runs_of([2, 3], 6)[0].end == 4


@pytest.mark.parametrize("dropped", [[0], [0, 1], [6], [-1], [2, 2]])
def test_blocks_that_cannot_be_dropped(anatomy, dropped):
    with pytest.raises(ValueError, match="Expected `dropped` to be different blocks from 1 to 5"):
        repaired_blocks(anatomy, dropped, "laco", TOKENS)


def test_an_unknown_repair_is_named():
    with pytest.raises(ValueError, match=r"`repair` to be one of none, laco, .* got 'lako'"):
        completed({"unit": "blocks", "sparsity": 0.3, "metric": "last", "repair": "lako"})


@pytest.mark.parametrize("repair", DEPTH_REPAIRS)
def test_a_repair_gives_merge_targets_new_tensors_of_the_same_shapes(live, repair):
    before = copies(live.model)
    stored = {index: block_tensors(live.blocks[index]) for index in range(N_BLOCKS)}
    changed = repair_live(live, [2, 3, 5], repair, TOKENS, QUICK)
    assert changed == (frozenset() if repair == "none" else {1, 4})
    for index, tensors in stored.items():
        now = block_tensors(live.blocks[index])
        assert all(now[name].shape == x.shape and now[name].dtype == x.dtype for name, x in tensors.items())
        assert same(now, tensors) == (index not in changed)
        point_block(live.blocks[index], tensors)
    assert same(copies(live.model), before)  # nothing was written to
    assert not any(parameter.requires_grad for parameter in live.model.parameters())


@pytest.mark.parametrize("repair", [*MERGING, "streamline"])
def test_a_merge_target_depends_on_its_run_alone(anatomy, repair):
    alone = repaired_blocks(anatomy, [2, 3], repair, TOKENS, QUICK)
    beside = repaired_blocks(anatomy, [5, 3, 2], repair, TOKENS, QUICK)
    assert alone.keys() == {1}
    assert beside.keys() == {1, 4}
    assert same(alone[1], beside[1])
    assert repaired_blocks(anatomy, [], repair, TOKENS, QUICK) == {}


# --- merging ---


@pytest.mark.parametrize("repair", MERGING)
def test_merging_equal_blocks_changes_nothing(repair):
    anatomy = small_anatomy(n_layers=4)
    for block in anatomy.blocks:
        point_block(block, block_tensors(anatomy.blocks[0]))
    found = repaired_blocks(anatomy, [1, 2, 3], repair, random_tokens(3, 16))
    for name, theta in block_tensors(anatomy.blocks[0]).items():
        assert torch.allclose(found[0][name], theta, atol=1e-6)


def test_laco_adds_up_differences_to_the_merge_target(anatomy):
    theta = [block_tensors(block) for block in anatomy.blocks]
    one, three = (repaired_blocks(anatomy, dropped, "laco", TOKENS)[1] for dropped in ([2], [2, 3, 4]))
    for name, first in theta[1].items():
        assert torch.equal(one[name], theta[2][name])  # norms and biases too
        wanted = first + sum(theta[i][name] - first for i in (2, 3, 4))
        assert torch.allclose(three[name], wanted, atol=1e-5)
        telescoped = first.clone()
        for i in (2, 3, 4):  # as released: the difference to what is merged so far
            telescoped += theta[i][name] - telescoped
        assert torch.allclose(telescoped, theta[4][name], atol=1e-5)
        assert not torch.allclose(three[name], telescoped, atol=1e-2)


def test_mka_averages_by_similarity(anatomy):
    similarities = neighbour_similarities(anatomy, TOKENS)
    theta = [block_tensors(block) for block in anatomy.blocks]
    found = repaired_blocks(anatomy, [2, 3], "mka", TOKENS)[1]
    first, second = (1 / (1 + math.exp(-similarities[i])) for i in (2, 3))
    for name, x in found.items():
        wanted = first * theta[1][name] + (1 - first) * theta[2][name]
        wanted = second * wanted + (1 - second) * theta[3][name]
        assert torch.allclose(x, wanted, atol=1e-6)


def test_blocks_of_other_shapes_are_not_merged(live):
    live.blocks[3].linears[-1].point_to(torch.zeros(32, 40))
    with pytest.raises(
        ValueError, match=r"same shapes to merge, got others than those of model\.layers\.1 at"
    ):
        repaired_blocks(live, [2, 3], "laco", TOKENS)


@pytest.mark.parametrize("family", ["opt", "gpt2", "phi3", "gemma2", "gpt_neox"])
@pytest.mark.parametrize("repair", [*MERGING, "streamline"])
def test_other_families(family, repair):
    anatomy = dissect(build(CONFIGS[family]))
    dense = logits(anatomy.model)
    assert repair_live(anatomy, [1], repair, TOKENS, QUICK) == {0}
    assert not torch.allclose(logits(anatomy.model), dense)


@pytest.mark.parametrize("repair", ["laco", "streamline"])
def test_a_model_with_merge_targets_is_one_of_fewer_ordinary_blocks(repair):
    anatomy = dissect(MODELS["llama"]().eval().requires_grad_(False))
    kept = [Kept(4, 48), Kept(4, 48), Kept(0, 0), Kept(4, 48)]
    repair_live(anatomy, [2], repair, CUT_TOKENS, QUICK)
    target = block_tensors(anatomy.blocks[1])
    prune_structure(anatomy, kept, importance="magnitude", repair="none", tokens=CUT_TOKENS, sequential=False)
    content, weights = stock_model(CutModel(anatomy, kept))
    saved = LlamaForCausalLM(LlamaConfig(**content)).eval().requires_grad_(False)
    missing, extra = saved.load_state_dict(weights, strict=False)
    assert not extra
    assert set(missing) <= {"lm_head.weight"}  # tied
    assert same(block_tensors(dissect(saved).blocks[1]), target)
    assert torch.allclose(logits(saved, CUT_TOKENS), logits(anatomy.model, CUT_TOKENS), atol=1e-5)


# --- similarity ---


def test_diffusion_finds_the_two_ends_of_a_path():
    along = torch.linspace(0, 1, 40)
    shuffled = along[torch.randperm(40, generator=torch.Generator().manual_seed(0))]
    mode = diffusion_map(torch.stack([shuffled, 3 * shuffled], 1))[:, 0]
    ranks = mode.argsort().argsort().double()
    wanted = shuffled.argsort().argsort().double()
    assert abs(float(torch.corrcoef(torch.stack([ranks, wanted]))[0, 1])) > 0.99


def test_similarity_ranks_blocks():
    """A block that does nothing is as similar to the one before as can be; MKA drops it first."""
    anatomy = small_anatomy(n_layers=4)
    for linear in anatomy.blocks[2].linears:
        linear.point_to(torch.zeros_like(linear.weight))
    tokens = random_tokens(20, 16)
    similarities = neighbour_similarities(anatomy, tokens)
    assert similarities[2] == pytest.approx(1.0)
    assert all(0 <= x < 0.9 for i, x in enumerate(similarities) if i != 2)
    scores = by_similarity(anatomy, tokens, WHOLE)
    assert min(range(4), key=scores.__getitem__) == 2
    assert scores[0] == math.inf


# --- LaCo's choice ---


def test_laco_accepts_what_keeps_the_last_hidden_states():
    """Blocks that do next to nothing are taken over, from the top down, by what is merged into them."""
    anatomy = small_anatomy(n_layers=N_BLOCKS)
    idle = {name: 1e-3 * x for name, x in block_tensors(anatomy.blocks[2]).items()}
    for index in (2, 3, 4):
        point_block(anatomy.blocks[index], idle)
    before = copies(anatomy.model)
    scores = by_acceptance(anatomy, random_tokens(3, 16), WHOLE)
    assert [scores[index] for index in (5, 4, 3)] == [0, 1, 2]
    assert sorted(scores) == [0, 1, 2, 3, 4, math.inf]
    assert scores[0] == math.inf
    assert same(copies(anatomy.model), before)
