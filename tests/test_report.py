"""What people see of a run: rows, pictures, the page."""

import errno
import re
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from secateur.search.errors import UsageError
from secateur.search.results.targets import best_by_target, loss_series, target_of, target_sparsities
from secateur.search.show.front_plot import plot_front, tick, widen
from secateur.search.show.front_table import columns, front_rows, row_json
from secateur.search.show.plots import plot_allocation
from secateur.search.show.report import write_report
from secateur.search.show.summary import status_line, status_lines, summary
from secateur.search.show.values import perplexity, scaled, shown
from secateur.search.study.overlap import write_overlap
from tests.runs import LINEARS, REASON, SEARCH, make_run, make_space, measure

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("made") / "run")


@pytest.fixture(scope="module")
def files(run):
    return write_report(run)


def size(path):
    data = path.read_bytes()
    assert data.startswith(PNG)
    return int.from_bytes(data[16:20]), int.from_bytes(data[20:24])


def test_rows_are_the_front_then_the_other_baselines(run):
    rows = front_rows(run)
    assert [row.trial for row in rows if row.on_front] == run.front()
    notes = [row.note for row in rows]
    assert {"dense", "uniform@0.3", "uniform@0.6"} <= set(notes)
    assert all(row.test is not None for row in rows)
    beside = [row.trial for row in rows if not row.on_front]
    assert not {t.number for t in beside} & {t.number for t in run.front()}
    assert {t.number for t in beside} <= {t.number for t in run.baselines.values()}


def test_a_row_is_compared_with_the_uniform_baseline_of_its_target(run):
    row = next(row for row in front_rows(run) if "uniform@0.6" in row.note and row.trial.number > 2)
    ratio = row.trial.measurement.values["loss"] / run.baselines["uniform@0.6"].measurement.values["loss"]
    assert row.note == f"{ratio:.2f}x the loss of uniform@0.6 in the search"


def test_targets_hold_their_trials_and_best(run):
    known = target_sparsities(run.baselines)
    assert list(known) == ["0.3", "0.6"]
    assert target_of(run.baselines["dense"], known) is None
    best = best_by_target(run.trials(), known)
    for label, trial in best.items():
        same = [t for t in run.trials() if target_of(t, known) == label]
        assert len(same) > 1
        assert trial.measurement.values["loss"] == min(t.measurement.values["loss"] for t in same)


@pytest.fixture(scope="module")
def formulas(tmp_path_factory):
    """A search of formulas, whose reference is Wanda's, and the smallest loss that of the dense model."""
    space = {"kind": "formula", "target": 0.6}
    return make_run(tmp_path_factory.mktemp("formulas") / "run", space=space, objectives=["loss", "nodes"])


def test_a_reference_is_called_what_the_space_calls_it(formulas):
    facts = summary(formulas)
    assert facts["best"]["0.6"]["reference"] == "wanda"
    assert "; wanda " in status_lines(facts)["best at 0.6"]
    assert "(wanda " in status_line({**facts, "evaluations_per_hour": None})
    html = write_report(formulas)[0].read_text()
    assert "the loss of wanda, at sparsity 0.6" in html
    assert "of uniform" not in html


def test_a_dense_model_has_no_formula_and_no_size_of_one(formulas):
    rows = front_rows(formulas)
    row = next(row for row in rows if row.note == "dense")
    assert row.trial.measurement.values["nodes"] == 25  # ranks it
    cells = {heading: cell(row) for heading, cell in columns(formulas, rows)}
    assert cells["formula size"] == "–"
    assert row_json(row)["values"]["nodes"] is None
    others = [row for row in rows if row.note != "dense"]
    assert all(row_json(row)["values"]["nodes"] >= 1 for row in others)


def test_losses_over_tokens_go_down_from_uniform_to_the_best(run):
    known = target_sparsities(run.baselines)
    series = loss_series(run.study.trials, SEARCH, known)
    for label, points in series.items():
        tokens, losses = zip(*points, strict=True)
        assert losses[0] == run.baselines[f"uniform@{label}"].measurement.values["loss"]
        assert losses[-1] == best_by_target(run.trials(), known)[label].measurement.values["loss"]
        assert all(np.diff(losses) < 0)
        assert all(np.diff(tokens) > 0)
    assert series["0.3"][0][0] == 2 * 2048  # the dense model, then uniform@0.3
    assert max(points[-1][0] for points in series.values()) <= run.study.spent.tokens


def test_status_counts_what_is_in_the_study(run):
    facts = summary(run)
    assert facts["infeasible"] == {REASON: 1}
    assert sum(facts["measurements"].values()) == len(run.study.trials)
    assert facts["spent"]["tokens"] == run.study.spent.tokens
    assert facts["writer"] is None
    assert REASON in status_lines(facts).values()


def test_the_report_needs_nothing_but_itself(files):
    page, *pictures = files
    assert {path.name for path in pictures} == {"front.png", "course.png", "candidate.png"}
    assert all(min(size(path)) > 300 for path in pictures)
    text = page.read_text()
    assert text.count("<figure>") == 2
    assert text.count("<svg ") == 4  # each for wide and for narrow screens
    assert not re.search(r"https?:|src=|@import|url\((?!#)|<script [^>]|<link|href=\"(?!#|data:)", text)
    assert "$" not in re.sub(r"base64,[^\"]*", "", text)  # every placeholder was filled


