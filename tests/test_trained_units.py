"""Methods that train while units go, every row of the table: budgets, seeds, kills, bad input."""

from __future__ import annotations

import math
import sys
from dataclasses import replace

import pytest
import torch

from secateur.pruners.learned.target_shape import REACH
from secateur.pruners.learned.training import DivergedError, MaskTrainer
from secateur.pruners.models import memory
from secateur.pruners.models.discover import dissect
from secateur.pruners.models.find_layout import find_layouts
from secateur.pruners.models.losses import ce_loss
from secateur.pruners.models.narrow import LiveStream
from secateur.pruners.models.shape import model_shape
from secateur.pruners.recipes.allocation.layers import BudgetError
from secateur.pruners.recipes.plan import LiveBlock
from secateur.pruners.recipes.units import plan_units
from secateur.spaces.methods import UNIT_RECONSTRUCTIONS
from secateur.spaces.recipe.form import completed
from tests.families import make
from tests.mixtures import make_mixture
from tests.models import random_tokens, small_anatomy
from tests.recipe_contexts import CALIBRATION, small_context

TOKENS = random_tokens(4, 24)
ROWS = {name: row for name, row in UNIT_RECONSTRUCTIONS.items() if row.trains}
NARROW = {"pat"}
"""Rows that keep all units and take hidden channels, the same through all layers."""

of_units = pytest.mark.parametrize("row", sorted({*ROWS} - NARROW), indirect=True)


@pytest.fixture(params=sorted(ROWS))
def row(request, monkeypatch):
    found = ROWS[request.param]
    monkeypatch.setattr(module_of(found), "FEWEST_STEPS", 30)
    return found


def module_of(row):
    return sys.modules[row.function.__module__]


def run(row, anatomy, sparsity=0.2, **further):
    return row.function(anatomy, find_layouts(anatomy), TOKENS, sparsity, **further)[
        :2
    ]  # and hidden channels


def gone_share(anatomy, chosen):
    """Share of the parameters of all units that is gone, by hand."""
    units, _, narrow = (*chosen, None)[:3]
    parts = [part for layout in find_layouts(anatomy) for part in layout.sublayers]
    gone = sum((x.n_units - len(units[x.output.block][x.kind])) * x.unit_params for x in parts)
    share = gone / sum(x.n_units * x.unit_params + x.fixed_params for x in parts)
    width = anatomy.width if narrow is None else len(narrow.channels)
    return 1 - (1 - share) * width / anatomy.width


def pruned(directory, row, sparsity=0.3):
    """Plan of the recipe, and logits of the model that it leaves."""
    form = {"unit": "structure", "sparsity": sparsity, "calibration": CALIBRATION, "metric": row.name}
    context = small_context(directory, 3)
    plan = plan_units(context, completed(form | {"allocation": "global"}))
    for block, layout in zip(context.anatomy.blocks, context.layouts, strict=True):
        plan.change(LiveBlock(block, layout))
    if plan.narrow is not None:
        stream = LiveStream(context.anatomy)
        for index in range(len(context.layouts) + 1):
            stream.narrow_block(index, plan.narrow)
    with torch.no_grad():
        return plan, context.anatomy.model(input_ids=TOKENS).logits


def test_the_budget_is_met_and_the_live_model_is_left_dense(row):
    anatomy = small_anatomy(n_layers=3)
    before = [(x.weight, x.weight.clone()) for x in anatomy.linears]
    chosen = row.function(anatomy, find_layouts(anatomy), TOKENS, 0.25)
    units, weights = chosen[:2]
    parts = [part for layout in find_layouts(anatomy) for part in layout.sublayers]
    assert gone_share(anatomy, chosen) == pytest.approx(0.25, abs=0.01)
    for x, (same, values) in zip(anatomy.linears, before, strict=True):
        assert x.weight.data_ptr() == same.data_ptr()
        assert torch.equal(x.weight, values)
    for part in parts:
        kept = units[part.output.block][part.kind]
        assert list(kept) == sorted(set(kept))
        if kept and part.output.name in weights:
            assert weights[part.output.name].shape[1] == len(kept) * part.unit_width


