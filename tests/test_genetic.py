from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from secateur.search import app
from secateur.search.budget import Budget
from secateur.search.controllers.genetic_programming.cma_es import ConstantsTuner
from secateur.search.controllers.genetic_programming.controller import Genetic
from secateur.search.controllers.genetic_programming.population import Individual, Population, ranking
from secateur.search.controllers.genetic_programming.settings import ConstantsSettings, GeneticSettings
from secateur.search.controllers.proxy_screening import spearman
from secateur.search.controllers.random import Random, RandomSettings
from secateur.search.loop.loop import Outcome, Search
from secateur.search.loop.notes import NotesKeeper, notes_line
from secateur.search.results.run import Run
from secateur.search.settings.settings import resolved, settings_from
from secateur.search.show.report import write_report
from secateur.search.show.summary import grouped, status_line, status_lines, summary
from secateur.search.study.about import About
from secateur.search.study.study import Study
from secateur.spaces.formulas.grammar import parse
from secateur.spaces.formulas.space import Formula
from tests.formula_toy import (
    FIDELITIES,
    LINEARS,
    PROXY,
    SHAPE,
    FormulaEvaluator,
    FormulaLandscape,
    best_of,
    formula_space,
    noise,
    search_formulas,
)
from tests.toy import OneMax, Pool

SPACE = formula_space()
GOOD = FormulaLandscape(proxy=lambda loss, text: loss + 0.02 * noise(text))
SMALL = {"offspring": 4, "start": 6, "oversampling": 6}


def genetic(seed: int = 0, proxy=None, fidelities=FIDELITIES, **settings) -> Genetic:
    return Genetic(SPACE, fidelities, seed, GeneticSettings(**settings), proxy=proxy)


# --- it searches ---


def test_it_beats_random_search_at_equal_evaluations():
    ours, random = [], []
    for seed in range(10):
        ours.append(best_of(search_formulas(genetic(seed), GOOD, 80)))
        other = Random(SPACE, FIDELITIES, seed, RandomSettings())
        random.append(best_of(search_formulas(other, GOOD, 80)))
    assert np.mean(ours) < 0.85 * np.mean(random)
    assert sum(a < b for a, b in zip(ours, random, strict=True)) >= 7


def test_a_good_proxy_finds_better_ones_at_equal_evaluations():
    screening = [genetic(seed, PROXY, oversampling=12) for seed in range(3)]
    with_proxy = [best_of(search_formulas(controller, GOOD, 50)) for controller in screening]
    without = [best_of(search_formulas(genetic(seed), GOOD, 50)) for seed in range(3)]
    assert np.mean(with_proxy) < 0.75 * np.mean(without)


def test_size_pressure_yields_smaller_formulas():
    def nodes(parsimony: float) -> float:
        found = []
        for seed in range(5):
            controller = genetic(seed, fidelities=FIDELITIES[:1], parsimony=parsimony, seeds=False)
            search_formulas(controller, GOOD, 120)
            found += [x.nodes for x in controller.populations[0]]
        return float(np.mean(found))

    assert nodes(0.5) < 0.8 * nodes(0.0)


# --- populations ---


@given(st.lists(st.tuples(st.integers(0, 9).map(float), st.integers(0, 9)), max_size=40))
def test_fronts_are_those_of_the_definition(points):
    def peel(left):
        front = [
            i
            for i in left
            if not any(
                points[j][0] <= points[i][0]
                and points[j][1] <= points[i][1]
                and (points[j], j) < (points[i], i)
                for j in left
            )
        ]
        ordered = sorted(front, key=lambda i: (points[i][0], i))
        return ordered + peel([i for i in left if i not in front]) if left else []

    assert ranking(points) == peel(list(range(len(points))))


def test_elites_stay_whatever_the_smallest_fidelity_says():
    population = Population(GeneticSettings(population=4, elites=1), 2)
    elite = Individual(Formula(parse("abs(W)")), 9, None, (9.0, 0.1))
    population.put(
        [elite, *(Individual(Formula(parse(f"W + {i}")), 3, None, (i / 10, 1.0)) for i in range(1, 9))]
    )
    assert len(population.members) == 4
    assert population.elites == [elite]
    assert elite in population.members


