"""A proxy screens formulas, as far as it is seen to be right."""

from __future__ import annotations

import numpy as np
import pytest

from secateur.search.controller import Trial
from secateur.search.controllers.genetic_programming.population import Individual
from secateur.search.controllers.genetic_programming.settings import GeneticSettings
from secateur.search.controllers.proxy_screening import ENOUGH, Screening
from secateur.spaces.formulas.grammar import parse
from secateur.spaces.formulas.space import Formula
from tests.formula_toy import (
    FIDELITIES,
    PROXY,
    FormulaLandscape,
    noise,
    search_formulas,
)
from tests.test_genetic import GOOD, genetic

NOISE = FormulaLandscape(proxy=lambda loss, text: noise(text))


def test_a_thousand_formulas_are_screened_down_to_a_few_measurements():
    controller = genetic(0, PROXY)
    trials: list[Trial] = []
    while controller.notes["generated"] < 1000:
        told = [Trial(len(trials) + i, GOOD.measure(p)) for i, p in enumerate(controller.ask(16))]
        trials += told
        controller.tell(told)
    while (proposals := controller.ask(16)) and proposals[0].fidelity != PROXY:  # of the generations so far
        told = [Trial(len(trials) + i, GOOD.measure(p)) for i, p in enumerate(proposals)]
        trials += told
        controller.tell(told)
    on_data = [t for t in trials if t.measurement.fidelity.part == "search"]
    assert 10 < len(on_data) <= 60
    assert controller.notes["screened"] >= 500


def test_screening_saves_when_the_proxy_is_good_and_relaxes_when_it_is_noise():
    good, bad = genetic(1, PROXY, oversampling=16), genetic(1, PROXY, oversampling=16)
    search_formulas(good, GOOD, 70)
    search_formulas(bad, NOISE, 70)
    assert good.notes["rank_correlation"] > 0.7
    assert good.notes["oversampling"] == 16
    assert abs(bad.notes["rank_correlation"]) < 0.5
    assert bad.notes["oversampling"] < 6
    assert good.notes["screened"] > 1.5 * bad.notes["screened"]


def test_oversampling_falls_with_the_correlation():
    screening = Screening(GeneticSettings(trust=0.8))
    for i in range(2 * ENOUGH - 2):
        screening.note(i, -i)
    assert screening.correlation is None
    assert screening.oversampling == 32
    screening.note(2 * ENOUGH, -2 * ENOUGH)
    assert screening.correlation == pytest.approx(-1)
    assert screening.oversampling == 1
    for i in range(64):
        screening.note(i, i)
    assert screening.correlation == pytest.approx(1)  # older pairs are forgotten
    assert screening.oversampling == 32


def test_a_proxy_is_judged_by_the_better_half():
    """It tells the hopeless from the others, and orders the others the wrong way round."""
    screening = Screening(GeneticSettings())
    for i in range(20):
        screening.note(-i, i)
        screening.note(100 + i, 100 + i)
    assert screening.correlation == pytest.approx(-1)
    assert screening.oversampling == 1


def test_some_are_let_through_by_chance():
    ranked = [Individual(Formula(parse(f"W + {i}")), 3, i, ()) for i in range(1, 101)]
    screening = Screening(GeneticSettings(chance=0.25))
    rng = np.random.default_rng(0)
    for _ in range(20):
        chosen = [x.proxy for x in screening.choose(ranked, 8, rng)]
        assert chosen[:6] == [1, 2, 3, 4, 5, 6]
        assert len(set(chosen)) == 8
    assert max(chosen) > 8
    assert screening.choose(ranked[:5], 8, rng) == ranked[:5]


def test_formulas_with_equal_values_and_infeasible_ones_go_no_further():
    controller = genetic(0, PROXY, seeds=False)
    trials = search_formulas(controller, GOOD, 40)
    by_part = {
        part: [t.measurement for t in trials if t.measurement.fidelity.part == part]
        for part in ("proxy", "search")
    }
    failed = {m.candidate for m in by_part["proxy"] if m.infeasible}
    measured = {m.candidate for m in by_part["search"]}
    assert failed
    assert not failed & measured
    assert controller.notes["infeasible"] == len(failed)
    flat = FormulaLandscape(proxy=lambda loss, text: 0.5)  # all prune alike: only ever smaller ones go on
    controller = genetic(0, PROXY, seeds=False, offspring=2, start=2, oversampling=3)
    trials = search_formulas(controller, flat, 40)
    nodes = [t.measurement.values["nodes"] for t in trials if t.measurement.fidelity == FIDELITIES[0]]
    assert nodes == sorted(set(nodes), reverse=True)
    assert controller.notes["duplicates"] > 0


def test_a_search_that_only_a_proxy_is_asked_in_ends():
    class Nothing(FormulaLandscape):
        def loss(self, formula):
            return None

    controller = genetic(0, PROXY, seeds=False, offspring=1, start=1, oversampling=2)
    assert len(search_formulas(controller, Nothing(), 10, ask=4)) <= 100
    assert controller.ask(4) == []
