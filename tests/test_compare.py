"""Comparison of runs on the test text: ratios, differences, seeds, and the merged front."""

import csv
import io
import json
import math
import statistics
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats

from secateur.search.cli import searching
from secateur.search.cli.searching import parse_seeds
from secateur.search.errors import UsageError
from secateur.search.results.compare import compared, merged_front
from secateur.search.results.paired import against_baseline, difference, ratio
from secateur.search.results.targets import best_by_target, target_sparsities
from secateur.search.show.compared import compared_grid, compared_json
from secateur.search.show.front_table import columns, front_json, front_rows
from secateur.search.show.grid import Grid
from secateur.search.show.report import write_report
from secateur.spaces.measurement import Measurement
from tests.runs import TEST, make_run


def measured(windows, **values):
    loss = statistics.fmean(windows)
    return Measurement("c", TEST, {"loss": loss, **values}, windows=tuple(windows))


def test_a_ratio_is_paired_over_windows():
    rng = np.random.default_rng(0)
    hard = rng.uniform(1, 3, 40)  # some windows are harder for all
    ours, theirs = 0.9 * hard + rng.normal(0, 0.01, 40), hard
    found = ratio(measured(ours), measured(theirs), "uniform@0.5")
    assert found.value == pytest.approx(ours.mean() / theirs.mean())
    rest = ours - found.value * theirs
    expected = scipy.stats.t.ppf(0.975, 39) * rest.std(ddof=1) / math.sqrt(40) / theirs.mean()
    assert found.half == pytest.approx(expected)
    assert found.half < 0.01 < ours.std() / math.sqrt(40), "far below that of windows apart"
    assert found.text == f"{found.value:.3f} ± {found.half:.3f}"
    assert found.to_json()["low"] == pytest.approx(found.value - found.half)


def test_an_estimate_is_of_plain_numbers():
    """A model's card is YAML, which would write a number of numpy as an object."""
    found = ratio(measured([0.9, 1.2, 0.8]), measured([1.0, 1.4, 0.9]))
    assert {type(value) for value in (found.value, found.half)} == {float}


def test_the_interval_holds_the_true_ratio_as_often_as_it_says():
    rng, hits = np.random.default_rng(1), 0
    for _ in range(400):
        hard = rng.gamma(4, 1, 16)
        found = ratio(measured(0.9 * hard + rng.normal(0, 0.1, 16)), measured(hard))
        hits += abs(found.value - 0.9) < found.half
    assert 0.91 < hits / 400 < 0.98


def test_without_windows_there_is_a_ratio_and_no_interval():
    found = ratio(replace(measured([1.0, 2.0]), windows=()), measured([2.0, 2.0]))
    assert (found.value, found.half, found.text) == (0.75, None, "0.750")
    assert ratio(measured([0.5]), measured([1.0])).half is None, "one window has no spread"
    assert ratio(measured([1.0, 1.0]), measured([0.0, 0.0])) is None


