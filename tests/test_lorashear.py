"""LoRAShear: its formulas against slow readable forms, its choice of crucial sub-layers, and its fading."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from secateur.pruners.learned import lorashear as module
from secateur.pruners.learned.lorashear import crucial_sublayers, lorashear, proxies, saliency
from secateur.pruners.learned.low_rank import LowRank, TunedSublayer
from secateur.pruners.models.find_layout import find_layouts
from secateur.pruners.models.losses import ce_loss
from tests.models import random_tokens, small_anatomy

TOKENS = random_tokens(4, 24)


def sublayers_of(anatomy, deviation=0.05):
    """Sub-layers whose updates are not zero."""
    found = [TunedSublayer(part, 4, 0) for x in find_layouts(anatomy) for part in x.sublayers]
    generator = torch.Generator().manual_seed(0)
    for one in found:
        for update in one.updates.values():
            update.left.data.normal_(0, deviation, generator=generator)
    return found


def rows_of(one, unit):
    """Weights and updates of a unit's rows: of gate and up, or of q, k and v."""
    weights, updates = [], []
    for placement in one.part.placements:
        if placement.axis == 0:
            update, size = one.updates[placement.linear.name], placement.parts[0]
            rows = slice(unit * size, (unit + 1) * size)
            weights += placement.linear.weight[rows].flatten().tolist()
            updates += (update.left.detach() @ update.right.detach())[rows].flatten().tolist()
    return weights, updates


@pytest.mark.parametrize("kind", ["attention", "mlp"])
def test_the_proxies_by_loops(kind):
    (one,) = [x for x in sublayers_of(small_anatomy(n_layers=1)) if x.part.kind == kind]
    found = proxies(one)
    for unit in (0, one.part.n_units - 1):
        weights, updates = rows_of(one, unit)
        inner = sum(w * u for w, u in zip(weights, updates, strict=True))
        lengths = [math.sqrt(sum(x * x for x in values)) for values in (weights, updates)]
        expected = {
            "magnitude": lengths[0],
            "cosine": 1 + inner / lengths[0] / lengths[1],
            "taylor_1": abs(inner),
            "taylor_2": inner * inner / 2,
        }
        assert {name: float(x[unit]) for name, x in found.items()} == pytest.approx(expected, rel=1e-3)


def test_the_saliency_is_a_mean_of_proxies_over_their_norms():
    found = [
        {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([1.0, 2.0])},
        {"a": torch.tensor([4.0]), "b": torch.tensor([2.0])},
    ]
    first, second = saliency(found)
    assert first.tolist() == pytest.approx([(3 / 5 + 1 / 3) / 2, (0 + 2 / 3) / 2])
    assert second.tolist() == pytest.approx([(4 / 5 + 2 / 3) / 2])


def test_factors_are_of_the_frozen_rows_and_bias_alone():
    linear = next(small_anatomy(attention_bias=True).linears)
    linear.bias.normal_(generator=torch.Generator().manual_seed(1))
    update = LowRank(linear, 4, seed=0)
    update.left.data.normal_(generator=torch.Generator().manual_seed(2))
    x = torch.randn(3, linear.in_features, generator=torch.Generator().manual_seed(3))
    factors = torch.rand(linear.out_features, generator=torch.Generator().manual_seed(4))
    weight = linear.weight * factors[:, None] + 2 * update.left @ update.right
    assert torch.allclose(update.outputs(x, factors), F.linear(x, weight, linear.bias * factors), atol=1e-5)