def test_the_report_has_the_numbers(run, files):
    text = unescape(files[0].read_text())
    for row in front_rows(run):
        assert f'data-trial="{row.trial.number}">{row.trial.number}</a></td>' in text
        assert f"<td>{shown('loss', row.test.values['loss'])}</td>" in text
    assert "sha256 of test text" in text
    assert "7e57" in text
    assert f"{run.study.spent.evaluations:,}" in text
    assert REASON in text
    assert "no smaller, no faster" in text


def test_the_report_escapes_what_comes_from_outside(tmp_path):
    run = make_run(tmp_path / "run", model="<b>&tiny")
    text = write_report(run)[0].read_text()
    assert "<b>&tiny" not in text
    assert "&lt;b&gt;&amp;tiny" in text
    assert "<nan>" not in text


def test_names_and_formulas_of_the_overlap_are_escaped(tmp_path):
    run = make_run(tmp_path / "run")
    known = {"<known>": "X < 1"}
    write_overlap(tmp_path / "run", {"blocks": [0], "known": known, "overlap": {"X < 1": {"<known>": 0.5}}})
    text = write_report(run)[0].read_text()
    assert "<code>X &lt; 1</code> &lt;known&gt;</td><td>50.0%</td>" in text
    assert "<known>" not in text


def test_the_report_shows_the_trial_that_is_asked_for(tmp_path):
    run = make_run(tmp_path / "run")
    trial = run.trials()[5]
    assert f"trial {trial.number}<" in write_report(run, trial)[0].read_text()


def test_the_report_shows_the_best_trial_of_the_middle_target(run, files):
    middle = best_by_target(run.trials(), target_sparsities(run.baselines))["0.6"]
    assert f"trial {middle.number}<" in files[0].read_text()


def test_a_run_without_trials_has_no_report(tmp_path):
    run = make_run(tmp_path / "run")
    (tmp_path / "run" / "measurements.jsonl").write_text("")
    run.study._trials.clear()
    run.study._by_key.clear()
    with pytest.raises(UsageError, match="without"):
        write_report(run)


@pytest.mark.parametrize("objectives", [["loss"], ["loss", "sparsity"], ["params", "loss", "sparsity"]])
def test_the_front_is_drawn_for_any_objectives(tmp_path, objectives):
    run = make_run(tmp_path / "run", objectives=objectives)
    plot_front(tmp_path / "front.png", run)
    assert min(size(tmp_path / "front.png")) > 300


@pytest.mark.parametrize(("name", "at"), [("params", 1_469_200), ("sparsity", 0.2), ("latency_decode", 7.3)])
def test_ticks_read_differently_where_all_have_about_the_same(name, at):
    axes = Figure(figsize=(8, 5)).add_subplot()
    axes.scatter([at, at * 1.0007], [0.1, 0.2])
    widen(axes, name)
    low, high = axes.get_xlim()
    assert low < at < at * 1.0007 < high
    texts = [tick(name, value) for value in axes.get_xticks() if low <= value <= high]
    assert len(set(texts)) == len(texts) > 2


def test_an_allocation_is_drawn_for_blocks_that_differ(tmp_path):
    linears = [vars(linear) for linear in LINEARS][:-1]  # the last block lacks a projection
    plot_allocation(tmp_path / "a.png", {linears[0]["name"]: 0.5}, linears, "one block lacks a projection")
    assert min(size(tmp_path / "a.png")) > 300


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("sparsity", 0.6, "60.0%"),
        ("params", 4_215_000, "4.215 M"),
        ("size_bytes", 999, "999 B"),
        ("loss", 0.12345, "0.1235"),
        ("ppl", 27.123, "27.12"),
        ("ppl", None, ""),
    ],
)
def test_values_for_people(name, value, text):
    assert shown(name, value) == text


def test_perplexity_is_exp_of_ce_and_never_infinite(run):
    m = measure(make_space(run.settings), make_space(run.settings).baselines()["dense"], SEARCH)
    assert perplexity(m.values) == pytest.approx(np.exp(3.0))
    assert np.isfinite(perplexity({"ce": 1e4}))
    assert perplexity({}) is None
    assert scaled(0) == "0"


def test_a_report_that_cannot_be_finished_leaves_the_old_files_whole(tmp_path, monkeypatch):
    """Of a killed report, too: whatever is written lies beside until it is whole."""
    view = make_run(tmp_path / "run")
    files = write_report(view)
    before = {path: path.read_bytes() for path in files}

    def half(figure: Figure, path: Path, **how: object) -> None:
        Path(path).write_bytes(b"\x89PNG half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(Figure, "savefig", half)
        with pytest.raises(OSError, match="No space"):
            write_report(view)
    with monkeypatch.context() as broken:
        broken.setattr(Path, "write_text", lambda path, text, **how: path.write_bytes(b"<ht") and 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write_report(view)
    assert {path: path.read_bytes() for path in files} == before
    assert sorted(p.name for p in files[0].parent.iterdir()) == sorted(p.name for p in files)
