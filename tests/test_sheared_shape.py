"""Sheared LLaMA with gates of blocks and hidden channels: shapes, training, and what is cut and saved at the end."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from secateur.evaluators.session import Session
from secateur.pruners.export.cut import CutModel
from secateur.pruners.export.manifest import MANIFEST
from secateur.pruners.export.stock import stock_model
from secateur.pruners.learned import sheared as module
from secateur.pruners.learned.gated_model import BLOCKS, HIDDEN, GatedModel
from secateur.pruners.learned.sheared import sheared
from secateur.pruners.learned.target_shape import TargetShape, uniform_shape, whole_shape
from secateur.pruners.learned.training import MaskTrainer
from secateur.pruners.models.cutting import Piece
from secateur.pruners.models.discover import dissect
from secateur.pruners.models.find_layout import find_layouts
from secateur.pruners.models.losses import ce_loss
from secateur.pruners.models.narrow import LiveStream, Narrow
from secateur.pruners.recipes.allocation.layers import BudgetError
from secateur.pruners.recipes.plan import LiveBlock
from secateur.pruners.recipes.units import plan_units
from secateur.search import app
from secateur.search.app.recipe_file import open_recipe
from secateur.search.app.session import plan
from secateur.search.settings.settings import settings_from
from secateur.spaces.measurement import Fidelity
from secateur.spaces.recipe.form import completed
from tests.models import random_tokens, small_anatomy, small_llama
from tests.recipe_contexts import CALIBRATION, small_context
from tests.structures import CONFIGS, build

TOKENS = random_tokens(4, 24)
FORM = {"unit": "structure", "sparsity": 0.6, "calibration": CALIBRATION, "allocation": "global"}
SHAPED = {"name": "sheared", "blocks": 0.3, "hidden": 0.35}


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(module, "FEWEST_STEPS", 30)


def kept_params(anatomy, shape):
    """Parameters of the blocks' projections that stay, by hand, norms left out."""
    width = shape.width or anatomy.width
    total = 0
    for layout in find_layouts(anatomy)[: shape.n_blocks]:
        for part in layout.sublayers:
            matrices = {"attention": (2 * part.heads_per_group + 2) * part.head_dim, "mlp": 3}[part.kind]
            total += shape.units[part.name] * matrices * width
    return total


@pytest.mark.parametrize(
    ("sparsity", "blocks", "hidden"),
    [(0.5, 0.5, 0.0), (0.6, 0.0, 0.5), (0.6, 0.3, 0.35), (0.8, 1 / 6, 5 / 12)],
)
def test_the_shape_has_the_powers_of_the_kept_share_and_meets_the_budget(sparsity, blocks, hidden):
    anatomy = small_anatomy(n_layers=4)
    layouts = find_layouts(anatomy)
    shape = whole_shape(anatomy, layouts, sparsity, blocks=blocks, hidden=hidden)
    kept = 1 - sparsity
    assert shape.n_blocks == max(1, round(4 * kept**blocks))
    assert (shape.width or 32) == min(range(8, 33, 8), key=lambda width: abs(width - 32 * kept**hidden))
    dense = kept_params(anatomy, TargetShape({p.name: p.n_units for x in layouts for p in x.sublayers}, 4))
    assert kept_params(anatomy, shape) / dense == pytest.approx(kept, abs=0.02)
    assert len({shape.units[layout.mlp.name] for layout in layouts}) == 1


def test_published_shapes_are_those_of_these_powers():
    """LLaMA 2 7B: 32 blocks, 4,096 hidden channels, 11,008 channels; Table 8 of the paper."""
    for kept, blocks, hidden, wanted in (
        (0.625 * 0.628, 0.0, 0.5, (32, 2560, 6912)),
        (0.75 * 0.5 * 0.5, 1 / 6, 5 / 12, (24, 2048, 5504)),
    ):
        found = 32 * kept**blocks, 4096 * kept**hidden, 11008 * kept ** (1 - blocks - hidden)
        assert found == pytest.approx(wanted, rel=0.015)