def test_equal_seeds_give_equal_weights_whatever_the_global_generator(row):
    torch.manual_seed(1)
    units, weights = run(row, small_anatomy(n_layers=3))
    torch.manual_seed(2)
    same, again = run(row, small_anatomy(n_layers=3))
    assert units == same
    assert set(weights) == set(again)
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_a_recipe_goes_on_after_a_kill(row, tmp_path, monkeypatch):
    monkeypatch.setattr(MaskTrainer, "SAVE_SECONDS", 0.0)
    plan, whole = pruned(tmp_path / "whole", row)
    reach = REACH if plan.narrow is not None else 0.01  # stock classes hold few widths of so small a model
    assert plan.costs["sparsity"] == pytest.approx(0.3, abs=reach)
    take, taken = MaskTrainer.take_step, []

    def killed(self):
        taken.append(self.step)
        if len(taken) == 22:
            raise KeyboardInterrupt
        take(self)

    monkeypatch.setattr(MaskTrainer, "take_step", killed)
    with pytest.raises(KeyboardInterrupt):
        pruned(tmp_path / "killed", row)
    again, found = pruned(tmp_path / "killed", row)
    assert taken == [*range(22), *range(21, 30)]
    assert again.numbers == plan.numbers
    assert torch.equal(found, whole)
    assert again.keys == plan.keys
    pruned(tmp_path / "killed", row)  # trained before: no step is taken
    assert len(taken) == 31


@of_units
def test_protected_sublayers_are_whole(row):
    anatomy = small_anatomy(n_layers=3)
    names = [x.name for x in anatomy.blocks[0].linears]
    units, _ = run(row, anatomy, protected=names)
    assert (len(units[0]["attention"]), len(units[0]["mlp"])) == (2, 48)
    assert any(len(block["mlp"]) < 48 for block in units[1:])


@of_units
def test_more_than_may_go_is_infeasible(row):
    anatomy = small_anatomy(n_layers=2)
    names = [x.name for block in anatomy.blocks for x in block.linears]
    with pytest.raises(BudgetError):
        run(row, anatomy, 0.5, protected=names)


@of_units
def test_a_transposed_fused_family_is_served(row):
    anatomy = dissect(make("gpt2"))
    units, weights = run(row, anatomy)
    assert any(
        len(block["mlp"]) < layout.mlp.n_units
        for block, layout in zip(units, find_layouts(anatomy), strict=True)
    )
    for layout, block in zip(find_layouts(anatomy), units, strict=True):
        for part in layout.sublayers:
            for x in part.placements:
                if x.linear.name in weights and block[part.kind]:
                    assert weights[x.linear.name].shape[x.axis] == x.size(len(block[part.kind]))


@of_units
@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "deepseek_v3"])
def test_a_mixture_keeps_its_routed_experts(row, name, tmp_path):
    """Attentions and shared experts lose units, of all of these about the share that is asked for."""
    model = make_mixture(name)
    anatomy = dissect(model)
    row.check(anatomy, **row.values({}))
    context = replace(small_context(tmp_path, 1), anatomy=anatomy, shape=model_shape(anatomy, 8, 4))
    with torch.no_grad():
        dense = model(input_ids=TOKENS).logits
    form = {"unit": "structure", "sparsity": 0.25, "calibration": CALIBRATION, "metric": row.name}
    plan = plan_units(context, completed(form | {"allocation": "global"}))
    assert plan.costs["sparsity"] == pytest.approx(0.25, abs=0.03)
    live = [LiveBlock(block, x) for block, x in zip(anatomy.blocks, context.layouts, strict=True)]
    for one in live:
        plan.change(one)
    for block, layout, kept in zip(anatomy.blocks, context.layouts, plan.numbers, strict=True):
        if block.mixture is not None:
            assert list(block.mixture.experts.kept) == list(range(6))
        for part in layout.sublayers:
            for x in part.placements:
                if kept[part.kind] and x.linear.name in plan.outputs:
                    assert torch.equal(x.linear.weight, plan.outputs[x.linear.name])
    with torch.no_grad():
        assert (model(input_ids=TOKENS).logits - dense).abs().max() > 1e-3
    for one in live:
        one.restore()
    with torch.no_grad():
        assert torch.equal(model(input_ids=TOKENS).logits, dense)


@pytest.mark.parametrize(
    ("name", "values"), [("pat", {}), ("sheared", {"hidden": 0.5}), ("sheared", {"blocks": 0.5})]
)
def test_what_goes_through_all_layers_is_refused_for_a_mixture(name, values):
    with pytest.raises(ValueError, match="Expected blocks of one attention and one MLP"):
        ROWS[name].check(dissect(make_mixture("mixtral")), **values)


def test_it_is_refused_before_anything_is_trained(row, monkeypatch):
    monkeypatch.setattr(MaskTrainer, "run", None)
    monkeypatch.setattr(memory, "available_bytes", lambda device: 10)
    with pytest.raises(ValueError, match=f"GB of memory for the training of the metric {row.name}"):
        run(row, small_anatomy())


def test_a_training_that_diverges_is_one_line(row, monkeypatch):
    monkeypatch.setattr(module_of(row), "ce_loss", lambda anatomy, *of: ce_loss(anatomy, *of) * math.inf)
    with pytest.raises(
        DivergedError, match=rf"finite losses of .* of the metric {row.name}, .* step 0 of 30"
    ):
        run(row, small_anatomy(n_layers=2))