def test_tournaments_compare_at_the_largest_fidelity_that_both_have():
    population = Population(GeneticSettings(tournament=20, parsimony=0), 2)
    good, lucky, new = (
        Individual(Formula(parse(text)), 3, None, losses)
        for text, losses in (("W + 1", (0.2, 0.2)), ("W + 2", (0.1, 0.5)), ("W + 3", (0.3,)))
    )
    population.put([good, lucky])
    rng = np.random.default_rng(0)
    assert {population.parent(rng) for _ in range(20)} == {good}
    population.put([good, new])
    assert new not in {population.parent(rng) for _ in range(20)}


def test_islands_take_over_elites_of_their_neighbours():
    apart = genetic(0, islands=3, migrate_every=1000, seeds=False, constants=None)
    search_formulas(apart, GOOD, 90)
    for a, b in itertools.combinations(apart.populations, 2):
        assert not {x.formula for x in a} & {x.formula for x in b}
    ring = genetic(0, islands=3, migrate_every=1, seeds=False, constants=None)
    search_formulas(ring, GOOD, 90)
    assert ring.notes["migrated"] > 2
    assert all(
        {x.formula for x in a} & {x.formula for x in b} for a, b in itertools.pairwise(ring.populations)
    )


# --- constants ---


def test_cma_es_finds_a_known_constant():
    landscape = FormulaLandscape("abs(W) * X + 0.37 * G", n=2000)
    start = Formula(parse("abs(W) * X + 3 * G"))
    tuner = ConstantsTuner(SPACE, start, ConstantsSettings(population=6), np.random.default_rng(0))
    seen, losses = set[str](), dict[str, float]()

    def is_new(formula):
        new = formula.text not in seen
        seen.add(formula.text)
        return new

    for _ in range(15):
        formulas = tuner.ask(is_new)
        losses |= {formula.text: landscape.loss(formula) for formula in formulas}
        tuner.tell([losses[formula.text] for formula in formulas])
    [found] = SPACE.constants(Formula(parse(min(losses, key=losses.__getitem__))))
    assert found == pytest.approx(0.37, rel=0.05)


def test_constants_of_the_best_formulas_are_tuned_as_the_search_goes():
    landscape = FormulaLandscape("abs(W) * X + 0.37 * G")
    tuned = genetic(0, constants={"every": 1, "trees": 2, "steps": 3, "population": 6})
    search_formulas(tuned, landscape, 120)
    assert tuned.notes["tuned"] >= 12
    plain = genetic(0, constants=None)
    search_formulas(plain, landscape, 120)
    assert plain.notes["tuned"] == 0


# --- in a study ---


def study_of(
    directory: Path, n_evaluations: int, pool_seed: int = 0, *, deterministic: bool = True, n_workers: int = 4
) -> tuple[Outcome, Study, Genetic, FormulaEvaluator]:
    settings = settings_from(
        {
            "space": {"kind": "formula"},
            "objectives": ["loss", "nodes"],
            "controller": {"kind": "genetic", **SMALL},
            "evaluator": {"window": 64, "fidelities": [f.n_tokens for f in FIDELITIES]},
        }
    )
    baselines = SPACE.baselines()
    about = About(
        identity={},
        baselines={name: candidate.text for name, candidate in baselines.items()},
        facts={"shape": {"linears": [vars(linear) for linear in LINEARS], **vars(SHAPE)}},
    )
    evaluator = FormulaEvaluator(SPACE, GOOD)
    controller = Genetic(SPACE, FIDELITIES, 0, settings.controller, proxy=PROXY)
    pool, budget = Pool(evaluator, n_workers, pool_seed), Budget(evaluations=n_evaluations)
    with Study.open_or_create(directory, resolved(settings), about) as study:
        asks = None if deterministic else study.asks({})
        keeper = NotesKeeper(directory, "genetic", controller)
        loop = Search(
            study, baselines, controller, pool, budget, FIDELITIES[-1], batch=8, asks=asks, observers=[keeper]
        )
        return loop.run(), study, controller, evaluator


def keys(study: Study) -> list[tuple[str, str]]:
    return [trial.measurement.key for trial in study.trials]


