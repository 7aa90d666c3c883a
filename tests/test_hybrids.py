"""Hybrids and mixtures in recipes of structure and blocks, and in the space of architectures."""

from __future__ import annotations

import warnings
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from secateur.pruners.calibration.cache import StatisticsCache
from secateur.pruners.calibration.pool import build_pools
from secateur.pruners.export.capability import check_capability
from secateur.pruners.export.cut import CutModel
from secateur.pruners.export.export import check_structured
from secateur.pruners.export.stock import stock_channels
from secateur.pruners.models.discover import dissect
from secateur.pruners.models.shape import model_shape
from secateur.pruners.pruner import DenseModel, InfeasibleError
from secateur.pruners.recipes.context import RecipeContext
from secateur.pruners.recipes.pruner import RecipePruner
from secateur.pruners.recipes.schedule import silenced, whole_numbers
from secateur.pruners.structure.masks import MaskPruner
from secateur.pruners.structure.method import StructureMethod
from secateur.pruners.structure.pruning import prune_structure
from secateur.pruners.structure.store import StructureKey, StructureStore, build_structure
from secateur.spaces.architecture.cost import cost
from secateur.spaces.architecture.levels import LevelRules
from secateur.spaces.architecture.settings import ArchitectureSettings
from secateur.spaces.architecture.space import ArchitectureSpace
from secateur.spaces.architecture.tied import TiedSpace
from secateur.spaces.recipe.form import completed
from secateur.spaces.recipe.known import KNOWN
from tests.cut_models import small_tokenizer
from tests.families import make, some_of_each
from tests.family_configs import VOCABULARY
from tests.models import random_tokens

CALIBRATION = {"sources": {"calibration": 1}, "samples": 4, "length": 32}
TOKENS = random_tokens(2, 24, seed=7, vocab_size=VOCABULARY)
MODELS = (
    *("bamba", "falcon_h1", "jamba", "qwen3_next", "deepseek_v2", "minicpm3", "olmo2"),
    *("granitemoehybrid", "nemotron_h", "mamba", "bloom", "bitnet", "xlstm"),
)
"""Recurrent and attention blocks, both in parallel, with experts, with latent attention; heads that are no units.

And blocks of one mixer; modules that add the stream, channels that are no units, mixers that give their states.
"""

REFUSED = {
    "kprune": {
        "falcon_h1": "got another sum at model.layers.0",  # two mixers
        "qwen3_next": "got another sum at model.layers.0",  # a gate of the shared expert
        "olmo2": "got another sum at model.layers.0",
        "minicpm3": "got another sum at model.layers.0",
        "mamba": r"Expected `sparsity` <= 0\.0000",
        "bitnet": r"Expected `sparsity` <= 0\.0000",
        "xlstm": "got 128 for 133 at backbone.blocks.0.ffn.proj_down",
    },
    **dict.fromkeys(
        ("flap", "wanda_sp", "llm_pruner_first", "ziplm"),
        dict.fromkeys(("mamba", "bitnet"), r"Expected `sparsity` <= 0\.0000"),
    ),
    "blockpruner": {  # what can go are halves, one of which stays; mixtures that are nearly half of all each
        "mamba": r"Expected `sparsity` <= 0\.0000",
        "granitemoehybrid": r"Expected `sparsity` <= 0\.0347",
    },
}
"""Recipes that a model does not have, with what is said."""


@pytest.fixture(scope="module", params=MODELS)
def family(request):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return request.param, make(request.param)


def logits(model):
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False).logits


def pruner_of(model, directory, unit):
    anatomy = dissect(model)
    tokens = random_tokens(1, 512, seed=5, vocab_size=VOCABULARY)[0]
    pools = build_pools(anatomy, {"calibration": tokens}, look=False)
    cache, shape = StatisticsCache(directory, 1 << 40), model_shape(anatomy, 8, 4)
    context = RecipeContext(anatomy, "toy", pools, cache, shape, seed=0, dampening=0.01)
    pruner = RecipePruner(SimpleNamespace(unit=unit), DenseModel(anatomy, "toy", shape))
    pruner.use(context)
    return pruner


def form_of(name, sparsity):
    row = KNOWN[name]
    return completed({"unit": row.unit, "sparsity": sparsity, "calibration": CALIBRATION, **row.form})


