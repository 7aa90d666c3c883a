"""PAT: its formulas against slow readable forms, and the narrow model that its training leaves."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from secateur.pruners.export.cut import CutModel
from secateur.pruners.export.stock import stock_model
from secateur.pruners.learned import pat as module
from secateur.pruners.learned.channel_mask import FROZEN, ChannelMask
from secateur.pruners.learned.pat import (
    PruningAwareTuning,
    Sparsifier,
    check,
    module_rank,
    pat,
)
from secateur.pruners.learned.target_shape import hidden_width
from secateur.pruners.learned.training import MaskTrainer
from secateur.pruners.models.cutting import Piece
from secateur.pruners.models.discover import dissect
from secateur.pruners.models.find_layout import find_layouts
from secateur.pruners.models.losses import ce_loss
from secateur.pruners.models.narrow import LiveStream
from secateur.pruners.recipes.allocation.layers import BudgetError
from secateur.pruners.recipes.plan import LiveBlock
from secateur.pruners.recipes.units import plan_units
from secateur.search import app
from secateur.search.app.recipe_file import open_recipe
from secateur.spaces.recipe.form import completed
from tests.families import make
from tests.models import random_tokens, small_anatomy, small_llama
from tests.recipe_contexts import CALIBRATION, small_context
from tests.structures import CONFIGS, build

TOKENS = random_tokens(4, 24)
CPU = torch.device("cpu")


def test_gates_are_those_of_the_slow_form():
    mask = ChannelMask(3, 2, 50, CPU)
    assert mask.gates(0).tolist() == pytest.approx([1.0] * 3), "nothing is masked at first"
    values = [0.4, -0.02, -0.5]
    with torch.no_grad():
        mask.values.copy_(torch.tensor(values))
    for step in (1, 10, 30, 40, 90):
        at = min(step, 40)  # four fifths of 50
        temperature = 1 / (1 - math.log(at) / math.log(50) + 1e-6)
        expected = [
            1 / (1 + math.exp(min(-temperature * m, 10.0))) + max(0.5 - step / 50, 0.0) for m in values
        ]
        gates = mask.gates(step)
        assert gates.tolist() == pytest.approx(expected, rel=1e-5)
        assert gates.requires_grad == (step < FROZEN * 50)


def test_the_penalty_and_its_gradient_by_hand():
    mask = ChannelMask(4, 2, 50, CPU)
    assert float(mask.penalty.detach()) == pytest.approx(10 * 2 / 2 + 0.25), "all four are chosen at 0"
    values = [0.3, 0.0, 0.7, -0.1]
    with torch.no_grad():
        mask.values.copy_(torch.tensor(values))
    expected = 10 * (3 - 2) / 2 + (0.2**2 + 0.2**2) / 2 + (0.5**2 + 0.4**2) / 2
    assert float(mask.penalty.detach()) == pytest.approx(expected)
    (slope,) = torch.autograd.grad(mask.penalty, mask.values)
    assert slope.tolist() == pytest.approx([5 - 0.2, 5 + 0.5, 5 + 0.2, 5 + 0.4], rel=1e-5)
    assert mask.kept == (0, 2)


def test_a_module_begins_as_the_identity_and_is_merged_into_what_is_before_it():
    one = Sparsifier("x", 8, CPU)
    x, gates = torch.randn(2, 3, 8), torch.rand(8)
    assert torch.equal(one.outputs(x, torch.ones(8)), x)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, tensor in one.trained:
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    matrix = torch.diag(one.scale) @ (torch.eye(8) + one.left @ one.right)
    assert torch.allclose(one.outputs(x, gates), (x @ matrix.T) * gates, atol=1e-5)
    weight = torch.randn(8, 5, generator=generator)
    assert torch.allclose(one.merged(weight), matrix @ weight, atol=1e-5)
    rank = one.right.shape[0]
    gram = (one.right @ one.right.T).tolist()
    squares = [(gram[i][j] - (i == j)) ** 2 for i in range(rank) for j in range(rank)]
    assert float(one.identity_loss.detach()) == pytest.approx(sum(squares) / len(squares), rel=1e-5)
    assert (module_rank(4096), module_rank(2048), module_rank(8)) == (200, 100, 1)


def narrowed(anatomy, layouts, chosen):
    """Logits of the live model with these weights and channels."""
    stream = LiveStream(anatomy)
    live = [LiveBlock(layout.block, layout) for layout in layouts]
    for block, layout, kept in zip(live, layouts, chosen.numbers, strict=True):
        for part in layout.sublayers:
            pieces = {x.linear.name: Piece(chosen.weights[x.linear.name], None) for x in part.placements}
            block.sublayers[part.kind].cut(len(kept[part.kind]), pieces)
    for index in range(len(layouts) + 1):
        stream.narrow_block(index, chosen.narrow)
    with torch.no_grad():
        found = anatomy.model(input_ids=TOKENS).logits
    for block in live:
        for part in block.sublayers.values():
            part.restore()
    stream.restore()
    return found


@pytest.mark.parametrize("tied", [False, True])
def test_the_merged_narrow_model_is_the_tuned_one_with_gates_of_0_and_1(tied, monkeypatch):
    """And the stock class with its weights is the same model."""
    monkeypatch.setattr(module, "FEWEST_STEPS", 40)
    held, train = [], PruningAwareTuning.train
    monkeypatch.setattr(
        PruningAwareTuning, "train", lambda self, state: (held.append(self), train(self, state))
    )
    anatomy = dissect(small_llama(n_layers=2, tie_word_embeddings=tied))
    layouts = find_layouts(anatomy)
    chosen = pat(anatomy, layouts, TOKENS, 0.25)
    (tuning,) = held
    assert (tuning.first is None) == tied
    hard = torch.zeros(anatomy.width).index_fill(0, torch.tensor(chosen.narrow.channels), 1.0)
    seen = []
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(tuning.mask, "gates", lambda step: hard)
        patch.setattr(
            module,
            "ce_loss",
            lambda x, rows: (seen.append(x.model(input_ids=TOKENS).logits), torch.zeros(()))[1],
        )
        tuning.loss(0)
    dense = anatomy.model(input_ids=TOKENS).logits
    live = narrowed(anatomy, layouts, chosen)
    assert (live - seen[0]).abs().max() < 5e-4
    assert (live - dense).abs().max() > 0.1
    assert torch.equal(anatomy.model(input_ids=TOKENS).logits, dense)
    for name, weight in chosen.weights.items():  # of the merged weights
        anatomy.model.get_parameter(f"{name}.weight").data.copy_(weight)
    content, weights = stock_model(CutModel(anatomy, [x.whole for x in anatomy.blocks], narrow=chosen.narrow))
    content.pop("architectures")
    stock = type(anatomy.model)(type(anatomy.model.config)(**content)).eval()
    stock.load_state_dict(weights, strict=False)
    stock.tie_weights()
    with torch.no_grad():
        assert torch.allclose(stock(input_ids=TOKENS).logits, live, atol=1e-4)
    assert stock.config.hidden_size == 24


def test_values_of_the_mask_go_to_their_ends_and_the_number_to_the_width(monkeypatch):
    held, train = [], PruningAwareTuning.train
    monkeypatch.setattr(
        PruningAwareTuning, "train", lambda self, state: (held.append(self), train(self, state))
    )
    anatomy = small_anatomy(n_layers=2)
    pat(anatomy, find_layouts(anatomy), TOKENS, 0.25)
    values = held[0].mask.values.detach()
    assert abs(int((values >= 0).sum()) - 24) <= 2
    assert 0.1 < values.abs().min() <= values.abs().max() < 0.6


def test_the_mask_has_the_gradient_of_the_loss_through_all_layers():
    """Against differences of the loss; where the mask is frozen the loss moves it no more."""
    anatomy = small_anatomy(n_layers=2, tie_word_embeddings=False)
    parts = [part for layout in find_layouts(anatomy) for part in layout.sublayers]
    tuning = PruningAwareTuning(anatomy, TOKENS, parts, 24)
    values = 0.3 * torch.randn(32, generator=torch.Generator().manual_seed(1))

    def loss(step, values):
        tuning.mask.values.data.copy_(values)
        return tuning.loss(step) - tuning.mask.penalty

    (slope,) = torch.autograd.grad(loss(20, values), tuning.mask.values)
    for channel in (0, 7, 31):
        change = 1e-2 * torch.nn.functional.one_hot(torch.tensor(channel), 32)
        with torch.no_grad():
            expected = float(loss(20, values + change) - loss(20, values - change)) / 2e-2
        assert float(slope[channel]) == pytest.approx(expected, rel=0.02, abs=1e-4)
    assert slope.abs().max() > 1e-3
    (slope,) = torch.autograd.grad(loss(60, values), tuning.mask.values)
    assert slope.abs().max() < 1e-6


def test_more_steps_lower_the_loss_on_what_it_trains_on(tmp_path, monkeypatch):
    losses = {}
    for steps in (2, 200):
        monkeypatch.setattr(module, "FEWEST_STEPS", steps)
        monkeypatch.setattr(module, "PASSES", 1)
        context = small_context(tmp_path / str(steps), 3)
        form = {"unit": "structure", "sparsity": 0.25, "calibration": CALIBRATION, "metric": "pat"}
        config = completed(form | {"allocation": "global"})
        plan = plan_units(context, config)
        stream = LiveStream(context.anatomy)
        for block, layout in zip(context.anatomy.blocks, context.layouts, strict=True):
            plan.change(LiveBlock(block, layout))
        for index in range(len(context.layouts) + 1):
            stream.narrow_block(index, plan.narrow)
        with torch.no_grad():
            losses[steps] = float(ce_loss(context.anatomy, context.sample(config["calibration"]).tokens))
    assert losses[200] < losses[2] - 0.1


def test_the_width_is_the_nearest_that_the_stock_class_holds():
    anatomy = small_anatomy(n_layers=2)  # four heads: multiples of four
    assert [hidden_width(anatomy, x) for x in (0.13, 0.25, 0.27, 0.5)] == [28, 24, 24, 16]
    with pytest.raises(
        BudgetError, match="Expected a sparsity that a stock class holds with about 30 hidden"
    ):
        hidden_width(anatomy, 0.06)


def test_what_can_t_be_merged_is_refused_before_anything_is_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(MaskTrainer, "run", None)
    context = replace(small_context(tmp_path, 2), protect=["*.o_proj"])
    form = {"unit": "structure", "sparsity": 0.25, "calibration": CALIBRATION, "metric": "pat"}
    config = completed(form | {"allocation": "global"})
    with pytest.raises(ValueError, match=r"Expected no `protect` with the metric pat, .* got \*\.o_proj"):
        plan_units(context, config)
    with pytest.raises(ValueError, match="Expected output projections without a bias for the metric pat"):
        check(dissect(make("gpt2")))
    with pytest.raises(ValueError, match=r"Expected RMS norms alone for the metric pat, .* got another at"):
        check(dissect(make("cohere")))
    check(dissect(build(CONFIGS["gemma2"])))


@pytest.mark.usefixtures("forked_reload")
def test_a_recipe_ends_in_a_narrower_stock_model(tmp_path, monkeypatch):
    """The export compares what is loaded with the live model by itself."""
    monkeypatch.setattr(module, "FEWEST_STEPS", 20)
    file = tmp_path / "recipe.yaml"
    recipe = {
        "unit": "structure",
        "sparsity": 0.3,
        "calibration": {"sources": {"calibration": 1}, "samples": 4, "length": 32},
        "metric": "pat",
        "allocation": "global",
    }
    file.write_text(yaml.safe_dump({"recipe": recipe, "sources": {"calibration": "docs"}}))
    app.prune(open_recipe(str(file)), "tiny", tmp_path / "out", tokens=128, window=64)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert config["hidden_size"] == again.get_input_embeddings().embedding_dim
    assert config["hidden_size"] == pytest.approx(0.7 * 128, abs=2)
    assert config["num_hidden_layers"] == 6