def test_the_order_of_results_has_no_effect_on_a_deterministic_search(tmp_path):
    _, first, *_ = study_of(tmp_path / "a", 40, pool_seed=1)
    _, second, *_ = study_of(tmp_path / "b", 40, pool_seed=2, n_workers=7)
    assert keys(first) == keys(second)


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_search_is_continued_by_replay(tmp_path, deterministic):
    study_of(tmp_path / "a", 30, deterministic=deterministic)
    _, study, first, _ = study_of(tmp_path / "a", 45, deterministic=deterministic)
    known = keys(study)
    _, study, again, evaluator = study_of(tmp_path / "a", 45, deterministic=deterministic)
    assert evaluator.n_measured == 0
    assert keys(study) == known
    assert len(set(known)) == len(known)
    assert again.populations == first.populations
    assert again.notes == first.notes
    if deterministic:
        _, unbroken, *_ = study_of(tmp_path / "b", 45)
        assert keys(unbroken) == known


def test_closed_forms_are_no_evaluations(tmp_path):
    outcome, study, *_ = study_of(tmp_path / "run", 30)
    parts = [trial.measurement.fidelity.part for trial in study.trials]
    assert outcome.reason == "budget"
    assert outcome.spent.evaluations == parts.count("search") == 30
    assert outcome.spent.tokens == study.spent.tokens <= 30 * 256
    assert parts.count("proxy") > 30


def test_what_was_generated_and_screened_is_shown(tmp_path):
    *_, controller, _ = study_of(tmp_path / "run", 40)
    run = Run(Study.open(tmp_path / "run"))
    assert run.notes == controller.notes
    assert run.notes["generated"] > run.notes["screened"] > run.notes["measured"] > 0
    facts = summary(run)
    assert f"{run.notes['generated']:,} generated" in status_lines(facts)["counted"]
    assert f"rank correlation {run.notes['rank_correlation']:g}" in status_line(facts)
    assert facts["spent"]["evaluations"] == 40
    files = write_report(run)
    page = files[0].read_text(encoding="utf-8")
    assert "screening.png" in [path.name for path in files]
    assert notes_line(run.notes) in page
    assert "Their rank correlation is" in page


def test_a_run_without_notes_shows_none(tmp_path):
    study_of(tmp_path / "run", 20)
    (tmp_path / "run" / "notes.json").write_text("{torn")
    run = Run(Study.open(tmp_path / "run"))
    assert run.notes == {}
    assert "counted" not in status_lines(summary(run))


def test_the_embedded_model_is_searched_with_its_proxy(tmp_path):
    run = app.run(
        tmp_path / "run",
        space={
            "kind": "formula",
            "target": 0.6,
            "terminals": ["W", "X"],
            "known": ["wanda"],
            "proxy": {"blocks": 1, "rows": 4},
        },
        evaluator={"window": 32, "calibration_tokens": 64, "fidelities": [32], "test_tokens": 32},
        objectives=["loss", "nodes"],
        budget={"evaluations": 5},
        controller={"kind": "genetic", "offspring": 2, "start": 3, "oversampling": 3},
    )
    assert run.study.spent.evaluations == 5
    assert run.notes["screened"] > run.notes["measured"] > 2


# --- what it is made of ---


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=30))
def test_rank_correlation_is_spearmans(pairs):
    first, second = zip(*pairs, strict=True)
    found = spearman(first, second)
    if len(set(first)) == 1 or len(set(second)) == 1:
        assert found is None
    else:
        assert found == pytest.approx(scipy.stats.spearmanr(first, second).statistic)


def test_another_space_is_refused():
    with pytest.raises(ValueError, match="Expected a space of formulas"):
        Genetic(OneMax(), FIDELITIES, 0, GeneticSettings())


def test_numbers_can_be_read_and_exchanged():
    formula = Formula(parse("0.5 * G + abs(W) * pow(X, 3)"))
    assert SPACE.constants(formula) == (0.5, 3.0)
    assert SPACE.with_constants(formula, (0.25, 1)).text == "abs(W) * X + 0.25 * G"
    with pytest.raises(ValueError, match="Expected 2 constants, got 1"):
        SPACE.with_constants(formula, (1.0,))


def test_reasons_that_differ_in_numbers_alone_are_one():
    counts = {"is constant": 2, "sqrt(-1e-7) = nan at probe 3": 2, "sqrt(-0.5) = nan at probe 0": 3}
    assert grouped(counts) == [("sqrt(-0.5) = nan at probe 0", 5), ("is constant", 2)]
