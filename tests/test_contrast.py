"""Metrics and terminals over two calibration texts: statistics of the second, what compares both, and refusals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from secateur.evaluators.data.sources import TextError
from secateur.evaluators.data.text import load_contrast, load_sources
from secateur.pruners.calibration import token_damage as damage
from secateur.pruners.calibration.gradients import collect_gradients, gradient_bytes
from secateur.pruners.calibration.input_norms import input_norms, window_norms
from secateur.pruners.calibration.statistics import ModelStatistics
from secateur.pruners.calibration.token_damage import damage_norms, token_damage
from secateur.pruners.calibration.tokens import Calibration
from secateur.pruners.masks import mask
from secateur.pruners.weights import d_pruner
from secateur.pruners.weights.mathneuro import mathneuro, specific
from secateur.pruners.weights.method import LayerProblem, Method
from secateur.pruners.weights.pruner import prune
from secateur.search.app.recipe_file import known_recipe
from secateur.search.errors import UsageError
from secateur.search.settings.settings import identity, resolved, settings_from
from secateur.spaces.formulas.grammar import parse
from secateur.spaces.formulas.metric import needs_contrast
from secateur.spaces.levels import n_zeros
from tests.models import count_zeros, random_tokens, small_anatomy

TOKENS, OTHERS = random_tokens(4, 12), random_tokens(3, 10, seed=1)
KINDS = ("contrast_rms", "contrast_norms", "contrast_window_norms", "regularised")
GENERATOR = torch.Generator()


def inputs_of(anatomy, tokens):
    """What each projection sees, ``windows length in``, in fp64."""
    seen: dict[str, list[torch.Tensor]] = {x.name: [] for x in anatomy.linears}
    hooks = [
        x.module.register_forward_pre_hook(lambda _, args, name=x.name: seen[name].append(args[0].double()))
        for x in anatomy.linears
    ]
    with torch.no_grad():
        for window in tokens:
            anatomy.model(input_ids=window[None])
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(found) for name, found in seen.items()}


def window_gradients(anatomy, tokens):
    """Gradients of each window's loss, in fp64, by the parameter's name."""
    model = anatomy.model.double().requires_grad_(True)
    for window in tokens:
        model.zero_grad()
        logits = model(input_ids=window[None]).logits[0]
        F.cross_entropy(logits[:-1], window[1:]).backward()
        yield {name.removesuffix(".weight"): x.grad.clone() for name, x in model.named_parameters()}


# --- statistics ---


def test_norms_equal_slow_references():
    anatomy = small_anatomy()
    seen = inputs_of(anatomy, TOKENS)
    whole, windows = input_norms(anatomy, TOKENS), window_norms(anatomy, TOKENS)
    for name, rows in seen.items():
        assert torch.allclose(whole[name].double(), rows.square().mean((0, 1)).sqrt(), rtol=1e-4)
        assert torch.allclose(windows[name].double(), rows.square().mean(1).sqrt().mean(0), rtol=1e-4)


def test_statistics_of_the_second_set_are_of_its_tokens_alone():
    anatomy = small_anatomy()
    found = collect_gradients(anatomy, TOKENS, KINDS[:3], contrast=OTHERS)
    alone = collect_gradients(anatomy, OTHERS, ("rms", "window_norms"))
    norms = input_norms(anatomy, OTHERS)
    for linear in anatomy.linears:
        assert torch.equal(found["contrast_rms"][linear.name], alone["rms"][linear.name])
        assert torch.equal(found["contrast_window_norms"][linear.name], alone["window_norms"][linear.name])
        assert torch.equal(found["contrast_norms"][linear.name], norms[linear.name])


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_second_set_is_refused_before_anything_is_computed(kind, monkeypatch):
    monkeypatch.setattr("secateur.pruners.calibration.gradients.check_gradients", None)
    with pytest.raises(ValueError, match=rf"second calibration text for the statistics {kind}, got none"):
        collect_gradients(small_anatomy(), TOKENS, (kind,))
    assert gradient_bytes(small_anatomy(), (kind,), 12) > 0


def test_the_second_set_is_a_part_of_the_identity_of_calibration_data():
    one, two = (Calibration(TOKENS, "t", contrast=x) for x in (OTHERS, OTHERS.flip(0)))
    assert len({one.sha256, two.sha256, Calibration(TOKENS, "t").sha256}) == 3


def test_tokens_weigh_by_the_divergence_of_the_reference(monkeypatch):
    anatomy = small_anatomy()
    dense = anatomy.model(input_ids=TOKENS).logits.log_softmax(-1)
    found = damage_norms(anatomy, TOKENS)
    weights, seen = token_damage(anatomy, TOKENS), inputs_of(anatomy, TOKENS)
    for name, rows in seen.items():
        wanted = (weights[:, :, None].double() * rows.square()).sum((0, 1)) / weights.double().sum()
        assert torch.allclose(found[name].double(), wanted.sqrt(), rtol=1e-4)
    prune(
        anatomy,
        {x.name: damage.SPARSITY for x in anatomy.linears},
        Method("wanda"),
        TOKENS,
        sequential=False,
    )
    pruned = anatomy.model(input_ids=TOKENS).logits.log_softmax(-1)
    divergence = (dense.exp() * (dense - pruned)).sum(-1)
    assert torch.allclose(weights, divergence, atol=1e-5)
    monkeypatch.setattr(damage, "SPARSITY", 0.0)
    even = small_anatomy()
    for name, norm in damage_norms(even, TOKENS).items():
        assert torch.allclose(norm, input_norms(even, TOKENS)[name], rtol=1e-3)


# --- D-Pruner ---


def test_d_pruner_equals_a_slow_reference():
    anatomy = small_anatomy()
    found = collect_gradients(anatomy, TOKENS, ("regularised",), contrast=OTHERS)["regularised"]
    seen, slow = inputs_of(anatomy, OTHERS), {}
    for window in window_gradients(small_anatomy(), TOKENS):
        for linear in anatomy.linears:
            weight, rows = linear.weight.double(), seen[linear.name].flatten(0, 1)
            hessian = 2 * rows.T @ rows / len(OTHERS)
            hessian += 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
            upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
            general = (weight / upper.diagonal()) ** 2
            gradient = window[linear.name]
            gradient = gradient + 0.1 * 2 * 0.03**2 * general * gradient**2 / len(TOKENS)
            effect = gradient * weight
            slow[linear.name] = slow.get(linear.name, 0) + (effect + effect**2 / (2 * len(TOKENS))).abs()
    for name, total in slow.items():
        assert torch.allclose(found[name].double(), total / len(TOKENS), rtol=1e-3, atol=1e-8), name


def test_d_pruner_without_a_regulariser_does_not_look_at_the_general_text(monkeypatch):
    anatomy = small_anatomy()
    monkeypatch.setattr(d_pruner, "LAMBDA", 1e9)
    one, two = (d_pruner.regularised_importance(anatomy, TOKENS, x) for x in (OTHERS, TOKENS))
    assert not any(torch.equal(one[name], two[name]) for name in one)
    monkeypatch.setattr(d_pruner, "LAMBDA", 0.0)
    one, two = (d_pruner.regularised_importance(anatomy, TOKENS, x) for x in (OTHERS, TOKENS))
    assert all(torch.equal(one[name], two[name]) for name in one)


# --- MathNeuro ---


def released_set(task, general, share):
    """True of the weights of the released code: in the first share by one text, and not by the other."""
    n_first = int(task.numel() * share)
    masks = []
    for score in (task, general):
        kept = torch.zeros(score.numel(), dtype=torch.bool)
        kept[score.flatten().topk(n_first)[1]] = True
        masks.append(kept.reshape(score.shape))
    return masks[0] & ~masks[1]


def problem(seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(12, 20, generator=generator)
    norms = {kind: torch.rand(20, generator=generator) for kind in ("window_norms", "contrast_window_norms")}
    inputs = small_inputs(20)
    return LayerProblem(weight, inputs, gradients=norms)


def small_inputs(n_in):
    from secateur.pruners.calibration.statistics import InputStatistics

    return InputStatistics.empty(n_in, gram=False, device=torch.device("cpu"))


@pytest.mark.parametrize("share", [0.01, 0.05, 0.1, 0.15])
def test_mathneuro_zeroes_the_released_set_at_its_size(share):
    layer = problem()
    task, general = (layer.weight.abs() * x for x in layer.gradients.values())
    wanted = released_set(task, general, share)
    assert wanted.any()
    (found,) = mathneuro(layer, [float(wanted.sum()) / wanted.numel()])
    smaller = [released_set(task, general, n / 240).sum() for n in range(int(240 * share))]
    assert max(smaller) < wanted.sum(), "the first share with so many"
    assert torch.equal(found == 0, wanted)


def test_mathneuro_goes_on_by_what_is_not_needed_in_general():
    layer = problem()
    task, general = (layer.weight.abs() * x for x in layer.gradients.values())
    sizes = [int(released_set(task, general, n / 240).sum()) for n in range(241)]
    best = sizes.index(max(sizes))
    largest = released_set(task, general, best / 240)
    (found,) = mathneuro(layer, [0.8])
    gone = found == 0
    assert int(gone.sum()) == n_zeros(0.8, 240) > int(largest.sum())
    assert (gone | ~largest).all()
    others = gone & ~largest
    assert general[others].max() <= general[~gone].min()
    assert specific(torch.tensor([0, 1, 2]), torch.tensor([2, 1, 0]), 1).tolist() == [True, False, False]


# --- terminals ---


def test_terminals_of_the_second_set_and_of_damaged_tokens():
    anatomy = small_anatomy()
    kinds = ("rms", "contrast_rms", "contrast_norms", "damage_norms")
    whole = ModelStatistics(2, collect_gradients(anatomy, TOKENS, kinds, contrast=OTHERS))
    linear = next(anatomy.linears)
    method = Method("f", formula=parse("abs(W) * (X2 + T) + G - G2"))
    assert method.gradients == ("rms", "contrast_rms", "damage_norms", "contrast_norms")
    of = {kind: whole.gradients[kind][linear.name] for kind in kinds}
    norms = of["contrast_norms"] + of["damage_norms"]
    wanted = linear.weight.abs() * norms + of["rms"] - of["contrast_rms"]
    assert torch.allclose(method.scores(linear, None, whole), wanted)
    assert needs_contrast("formula: abs(W) * X2", "weights")
    assert not needs_contrast("formula: abs(W) * T", "weights")
    assert needs_contrast("mathneuro", "weights")
    assert not needs_contrast("wanda", "weights")


@pytest.mark.parametrize("name", ["d_pruner", "mathneuro", "damage_wanda"])
def test_models_are_pruned_by_the_rows_over_two_texts(name):
    anatomy, reference = small_anatomy(), small_anatomy()
    prune(
        anatomy,
        {x.name: 0.4 for x in anatomy.linears},
        Method(name),
        TOKENS,
        sequential=False,
        contrast=OTHERS,
    )
    assert count_zeros(anatomy) == {x.name: n_zeros(0.4, x.n_weights) for x in anatomy.linears}
    if name == "d_pruner":
        score = collect_gradients(reference, TOKENS, ("regularised",), contrast=OTHERS)["regularised"]
        for linear in anatomy.linears:
            kept = mask(score[linear.name], 0.4, comparison="layer")
            assert torch.equal(linear.weight != 0, kept)


# --- texts and settings ---


@pytest.fixture
def texts(tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text("".join(f"{name}: line {i}\n" for i in range(100)))
    return str(tmp_path / "one.txt"), str(tmp_path / "two.txt")


def test_a_contrast_text_that_overlaps_is_refused_by_name(texts):
    one, two = texts
    assert load_contrast(two, one, "docs", "docs").text.startswith("two")
    with pytest.raises(
        TextError, match=r"got `data.contrast: .*one.txt` and `data.calibration: .*one.txt`, which ov"
    ):
        load_contrast(one, one, "docs", "docs")
    with pytest.raises(TextError, match=r"`data.contrast: .*two.txt` and `data.test: .*two.txt\[0.5:1\]`"):
        load_contrast(two, one, "docs", f"{two}[0.5:1]")
    assert load_contrast(f"{one}[0.5:1]", f"{one}[0:0.5]", "docs", "docs").text.startswith("one: line 5")
    with pytest.raises(TextError, match=r"same content in `data.contrast`"):
        load_contrast("docs", "docs", one, two)
    with pytest.raises(
        TextError, match=r"`sources.contrast: .*one.txt` and `sources.calibration: .*one.txt`"
    ):
        load_sources({"calibration": one, "contrast": one}, one, "docs", "docs")
    assert [*load_sources({"calibration": one, "contrast": two}, one, "docs", "docs")] == [
        "calibration",
        "contrast",
    ]


def test_settings_without_a_contrast_text_are_those_of_before():
    plain = settings_from({"model": "tiny"})
    assert "contrast" not in resolved(plain)["evaluator"]["data"]
    given = settings_from({"model": "tiny", "evaluator": {"data": {"contrast": "general.txt"}}})
    assert identity(given)["evaluator"]["data"]["contrast"] == "general.txt"
    as_text = {"model": "tiny", "evaluator": {"data": {"contrast": "general.log", "format": "text"}}}
    assert settings_from(as_text).evaluator.data.contrast == "text:general.log"


def test_recipes_over_two_texts_name_the_second():
    with pytest.raises(UsageError, match="second calibration text for the metric d_pruner"):
        known_recipe("d_pruner", 0.5)
    file = known_recipe("d_pruner", 0.5, "a.txt", "b.txt")
    assert (file.calibration_text, file.texts["contrast"]) == ("a.txt", "b.txt")
    with pytest.raises(ValueError, match=r"Expected other names in `space.sources` than contrast"):
        settings_from({"model": "tiny", "space": {"kind": "recipe", "sources": {"contrast": "a.txt"}}})