def test_crucial_are_the_sublayers_without_whose_smallest_units_the_loss_is_highest(monkeypatch):
    monkeypatch.setattr(module, "CRUCIAL", 0.25)
    anatomy = small_anatomy(n_layers=2)
    sublayers = [TunedSublayer(part, 4, 0) for x in find_layouts(anatomy) for part in x.sublayers]
    losses = []
    for one in sublayers:
        total = 0.0
        for ratio in module.RATIOS:
            norms = [sum(w * w for w in rows_of(one, unit)[0]) for unit in range(one.part.n_units)]
            smallest = sorted(range(len(norms)), key=lambda unit: norms[unit])[: int(ratio * len(norms))]
            output, dense = one.part.output, one.part.output.weight.clone()
            width = one.part.unit_width
            changed = dense.clone()
            for unit in smallest:
                changed[:, unit * width : (unit + 1) * width] = 0
            output.module.weight.data = changed
            with torch.no_grad():
                total += float(ce_loss(anatomy, TOKENS))
            output.module.weight.data = dense
        losses.append(total)
    worst = max(range(4), key=lambda index: losses[index])
    assert crucial_sublayers(anatomy, TOKENS, sublayers) == [sublayers[worst]]


def faded(anatomy, monkeypatch, steps, sparsity=0.3):
    """The factors of all units after each step, and the result."""
    monkeypatch.setattr(module, "FEWEST_STEPS", steps)
    course, settle = [], module.Fading.settle

    def noted(self, step):
        settle(self, step)
        course.append({name: x.clone() for name, x in self.factors.items()})
        for one in self.free:
            for x in one.part.placements:
                if x.axis == 0:
                    gone = x.per_entry(self.factors[one.part.name]) == 0
                    assert not one.updates[x.linear.name].left[gone].any()

    monkeypatch.setattr(module.Fading, "settle", noted)
    units, weights = lorashear(anatomy, find_layouts(anatomy), TOKENS, sparsity)
    return course, units, weights


def test_units_fade_along_a_line_over_a_period_and_stay_gone(monkeypatch):
    course, units, _ = faded(
        small_anatomy(n_layers=2), monkeypatch, 57
    )  # 6 steps, 10 periods of 5, a last step
    for name in course[0]:
        values = torch.stack([x[name] for x in course])  # step unit
        assert (values[:6] == 1).all()
        assert (values.diff(dim=0) <= 0).all()
        for period in range(10):
            before, during = values[5 + 5 * period], values[6 + 5 * period : 11 + 5 * period]
            fading = (before == 1) & (during[-1] == 0)
            assert torch.allclose(
                during[:, fading],
                torch.tensor([[0.8], [0.6], [0.4], [0.2], [0.0]]).expand(5, int(fading.sum())),
            )
            assert (during[:, ~fading] == before[~fading]).all()
        block, kind = (
            int(name.split("layers.")[1][0]),
            "mlp" if "MLP" in name or "mlp" in name else "attention",
        )
        assert tuple((values[-1] == 1).nonzero().flatten().tolist()) == units[block][kind]


def test_the_budget_comes_nearer_by_equal_parts(monkeypatch):
    anatomy = small_anatomy(n_layers=3)
    course, _, _ = faded(anatomy, monkeypatch, 111)  # 11 steps, 10 periods of 10
    parts = {x.name: x for layout in find_layouts(anatomy) for x in layout.sublayers}
    total = sum(x.n_units * x.unit_params + x.fixed_params for x in parts.values())
    for period in range(1, 11):
        gone = sum(
            int((x == 0).sum()) * parts[name].unit_params for name, x in course[10 + 10 * period].items()
        )
        assert gone / total == pytest.approx(0.03 * period, abs=0.012)


def test_a_crucial_sublayer_is_whole_and_tuned(monkeypatch):
    anatomy = small_anatomy(n_layers=3)
    chosen, find = [], module.crucial_sublayers
    monkeypatch.setattr(
        module, "crucial_sublayers", lambda *given: (chosen.extend(find(*given)), list(chosen))[1]
    )
    monkeypatch.setattr(module, "FEWEST_STEPS", 30)
    units, weights = lorashear(anatomy, find_layouts(anatomy), TOKENS, 0.4)
    (part,) = [one.part for one in chosen]  # a tenth of six
    assert len(units[part.output.block][part.kind]) == part.n_units
    assert not torch.equal(weights[part.output.name], part.output.weight)
