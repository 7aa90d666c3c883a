"""Scores of formulas: where they are undefined, and which rank alike."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from secateur.pruners.calibration.statistics import InputStatistics, ModelStatistics
from secateur.pruners.formulas.evaluate import FormulaError, scores
from secateur.pruners.formulas.fingerprint import fingerprint, gaussian_probes, probe_of
from secateur.pruners.formulas.terminals import terminals_of
from secateur.spaces.formulas.grammar import parse
from secateur.spaces.formulas.operators import TERMINALS
from secateur.spaces.formulas.tree import Apply, Constant
from tests.models import small_anatomy

PROBES = gaussian_probes()
SHAPE = (16, 96)


def mark(text: str, **changes) -> str:
    return fingerprint(parse(text), PROBES, [0.5], **changes)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("W / (X - X)", r"got div\(.*, 0\) = -?inf"),
        ("sqrt(W)", r"got sqrt\(-.*\) = nan"),
        ("minmax(P)", r"got minmax\(.*\) = nan"),
        ("exp(1000 + W)", r"got exp\(\d+.*\) = inf"),
        ("exp(90 + abs(W))", r"got exp\(90\..*\) = 1\..*e\+39"),  # of fp64, but not of fp32
        ("pow(W, 0.5)", r"got pow\(-.*, 0\.5\) = nan"),
        ("R + P", "constant in every comparison group"),
        ("2 + 2", "constant in every comparison group"),
        ("0 * W", "constant in every comparison group"),
    ],
)
def test_infeasible_formulas_have_a_reason_and_no_nan(text, said):
    probe = PROBES[0]
    with pytest.raises(FormulaError, match=said):
        scores(parse(text), probe, SHAPE)


def test_what_competes_decides_what_is_constant():
    probe, formula = PROBES[0], parse("R")
    assert scores(formula, probe, SHAPE, comparison="layer").shape == SHAPE
    with pytest.raises(FormulaError, match="constant"):
        scores(formula, probe, SHAPE, comparison="layer", group_size=4)
    with pytest.raises(ValueError, match="Expected `group_size` to divide"):
        scores(formula, probe, SHAPE, group_size=7)


def test_terminals_that_do_not_fit_are_refused():
    probe = PROBES[0]
    wrong = {**probe, "X": torch.ones(1, 7)}
    with pytest.raises(FormulaError, match="Expected one value a weight"):
        scores(parse("W * X"), wrong, SHAPE)


@pytest.mark.parametrize(
    "same",
    [
        "X * abs(W)",
        "exp(abs(W) * X)",
        "log(abs(W)) + log(X)",
        "square(W * X)",
        "tanh(3 * abs(W) * X)",
        "rank(abs(W) * X)",
        "minmax(abs(W) * X)",
        "abs(W) * X / R",
        "abs(W) * X + R - 5",
        "neg(1 / (abs(W) * X))",
        "abs(W) * X * exp(P)",
    ],
)
def test_formulas_that_rank_alike_in_each_row_have_one_fingerprint(same):
    assert mark(same) == mark("abs(W) * X")


def test_formulas_that_rank_otherwise_have_others():
    texts = [
        "abs(W) * X",
        "abs(W)",
        "neg(abs(W) * X)",
        "W",
        "abs(W) * sqrt(X)",
        "G",
        "abs(W) / H",
        "abs(W) * C",
    ]
    assert len({mark(text) for text in texts}) == len(texts)
    assert mark("abs(W) * X / R", comparison="layer") != mark("abs(W) * X", comparison="layer")
    assert mark("abs(W) * X / R", group_size=4) == mark("abs(W) * X", group_size=4)


@examples(max_examples=20)
@given(st.floats(0.01, 100), st.sampled_from([0.3, 0.5, 0.71]))
def test_positive_scalings_do_not_change_a_fingerprint(factor, sparsity):
    wanda = parse("abs(W) * X")
    formulas = [Apply("mul", (Constant(factor), wanda)), wanda]
    assert len({fingerprint(x, PROBES, [sparsity]) for x in formulas}) == 1


@pytest.mark.parametrize("sparsity", [0.5, 0.333, 0.9])
@pytest.mark.parametrize(
    ("text", "comparison", "said"),
    [
        ("X", "output", "same mask in every row"),
        ("X * R", "output", "same mask in every row"),
        ("X / H + C", "layer", "same mask in every row"),
        ("R", "layer", "same mask in every row"),
        ("X + 0 * W", "output", "same mask in every row"),
        ("P", "layer", "constant"),
        ("log(W)", "output", "nan at probe 0"),
    ],
)
def test_blind_and_undefined_formulas_are_recognised(text, comparison, said, sparsity):
    with pytest.raises(FormulaError, match=said):
        fingerprint(parse(text), PROBES, [sparsity], comparison=comparison)


def test_probes_of_a_layer_are_some_of_its_rows():
    linear = list(small_anatomy().linears)[-1]
    absolute = linear.weight.abs()
    gradients = {
        "rms": absolute,
        "contrast_rms": absolute,
        "damage_norms": absolute[0],
        "contrast_norms": absolute[0],
    }
    whole = ModelStatistics(2, {kind: {linear.name: x} for kind, x in gradients.items()})
    inputs = InputStatistics(5, torch.ones(linear.in_features), torch.eye(linear.in_features))
    given = terminals_of(linear, TERMINALS, inputs, whole)
    probe = probe_of(given, rows=8)
    assert probe["W"].shape == (8, linear.in_features)
    assert torch.equal(probe["W"][[0, -1]], linear.weight[[0, -1]].double())
    assert torch.equal(probe["R"][-1], linear.weight[-1].abs().sum()[None].double())
    assert fingerprint(parse("abs(W) * G"), [probe], [0.5])