def test_gates_of_one_leave_the_model_as_it_is_and_gates_of_zero_are_the_cut_model():
    anatomy = small_anatomy(n_layers=3)
    layouts = find_layouts(anatomy)
    shape = whole_shape(anatomy, layouts, 0.6, blocks=0.3, hidden=0.35)
    model = GatedModel(anatomy, layouts, shape, 0)
    with torch.no_grad():
        dense = anatomy.model(input_ids=TOKENS).logits
        values = {name: torch.ones(gates.n_units) for name, gates in model.gates.items()}
        with model.computing(values):
            assert torch.allclose(anatomy.model(input_ids=TOKENS).logits, dense, atol=1e-5)
        for gates in model.gates.values():
            gates.log_alpha.uniform_(0, 2)
        values = {}
        for name, gates in model.gates.items():
            values[name] = torch.zeros(gates.n_units).index_copy(
                0, torch.tensor(gates.kept), gates.final[list(gates.kept)]
            )
        with model.computing(values):
            gated = anatomy.model(input_ids=TOKENS).logits
        chosen = model.chosen()
        assert torch.equal(anatomy.model(input_ids=TOKENS).logits, dense), "left as it was"
    assert len(chosen.narrow.channels) == shape.width
    assert [bool(kept["mlp"]) for kept in chosen.numbers].count(True) == shape.n_blocks
    assert chosen.numbers[0]["attention"]
    assert (gated - dense).abs().max() > 1e-3
    live, stream = [LiveBlock(layout.block, layout) for layout in layouts], LiveStream(anatomy)
    for block, kept in zip(live, chosen.numbers, strict=True):
        if not kept["mlp"]:
            block.drop()
            continue
        for part in block.sublayers.values():
            layout = part._layout
            names = {x.linear.name for x in layout.placements}
            pieces = {name: Piece(chosen.weights[name], None) for name in names}
            part.cut(len(kept[layout.kind]), pieces)
    for index in range(len(layouts) + 1):
        stream.narrow_block(index, chosen.narrow)
    with torch.no_grad():
        assert torch.allclose(anatomy.model(input_ids=TOKENS).logits, gated, atol=1e-5)


def test_gates_have_gradients_and_the_lagrangian_draws_them_to_their_targets():
    anatomy = small_anatomy(n_layers=3)
    layouts = find_layouts(anatomy)
    shape = whole_shape(anatomy, layouts, 0.6, blocks=0.3, hidden=0.35)
    model = GatedModel(anatomy, layouts, shape, 0)
    with torch.no_grad():
        for gates in model.gates.values():
            gates.log_alpha.fill_(0.0)
    with model.computing(model.sampled(torch.Generator().manual_seed(0))):
        ce_loss(anatomy, TOKENS).backward()
    for name in (BLOCKS, HIDDEN):
        slope = model.gates[name].log_alpha.grad
        assert float(slope.abs().max()) > 0
    assert model.gates[HIDDEN].n_units == 32
    assert model.gates[BLOCKS].n_units == 2


def test_the_lowest_loss_is_of_the_trained_shape(tmp_path, monkeypatch):
    """On the calibration windows: below the same shape without training."""
    losses = {}
    for steps in (1, 150):
        monkeypatch.setattr(module, "FEWEST_STEPS", steps)
        monkeypatch.setattr(module, "PASSES", 0)
        context = small_context(tmp_path / str(steps), 4)
        plan = plan_units(context, completed(FORM | {"metric": SHAPED}))
        tokens = context.sample(completed(FORM | {"metric": SHAPED})["calibration"]).tokens
        stream = LiveStream(context.anatomy)
        for block, layout in zip(context.anatomy.blocks, context.layouts, strict=True):
            plan.change(LiveBlock(block, layout))
        for index in range(len(context.layouts) + 1):
            stream.narrow_block(index, plan.narrow)
        with torch.no_grad():
            losses[steps] = float(ce_loss(context.anatomy, tokens))
    assert losses[150] < losses[1] - 0.02


