"""K-prune: knowledge of units by hand, the choice from the first sub-layer up, and the weights of its tuning."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from secateur.pruners.models.cutting import LiveSublayer
from secateur.pruners.models.find_layout import find_layouts
from secateur.pruners.structure import knowledge as kprune_search
from secateur.pruners.structure.knowledge import Teacher, knowledge, kprune
from secateur.pruners.structure.kprune import reconstructed
from secateur.pruners.structure.reorder import cut_pieces
from secateur.spaces.recipe.form import completed
from tests.models import random_tokens, small_anatomy
from tests.structures import logits

TOKENS = random_tokens(12, 24)


@pytest.fixture(scope="module")
def anatomy():
    return small_anatomy(n_layers=3)


@pytest.fixture(scope="module")
def layouts(anatomy):
    return find_layouts(anatomy)


def test_knowledge_by_hand(anatomy, layouts):
    """Masks on the columns of output projections, differentiated, in a model whose first MLP is cut."""
    dense = [logits(anatomy.model, window[None])[0] for window in TOKENS]
    teacher = Teacher(anatomy, TOKENS)
    parts = [part for layout in layouts for part in layout.sublayers][2:]
    live = LiveSublayer(layouts[0].mlp)
    live.cut(20, cut_pieces(layouts[0].mlp, tuple(range(20))))
    found = knowledge(teacher, parts)
    for part, scores in zip(parts, found, strict=True):
        weight = part.output.weight
        predictive, representational = torch.zeros(2, weight.shape[1])
        for window, expected in zip(TOKENS, dense, strict=True):
            mask, seen = torch.ones(weight.shape[1], requires_grad=True), []

            def masked(module, args, mask=mask, seen=seen):
                seen.append(args[0].detach()[0])
                return (args[0] * mask,)

            hook = part.output.module.register_forward_pre_hook(masked)
            with torch.enable_grad():
                given = anatomy.model(window[None], use_cache=False).logits[0]
                loss = 4 * F.kl_div(
                    (given / 2).log_softmax(-1), (expected / 2).softmax(-1), reduction="batchmean"
                )
                loss.backward()
            hook.remove()
            predictive += mask.grad.square() / 2 / len(TOKENS)
            representational += seen[0].square().mean(0) * weight.square().mean(0) / len(TOKENS)
        total = (predictive + 2.5e-4 * representational).reshape(part.n_units, -1).mean(1) / part.unit_params
        total *= 64 * part.heads_per_group if part.kind == "attention" else 1
        assert torch.allclose(scores, total, rtol=1e-3, atol=1e-6 * float(total.max()))
        assert predictive.max() > 0
    live.restore()


def test_the_dense_model_has_nothing_to_predict_better(anatomy, layouts):
    parts = [part for layout in layouts for part in layout.sublayers]
    found = knowledge(Teacher(anatomy, TOKENS), parts)
    inputs = []
    hook = parts[1].output.module.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    logits(anatomy.model, TOKENS)
    hook.remove()
    alone = inputs[0].square().mean((0, 1)) * parts[1].output.weight.square().mean(0)
    assert torch.allclose(found[1], 2.5e-4 * alone / parts[1].unit_params, rtol=1e-3)


@pytest.mark.parametrize("sparsity", [0.1, 0.4])
def test_the_budget_is_met_and_the_weights_are_those_of_the_tuning(anatomy, layouts, sparsity):
    before = {name: (p.data_ptr(), p.shape) for name, p in anatomy.model.named_parameters()}
    numbers, weights = kprune(anatomy, layouts, TOKENS, sparsity)
    assert {name: (p.data_ptr(), p.shape) for name, p in anatomy.model.named_parameters()} == before
    parts = [
        (part, kept[part.kind]) for x, kept in zip(layouts, numbers, strict=True) for part in x.sublayers
    ]
    total = sum(part.n_units * part.unit_params + part.fixed_params for part, _ in parts)
    gone = sum((part.n_units - len(kept)) * part.unit_params for part, kept in parts)
    gone += sum(part.fixed_params for part, kept in parts if not kept)
    assert abs(gone - sparsity * total) <= max(part.unit_params for part, _ in parts)
    assert numbers[0]["attention"]
    expected = reconstructed(anatomy, layouts, numbers, TOKENS)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in weights)


def test_each_sublayer_is_chosen_in_the_model_that_is_pruned_below_it(anatomy, layouts, monkeypatch):
    asked, real = [], kprune_search.knowledge

    def recorded(teacher, parts):
        asked.append((len(parts), layouts[0].mlp.output.weight.shape[1]))
        return real(teacher, parts)

    monkeypatch.setattr(kprune_search, "knowledge", recorded)
    numbers, _ = kprune(anatomy, layouts, TOKENS, 0.4)
    assert [n for n, _ in asked] == [6, 5, 4, 3, 2, 1]
    assert asked[1][1] == layouts[0].mlp.n_units
    assert {width for _, width in asked[2:]} == {len(numbers[0]["mlp"])} != {layouts[0].mlp.n_units}


def test_what_is_protected_stays(anatomy, layouts):
    protected = [layouts[1].mlp.output.name]
    numbers, weights = kprune(anatomy, layouts, TOKENS, 0.3, protected=protected)
    assert len(numbers[1]["mlp"]) == layouts[1].mlp.n_units
    assert protected[0] not in weights


WRONG = {
    "rule": ({"allocation": "uniform"}, "Expected the rule global and no `schedule` with the metric kprune"),
    "schedule": ({"allocation": "global", "schedule": {"step": 0.1}}, "no `schedule` with the metric kprune"),
    "repair": ({"allocation": "global", "repair": "refit"}, "`repair: none` with the metric kprune"),
    "normalised": ({"allocation": {"rule": "global", "normalise": "max"}}, "defaults of the rule global"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_recipes_are_named(case):
    form, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        completed({"unit": "structure", "sparsity": 0.2, "metric": "kprune", **form})