@pytest.mark.parametrize("name", ["flap", "wanda_sp", "llm_pruner_first", "ziplm", "blockpruner", "kprune"])
def test_recipes_of_structure_cut_what_can_be_cut(family, name, tmp_path):
    """The same by reference and for good; nothing rigid or routed is touched, and the share is met."""
    kind, model = family
    pruner = pruner_of(model, tmp_path, "structure")
    layouts = pruner.context.layouts
    form, dense = form_of(name, 0.2), logits(model)
    said = REFUSED.get(name, {}).get(kind)
    if said:
        with pytest.raises(InfeasibleError, match=said) as caught:
            pruner.plan(form)
        assert "\n" not in str(caught.value)
        return
    plan = pruner.plan(form)
    for layout, kept in zip(layouts, plan.kept, strict=True):
        if layout.attention and layout.attention.rigid:
            assert kept.kv_groups in (0, layout.attention.n_units)
        if layout.block.mixture:
            assert kept.ffn in (layout.mlp.n_units, 0 if name == "blockpruner" else None)
    largest = 0.16 if name == "blockpruner" else 0.08  # half of a whole attention with its parallel mixer
    assert plan.costs["sparsity"] == pytest.approx(0.2, abs=largest)
    assert plan.costs["params"] < pruner.dense.shape.n_params
    for index, key in enumerate(pruner.keys(form)):
        pruner.apply(index, key)
    pruned = logits(model)
    assert not torch.allclose(pruned, dense)
    n_params = sum(p.numel() for p in model.parameters())
    pruner.restore()
    assert torch.equal(logits(model), dense)
    assert n_params == plan.costs["params"], "exact, with biases that repairs add"


@pytest.mark.parametrize("name", ["shortgpt", "sleb"])
def test_recipes_of_blocks_drop_them_with_all_that_is_in_them(family, name, tmp_path):
    """Also in rounds: what is measured again is the model without the blocks that went before."""
    _, model = family
    pruner = pruner_of(model, tmp_path, "blocks")
    form, dense = form_of(name, 0.5), logits(model)
    plan = pruner.plan(form)
    gone = [index for index, kept in enumerate(plan.kept) if not any(kept.units)]
    assert 0 not in gone
    assert gone
    for index, key in enumerate(pruner.keys(form)):
        pruner.apply(index, key)
    without = logits(model)
    pruner.restore()
    assert torch.equal(logits(model), dense)
    layouts = pruner.context.layouts
    with silenced(layouts, whole_numbers(layouts), gone):
        assert torch.allclose(logits(model), without, atol=1e-5 * float(dense.abs().max()))
    assert torch.equal(logits(model), dense)


def test_levels_of_a_store_equal_the_cut_for_good(family, tmp_path):
    """Of hybrids, too; and costs are those of the cut model."""
    name, _ = family
    model = make(name)
    anatomy, shape = dissect(model), model_shape(dissect(model), 8, 4)
    kept = some_of_each(anatomy)
    experts = "reap" if any(block.experts for block in shape.blocks) else ""
    heads = any(of.queries for of in kept)
    method = StructureMethod("wanda_sp", ("none",), experts=experts, heads=heads)
    key = StructureKey("m", "float32", "c", method, (), ())
    dense = logits(model)
    build_structure(tmp_path / "store", anatomy, TOKENS, key)
    store = StructureStore(tmp_path / "store", anatomy)
    plain = [0 if block.experts else block.ffn_width for block in shape.blocks]
    assert [len(of) for of in store.scores.attention] == [block.n_kv_groups for block in shape.blocks]
    assert [len(of) for of in store.scores.mlp] == plain, "scores by block, of what is there"
    for index, of in enumerate(kept):
        store.cut(index, of)
    by_reference = logits(model)
    store.restore()
    assert torch.equal(logits(model), dense)
    prune_structure(anatomy, kept, importance="wanda_sp", repair="none", tokens=TOKENS, sequential=False)
    assert torch.allclose(logits(model), by_reference, atol=1e-5 * float(dense.abs().max()))
    weights = CutModel(anatomy, kept).weights()
    n_tied = sum(x.numel() for x in [model.lm_head.weight] if x is model.get_input_embeddings().weight)
    assert cost(shape, kept)["params"] == sum(x.numel() for x in weights.values()) - n_tied * (
        "lm_head.weight" in weights
    )


ONE_WIDTH = {
    "jamba": " beside whole experts .* both have one width",
    "bloom": " for channels .* their number follows the hidden width",
    "xlstm": " for channels .* their number follows the hidden width",
}
"""Families whose configs have no number of channels of their own, with what is said."""

TIED = {"jamba": 0.1544, "deepseek_v2": 0.2372}
"""Shares that few experts come near to."""