def test_it_goes_on_after_a_kill(tmp_path, monkeypatch):
    monkeypatch.setattr(MaskTrainer, "SAVE_SECONDS", 0.0)
    config = completed(FORM | {"metric": SHAPED})

    def planned(directory):
        return plan_units(small_context(directory, 3), config)

    whole = planned(tmp_path / "whole")
    loss, taken = module.Shearing.loss, []

    def killed(self, step):
        taken.append(step)
        if len(taken) == 12:
            raise KeyboardInterrupt
        return loss(self, step)

    monkeypatch.setattr(module.Shearing, "loss", killed)
    with pytest.raises(KeyboardInterrupt):
        planned(tmp_path / "killed")
    again = planned(tmp_path / "killed")
    assert taken == [*range(12), *range(11, 30)]
    assert again.numbers == whole.numbers
    assert again.narrow.channels == whole.narrow.channels
    assert torch.equal(again.narrow.gates, whole.narrow.gates)
    assert all(torch.equal(again.outputs[name], weight) for name, weight in whole.outputs.items())


def test_costs_are_those_of_the_narrow_model(tmp_path):
    context = small_context(tmp_path, 4)
    plan = plan_units(context, completed(FORM | {"metric": SHAPED}))
    assert plan.costs["sparsity"] == pytest.approx(0.6, abs=0.03)
    shape = whole_shape(context.anatomy, context.layouts, 0.6, blocks=0.3, hidden=0.35)
    outside = plan.costs["params"] - kept_params(context.anatomy, shape)
    vocabulary = context.anatomy.embedding.weight.shape[0]
    tied = context.anatomy.head.weight is context.anatomy.embedding.weight
    assert outside == (vocabulary * (1 if tied else 2) + 1 + 2 * shape.n_blocks) * shape.width


def test_keys_tell_shapes_apart_and_plain_shapes_are_as_before(tmp_path):
    context = small_context(tmp_path, 3)
    plain = plan_units(context, completed(FORM | {"metric": "sheared"}))
    shaped = plan_units(context, completed(FORM | {"metric": SHAPED}))
    assert plain.narrow is None
    assert not set(plain.keys) & set(shaped.keys)
    assert uniform_shape(context.layouts, 0.6, ()).width == 0
    assert completed(FORM | {"metric": "sheared"})["metric"] == {"name": "sheared"}
    assert completed(FORM | {"metric": SHAPED})["metric"] == SHAPED


@pytest.mark.parametrize(
    ("metric", "said"),
    [
        ({"blocks": 0.7, "hidden": 0.5}, "that sum to at most 1 for the metric sheared, got 0.7 and 0.5"),
        ({"blocks": 2}, r"`metric.blocks` within \[0, 1\], got 2"),
    ],
)
def test_wrong_powers_are_refused(tmp_path, metric, said):
    with pytest.raises(ValueError, match=said):
        plan_units(small_context(tmp_path, 2), completed(FORM | {"metric": {"name": "sheared", **metric}}))


@pytest.mark.parametrize(("sparsity", "blocks"), [(0.4, 1.0), (0.99, 0.0)])
def test_a_shape_that_does_not_come_near_to_the_sparsity_is_refused(sparsity, blocks):
    anatomy = small_anatomy(n_layers=4)
    with pytest.raises(
        BudgetError, match=rf"Expected a sparsity within \[.*\] for . blocks, .* got {sparsity}\."
    ):
        whole_shape(
            anatomy, find_layouts(anatomy), sparsity, blocks=blocks, hidden=0.1 if not blocks else 0.0
        )


def test_keys_of_sheared_are_not_those_of_others():
    with pytest.raises(ValueError, match=r"`metric\.hidden` only where it applies"):
        completed(FORM | {"metric": {"name": "flap", "hidden": 0.5}, "allocation": "uniform"})


def test_what_can_t_lose_them_is_refused_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MaskTrainer", None)
    context = replace(small_context(tmp_path, 2), protect=["*.o_proj"])
    for name in ("blocks", "hidden"):
        config = completed(FORM | {"metric": {"name": "sheared", name: 0.5}})
        with pytest.raises(ValueError, match=f"Expected no `protect` with `{name}` of the metric sheared"):
            plan_units(context, config)
    gemma = dissect(build(CONFIGS["gemma2"]))
    with pytest.raises(ValueError, match="outputs of its projections to the stream as they are for gates of"):
        sheared(gemma, find_layouts(gemma), TOKENS, 0.5, hidden=0.5)
    opt = dissect(build(CONFIGS["opt"]))
    with pytest.raises(ValueError, match="Expected output projections without a bias for gates of blocks"):
        sheared(opt, find_layouts(opt), TOKENS, 0.5, blocks=0.5)