def test_a_difference_of_several_runs_is_that_of_their_means():
    ours = [measured([1.0, 2.0, 3.0]), measured([3.0, 2.0, 1.5])]
    found = difference(ours, [measured([1.0, 1.0, 2.0])])
    gaps = [1.0, 1.0, 0.25]
    assert found.value == pytest.approx(statistics.fmean(gaps))
    assert found.half == pytest.approx(scipy.stats.t.ppf(0.975, 2) * statistics.stdev(gaps) / math.sqrt(3))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two kinds of runs with two seeds each; windows of the data do not depend on them here."""
    place = tmp_path_factory.mktemp("runs")
    return [
        make_run(
            place / f"{kind}-seed{seed}", draws=10 * len(kind) + seed, controller={"kind": kind}, seed=seed
        )
        for kind in ("evolution", "random")
        for seed in (0, 1)
    ]


def best_test(run, target):
    best = best_by_target(run.trials(), target_sparsities(run.baselines))[target]
    found = run.test_of(best)
    return best, found


def test_runs_that_differ_in_seeds_alone_are_one_row_a_target(runs):
    rows = compared(runs)
    tested = [row for row in rows if row.target == "0.6"]
    assert {row.name for row in rows} == {"evolution", "random"}
    for row, group in zip(tested, (runs[:2], runs[2:]), strict=True):
        losses = [m.values["loss"] for _, m in (best_test(run, "0.6") for run in group) if m is not None]
        assert row.test_loss.mean == pytest.approx(statistics.fmean(losses))
        if len(losses) > 1:
            assert row.test_loss.deviation == pytest.approx(statistics.stdev(losses))
    first, other = tested
    assert first.over_windows is None
    assert other.over_windows.value == pytest.approx(other.test_loss.mean - first.test_loss.mean)
    gaps = [
        b.test.values["loss"] - a.test.values["loss"] for a, b in zip(first.found, other.found, strict=True)
    ]
    assert other.over_seeds.mean == pytest.approx(statistics.fmean(gaps))


def test_tables_lead_with_the_test_ratio(runs):
    grid = compared_grid(compared(runs))
    assert list(grid.headings[:4]) == ["runs", "target", "n", "test loss / baseline"]
    lines = list(csv.reader(io.StringIO(grid.csv())))
    assert lines == [list(grid.headings), *map(list, grid.rows)]
    assert grid.markdown().splitlines()[1].startswith("| --- | --- | ---: |")
    latex = grid.latex()
    assert latex.count(r"\\") == 1 + len(grid.rows)
    assert r"$\pm$" in latex
    json.dumps(compared_json(compared(runs)))  # plain
    run = runs[0]
    rows = front_rows(run)
    assert [heading for heading, _ in columns(run, rows)][:3] == [
        "trial",
        "test loss / baseline",
        "test loss",
    ]
    row = next(r for r in rows if r.test_ratio and r.on_front)
    assert front_json(run, [row])["front"][0]["test_ratio"] == row.test_ratio.to_json()
    html = write_report(run)[0].read_text()
    best, _ = best_test(run, "0.6")
    assert f"{against_baseline(run, best).text}\N{NO-BREAK SPACE}×" in html
    assert html.index("on the test text, at sparsity") < html.index("on the search text")


def test_latex_and_markdown_hold_any_text():
    grid = Grid(["a_b", "50 %"], [["x|y", "1 ± 2"]])
    assert r"a\_b & 50 \% \\" in grid.latex()
    assert r"| x\|y | 1 ± 2 |" in grid.markdown()


def test_fronts_merge_by_their_values_on_the_test_text(runs):
    front = merged_front(runs)
    points = [(t.measurement.values["loss"], t.measurement.values["params"]) for _, t in front]
    everything = [
        (t.measurement.values["loss"], t.measurement.values["params"])
        for run in runs
        for t in run.study.trials
        if t.measurement.fidelity == TEST
    ]
    assert len({run.study.directory for run, _ in front}) > 1
    for loss, params in everything:
        assert not any(loss < a and params < 0.99 * b for a, b in points)
    assert points == sorted(points)


def test_runs_with_other_test_windows_have_no_difference_and_no_common_front(runs, tmp_path):
    other = make_run(
        tmp_path / "other", evaluator={"fidelities": [1024, 2048], "test_tokens": 1024, "window": 256}
    )
    rows = [row for row in compared([runs[0], other]) if row.target == "0.6"]
    assert [row.over_windows for row in rows] == [None, None]
    with pytest.raises(UsageError, match="same model, loss and test windows"):
        merged_front([runs[0], other])


def test_the_command_prints_each_form(runs, secateur):
    places = [str(run.study.directory) for run in runs]
    for form, part in (
        ("table", "evolution"),
        ("csv", "runs,target"),
        ("latex", r"\toprule"),
        ("markdown", "---:"),
    ):
        status, out, _ = secateur("compare", *places, "--form", form)
        assert (status, part in out) == (0, True)
    status, out, _ = secateur("compare", *places, "--front", "--json")
    assert len(json.loads(out)) == len(merged_front(runs))
    assert secateur("compare", places[0], places[0])[0] == 2
    assert secateur("compare", places[0], "--form", "pdf")[0] == 2


def test_seeds_are_read_strictly():
    assert parse_seeds("0, 1,12") == [0, 1, 12]
    for text in ("", "0,,1", "1,1", "-1", "a", "1.0"):
        with pytest.raises(UsageError, match="--seeds"):
            parse_seeds(text)


def test_each_seed_is_a_search_of_its_own_and_a_stop_ends_them_all(tmp_path, monkeypatch, secateur):
    searched = []

    def fake(loaded, place, again, *, anyway):
        searched.append((loaded.seed, loaded.data_seed, place.name))
        if not place.exists():
            make_run(place, draws=loaded.seed, seed=loaded.seed)
        return type("Outcome", (), {"reason": "stopped" if loaded.seed == 2 else "budget"})

    monkeypatch.setattr(searching, "_search_one", fake)
    base = ["search", "--run", str(tmp_path / "run"), "-o", "space.target=[0.3, 0.6]"]
    status, out, _ = secateur(*base, "--seeds", "0,1")
    assert status == 0
    assert searched == [(0, 0, "run-seed0"), (1, 1, "run-seed1")]
    assert "test loss / baseline" in out
    assert "secateur compare" in out
    assert secateur(*base, "--seeds", "0,2,3")[0] == 3
    assert [seed for seed, *_ in searched] == [0, 1, 0, 2], "and the same command goes on"