def test_stock_classes_with_one_width_of_mlps_and_experts_are_refused_with_channels(family):
    name, model = family
    anatomy = dissect(model)
    space = ArchitectureSettings(kind="architecture", target=0.2, target_format="hf-stock", repair="none")
    assert stock_channels(anatomy) == (name not in ONE_WIDTH)
    if name in ONE_WIDTH:
        with pytest.raises(ValueError, match=f"holds fewer channels of MLPs{ONE_WIDTH[name]}"):
            check_capability(space, anatomy)
    else:
        check_capability(space, anatomy)


def test_tied_blocks_of_a_kind_have_equal_numbers_and_stock_classes_load_them(family):
    """Dense first blocks and mixtures, recurrent and attention blocks: each kind has numbers of its own."""
    name, model = family
    anatomy = dissect(model)
    shape, target = model_shape(anatomy, 8, 4), TIED.get(name, 0.2)
    rules = LevelRules(frozenset({"channels", "experts"}), n_steps=12)
    if name in ("mamba", "bitnet"):  # no MLP, or channels that depend on each other
        with pytest.raises(ValueError, match=r"to 0 \(what equal blocks can lose of their params"):
            TiedSpace(shape, rules, (target,))
        return
    space = TiedSpace(shape, rules, (target,))
    rng = np.random.default_rng(0)
    candidates = [space.uniform(0), *(space.sample(rng, 0) for _ in range(5))]
    for candidate in candidates:
        by_kind = {}
        for block, kept in zip(shape.blocks, candidate.blocks, strict=True):
            assert kept.kv_groups == block.n_kv_groups
            if block.ffn_width:
                by_kind.setdefault(block.experts is not None, set()).add(kept.ffn)
        assert all(len(numbers) == 1 for numbers in by_kind.values())
        assert space.parse(candidate.text) == candidate
        assert space.from_parameters(space.to_parameters(candidate), 0, rng) == candidate
        check_structured(
            anatomy, small_tokenizer(), candidate.blocks, "hf" if name in ONE_WIDTH else "hf-stock"
        )
    assert candidates[0].blocks != space.dense.blocks


UNITS = {
    "mamba": ({"attention"}, {"blocks"}),
    "nemotron_h": ({"attention", "mlp"}, {"blocks"}, {"groups", "channels", "experts", "attention"}),
    "bitnet": ({"attention", "mlp", "channels"}, {"blocks"}),
    "granitemoehybrid": ({"experts", "attention", "mlp", "blocks"},),
}
"""Units of spaces of models whose blocks have one mixer, or channels or heads that are no units."""


@pytest.mark.parametrize(("name", "units"), [(name, units) for name in UNITS for units in UNITS[name]])
def test_spaces_of_blocks_of_one_mixer(name, units):
    """What is not there is never counted nor changed; whole blocks go; the dense numbers are met again by the text."""
    shape = model_shape(dissect(make(name)), 8, 4)
    rng = np.random.default_rng(0)
    target = 0.5 if name == "mamba" else 0.3 if units == {"blocks"} else 0.2
    space = ArchitectureSpace(shape, LevelRules(frozenset(units), n_steps=6), (target,))
    candidates = [space.uniform(0), *(space.sample(rng, 0) for _ in range(8))]
    candidates += [space.mutate(candidate, rng) for candidate in candidates]
    for candidate in candidates:
        assert space.parse(candidate.text) == candidate
        assert space.target_of(candidate) == 0
        assert space.disassemble(space.assemble(space.disassemble(candidate))) == space.disassemble(candidate)
        for block, kept in zip(shape.blocks, candidate.blocks, strict=True):
            assert kept.kv_groups <= block.n_kv_groups
            assert kept.ffn <= block.ffn_width
            if block.rigid_ffn:
                assert kept.ffn in (0, block.ffn_width)
        portable = space.portable(candidate, ())["blocks"]
        assert all(float(Fraction(row["ffn"])) <= 1 for row in portable)
    assert len({candidate.text for candidate in candidates}) > (0 if name in ("mamba", "bitnet") else 1)
    assert space.dense not in candidates


def test_spaces_and_tables_of_single_units_are_refused_where_attention_has_none(family):
    name, model = family
    said = {
        "bamba": "the recurrent of model.layers.0, which has no units",
        "falcon_h1": "which a recurrent mixer is parallel to",
        "olmo2": "which has no units",
    }.get(name)
    if said:
        with pytest.raises(ValueError, match=rf"for the space masks, got .*({said})"):
            MaskPruner.check_model(SimpleNamespace(importance="magnitude"), dissect(model))
