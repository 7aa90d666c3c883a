"""The controller `learned`: its step against a slow readable form, and searches that it runs."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest

from secateur.search import app
from secateur.search.controllers.learned import Learned, LearnedChoice, LearnedSettings
from secateur.search.controllers.separable import solve
from secateur.search.errors import UsageError
from secateur.search.settings.settings import settings_from
from secateur.spaces.measurement import Effects, Fidelity
from tests.formula_toy import formula_space
from tests.test_conformance_controllers import space_of
from tests.test_trust_region import EVALUATOR, lines_of, settings


def choice_of(target=0):
    space = space_of(("learned", {}))
    return space, LearnedChoice(space, target, list(space.baselines().values())[1 + target])


def effects_of(space, seed):
    rng = np.random.default_rng(seed)
    sizes = [len(space.options(slot)) for slot in range(len(space.slots))]
    tables = [tuple(tuple(rng.normal(size=n)) for n in sizes) for _ in range(2)]
    return Effects(tables[0], tuple(tuple(abs(x) for x in row) for row in tables[1]))


def test_a_step_is_that_of_the_slow_form():
    space, choice = choice_of()
    before = [row.tolist() for row in choice.logits]
    measured = [effects_of(space, seed) for seed in (1, 2)]
    choice.learn(measured, 0.5)
    slopes = []
    for slot, row in enumerate(before):
        total = sum(math.exp(x) for x in row)
        chances = [math.exp(x) / total for x in row]
        curve = [
            sum(one.first[slot][i] + 2 * one.second[slot][i] for one in measured) / 2 for i in range(len(row))
        ]
        mean = sum(p * e for p, e in zip(chances, curve, strict=True))
        slopes.append([e - mean for e in curve])
    size = statistics.median(abs(x) for row in slopes for x in row if x)
    for found, row, slope in zip(choice.logits, before, slopes, strict=True):
        assert found.tolist() == pytest.approx([x - 0.5 * s / size for x, s in zip(row, slope, strict=True)])


def test_every_draw_meets_the_target_and_the_first_likeliest_is_uniform():
    for target in range(len(space_of(("learned", {})).targets)):
        space, choice = choice_of(target)
        uniform = list(space.baselines().values())[1 + target]
        assert choice.likeliest().text == uniform.text
        drawn = [choice.draw(1.0, np.random.default_rng(seed)) for seed in range(20)]
        assert {space.target_of(each) for each in drawn} == {target}
        assert len({each.text for each in drawn}) > 10


@pytest.mark.parametrize("seed", range(10))
def test_the_optimum_of_an_additive_loss_is_approached(seed):
    """The loss of the likeliest candidate falls to within a tenth of the way from uniform to the optimum."""
    space, choice = choice_of()
    rng = np.random.default_rng(seed)
    costs = [
        np.square([space.share(slot, option) for option in space.options(slot)]) * rng.uniform(0.1, 3)
        for slot in range(len(space.slots))
    ]

    def positions(candidate):
        return [list(space.options(s)).index(x) for s, x in enumerate(space.disassemble(candidate))]

    def loss(candidate):
        return sum(row[i] for row, i in zip(costs, positions(candidate), strict=True))

    start, best = loss(choice.likeliest()), loss(solve(space, costs, 0))
    for step in range(40):
        drawn = choice.draw(1 - 0.9 * step / 39, np.random.default_rng([seed, step]))
        first = tuple(tuple(row - row[i]) for row, i in zip(costs, positions(drawn), strict=True))
        temperature = 1 - 0.9 * step / 39
        choice.learn([Effects(first, tuple((0.0,) * len(row) for row in costs))], 0.5 * temperature)
    assert loss(choice.likeliest()) <= best + 0.1 * (start - best) + 1e-12


@pytest.mark.parametrize("kind", ["allocation", "architecture"])
def test_a_stopped_search_goes_on_as_an_unbroken_one(kind, tmp_path):
    app.search(settings(kind, "learned", 6, every=2, steps=6), tmp_path / "parts")
    app.search(settings(kind, "learned", 18, every=2, steps=6), tmp_path / "parts")
    app.search(settings(kind, "learned", 18, every=2, steps=6), tmp_path / "whole")
    whole = lines_of(tmp_path / "whole")
    parts = {(line["candidate"], line["fidelity"]): line for line in lines_of(tmp_path / "parts")}
    assert [parts[line["candidate"], line["fidelity"]] for line in whole] == whole
    gradients = [line for line in whole if line["fidelity"].startswith("gradient")]
    assert len(gradients) >= 6
    searched = [line["values"]["loss"] for line in whole if line["fidelity"] == "search:512"]
    assert min(searched[2:]) < 0.95 * searched[1]
    assert all(line["tokens"] == 3 * int(line["fidelity"].split(":")[1]) for line in gradients)


def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path):
    raw = {
        "space": {"kind": "formula", "target": 0.5},
        "evaluator": EVALUATOR,
        "controller": {"kind": "learned"},
    }
    with pytest.raises(UsageError, match="slots can be measured alone"):
        app.search(settings_from(raw), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="for `learned`, got FormulaSpace"):
        Learned(formula_space(), [Fidelity("search", 64)], 0, LearnedSettings())
