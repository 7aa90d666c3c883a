"""BlockPruner and FinerCut: sub-layers in the order of the slow form, and plans that remove them whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from secateur.pruners.recipes.allocation.allocate import allocate
from secateur.pruners.recipes.allocation.layers import Layer, RuleEvidence
from secateur.pruners.recipes.allocation.sublayers import by_divergence, by_loss
from secateur.pruners.recipes.units import plan_units
from secateur.spaces.recipe.form import completed
from secateur.spaces.recipe.known import KNOWN
from tests.recipe_contexts import CALIBRATION, small_context
from tests.structures import logits


@pytest.fixture(scope="module")
def context(tmp_path_factory):
    return small_context(tmp_path_factory.mktemp("statistics"), n_layers=3)


@pytest.fixture(scope="module")
def sample(context):
    return context.sample(CALIBRATION | {"choose": "random", "subset": 0})


def without(context, gone, tokens):
    """Logits with the output projections of these sub-layers at zero: the slow form of a removal."""
    parts = [part for layout in context.layouts for part in layout.sublayers]
    before = [parts[index].output.weight.clone() for index in gone]
    for index in gone:
        parts[index].output.weight.zero_()
    found = logits(context.anatomy.model, tokens)
    for index, weight in zip(gone, before, strict=True):
        parts[index].output.weight.copy_(weight)
    return found


def loss(given, dense, tokens):
    return torch.nn.functional.cross_entropy(given[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def divergence(given, dense, tokens):
    one, other = given.double().softmax(-1), dense.double().softmax(-1)
    middle = ((one + other) / 2).log()
    return ((one * (one.log() - middle)).sum(-1) + (other * (other.log() - middle)).sum(-1)).mean() / 2


@pytest.mark.parametrize(("measure", "distance"), [(by_loss, loss), (by_divergence, divergence)])
def test_the_order_is_greedy(context, sample, measure, distance):
    dense, gone = logits(context.anatomy.model, sample.tokens), []
    places = measure(context.anatomy, sample, sparsity=0.5)
    found = sorted((i for i in range(6) if np.isfinite(places[i])), key=places.__getitem__)
    for _ in found:
        left = {*range(6)} - {*gone}
        gone.append(
            min(
                left,
                key=lambda i: float(
                    distance(without(context, [*gone, i], sample.tokens), dense, sample.tokens)
                ),
            )
        )
    assert found == gone
    assert 2 <= len(found) < 6
    assert torch.equal(logits(context.anatomy.model, sample.tokens), dense)


@pytest.mark.parametrize("name", ["blockpruner", "finercut"])
def test_sublayers_go_whole_and_the_last_one_in_part(context, name):
    form = {"unit": "structure", "sparsity": 0.4, "calibration": CALIBRATION, **KNOWN[name].form}
    plan = plan_units(context, completed(form))
    shares = [
        len(kept[part.kind]) / part.n_units
        for layout, kept in zip(context.layouts, plan.numbers, strict=True)
        for part in layout.sublayers
    ]
    assert sum(share == 0 for share in shares) >= 1
    assert sum(0 < share < 1 for share in shares) <= 2  # the next one, and the first attention's last group
    assert plan.costs["sparsity"] == pytest.approx(0.4, abs=0.02)


def test_golden_places():
    layers = [
        Layer(0, "attention", 10, 4),
        Layer(0, "mlp", 2, 30),
        Layer(1, "attention", 10, 4),
        Layer(1, "mlp", 2, 30),
    ]
    evidence = RuleEvidence(measured=(np.inf, 1.0, np.inf, 0.0))
    assert allocate("blockpruner", layers, evidence, 0.4) == (0, 10, 0, 30)
    assert allocate("finercut", layers, evidence, 0.2) == (0, 0, 0, 20)
    with pytest.raises(ValueError, match=r"Expected `sparsity` <= 0\.6"):
        allocate("blockpruner", layers, evidence, 0.7)
    with pytest.raises(ValueError, match="no `schedule` with the rule blockpruner"):
        completed(
            {"unit": "structure", "sparsity": 0.2, "allocation": "blockpruner", "schedule": {"step": 0.1}}
        )