@pytest.mark.parametrize("tied", [False, True])
def test_gates_are_in_the_saved_embedding_and_norms(tied):
    model = small_llama(n_layers=2, tie_word_embeddings=tied)
    anatomy = dissect(model)
    channels = tuple(range(3, 27))
    narrow = Narrow(channels, {}, torch.linspace(0.5, 1.0, len(channels)))
    stream = LiveStream(anatomy)
    for index in range(3):
        stream.narrow_block(index, narrow)
    with torch.no_grad():
        live = model(input_ids=TOKENS).logits
    content, weights = stock_model(CutModel(anatomy, [x.whole for x in anatomy.blocks], narrow=narrow))
    content.pop("architectures")
    stock = type(model)(type(model.config)(**content)).eval()
    stock.load_state_dict(weights, strict=False)
    stock.tie_weights()
    with torch.no_grad():
        assert torch.allclose(stock(input_ids=TOKENS).logits, live, atol=1e-4)
    stream.restore()
    with torch.no_grad():
        assert (model(input_ids=TOKENS).logits - live).abs().max() > 0.1


RECIPE = {
    "unit": "structure",
    "sparsity": 0.7,
    "calibration": {"sources": {"calibration": 1}, "samples": 4, "length": 32},
    "metric": {"name": "sheared", "blocks": 0.17, "hidden": 0.41},
    "allocation": "global",
}


@pytest.mark.usefixtures("forked_reload")
def test_a_recipe_ends_in_a_smaller_stock_model(tmp_path):
    """The export compares what is loaded with the live model by itself."""
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({"recipe": RECIPE, "sources": {"calibration": "docs"}}))
    app.prune(open_recipe(str(file)), "tiny", tmp_path / "out", tokens=128, window=64)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert config["hidden_size"] == again.get_input_embeddings().embedding_dim < 128
    assert config["num_hidden_layers"] == len(again.model.layers) < 6
    assert len({layer.mlp.down_proj.in_features for layer in again.model.layers}) == 1
    assert manifest["indices"]["hidden"]["channels"]
    assert sum(p.numel() for p in again.parameters()) == manifest["parameters"]["saved"]


def test_a_search_measures_what_is_pruned_for_good(tmp_path):
    space = {
        "kind": "recipe",
        "unit": "structure",
        "target": 0.6,
        "start": "sheared_1_3b",
        "known": ["sheared_2_7b"],
        "search": ["calibration"],
        "samples": [4],
        "length": [32],
        "choose": ["random"],
        "pool_tokens": 2048,
    }
    evaluator = {"window": 64, "calibration_tokens": 64, "fidelities": [128], "test_tokens": 128}
    settings = settings_from(
        {
            "space": space,
            "evaluator": evaluator,
            "controller": {"kind": "random"},
            "budget": {"evaluations": 3},
        }
    )
    session = Session(plan(settings))
    session.build_levels(tmp_path / "levels")
    evaluator = session.evaluator(tmp_path / "levels")
    known = session.space.baselines()
    texts = [known[name].text for name in ("sheared_1_3b@0.6", "dense", "sheared_2_7b@0.6", "dense")]
    found = evaluator.evaluate(texts, Fidelity("search", 128))
    assert [x.values["kl"] for x in (found[1], found[3])] == pytest.approx([0.0, 0.0], abs=1e-6)
    assert found[0].values["sparsity"] == pytest.approx(0.6, abs=0.03)
    assert found[2].values["params"] < found[1].values["params"]
    fresh = Session(plan(settings))
    data = fresh.data()
    data.of(Fidelity("search", 128))
    fresh.pruner.prune(fresh.space.config(known["sheared_1_3b@0.6"]), sequential=False)
    live = data.live_losses(Fidelity("search", 128))
    assert live == {name: pytest.approx(found[0].values[name], rel=1e-4) for name in live}
