"""A board of methods: its cells, refusals, numbers and pages."""

from __future__ import annotations

import json
import math
import re
import statistics

import pytest

from secateur import api
from secateur.search import app
from secateur.search.app.board_cell import board_texts, file_of
from secateur.search.app.cell_processes import CellProcesses
from secateur.search.board.cells import DENSE, Cell, cells_of
from secateur.search.board.rows import Board, BoardRow
from secateur.search.board.settings import board_settings, identity
from secateur.search.controller import Trial
from secateur.search.errors import UsageError
from secateur.search.show.board import markdown_text
from secateur.search.study.study import MEASUREMENTS
from secateur.spaces.measurement import Fidelity, Measurement
from secateur.spaces.recipe.known import KNOWN
from tests.boards import SMALL, WORDS, lines, measured_here
from tests.browser import look


@pytest.fixture(scope="module")
def asked():
    """Texts of the cells that were measured, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        yield measured_here(patch)


@pytest.fixture(scope="module")
def small(asked, tmp_path_factory):
    directory = tmp_path_factory.mktemp("boards") / "small"
    board = app.bench(board_settings(SMALL), directory)
    return board, directory, list(asked)


def test_methods_without_data_are_measured_once_and_others_with_each_seed():
    texts = [cell.text for cell in cells_of(board_settings(SMALL))]
    assert texts == [
        "tiny | dense",
        "tiny | magnitude 0.25 | no data",
        "tiny | magnitude 0.5 | no data",
        "tiny | wanda 0.25 | equal | seed 0",
        "tiny | wanda 0.5 | equal | seed 0",
        "tiny | shortgpt 0.25 | equal | seed 0",
        "tiny | shortgpt 0.5 | equal | seed 0",
        "tiny | wanda 0.25 | equal | seed 1",
        "tiny | wanda 0.5 | equal | seed 1",
        "tiny | shortgpt 0.25 | equal | seed 1",
        "tiny | shortgpt 0.5 | equal | seed 1",
    ]
    assert [Cell.parse(text).text for text in texts] == texts


def test_methods_that_take_no_data_draw_nothing():
    names = {name for name, row in KNOWN.items() if not row.uses_data}
    assert names >= {"magnitude", "magnitude_sp", "llm_pruner_l1", "last"}
    assert not names & {
        "wanda",
        "flap",
        "owl",
        "bonsai",
        "kprune_tuning",
        "pruner-zero",
        "mini_llm",
        "shortgpt",
    }


def test_inferred_methods_are_those_whose_words_say_so():
    assert {"saap", "mini_llm", "llm_bip"} <= {name for name, row in KNOWN.items() if row.inferred}
    assert not KNOWN["wanda"].inferred


def test_published_calibration_is_that_of_the_paper_within_the_models_positions():
    settings = board_settings({**SMALL, "methods": "all", "calibration": ["published"]})
    of = {cell.method: cell for cell in cells_of(settings) if cell.method != DENSE}
    assert of["wanda"].windows(settings, 4096) == (128, 2048)
    assert of["wanda"].windows(settings, 512) == (128, 512)
    assert of["llm_pruner_first"].windows(settings, 512) == (10, 64)
    with pytest.raises(ValueError, match="Expected a published number of calibration windows, got none"):
        of["shortgpt"].windows(settings, 512)


def test_a_small_board_has_a_line_a_cell(small):
    _, directory, asked = small
    found = lines(directory)
    assert [line["candidate"] for line in found] == asked
    assert asked == [cell.text for cell in cells_of(board_settings(SMALL))]
    by_cell = {line["candidate"]: line["values"] for line in found}
    assert by_cell["tiny | dense"]["kl"] == pytest.approx(0, abs=1e-6)
    assert by_cell["tiny | wanda 0.5 | equal | seed 0"]["sparsity"] == pytest.approx(0.5, abs=1e-6)
    assert (
        by_cell["tiny | wanda 0.5 | equal | seed 0"]["kl"]
        != by_cell["tiny | wanda 0.5 | equal | seed 1"]["kl"]
    )
    assert (
        by_cell["tiny | magnitude 0.5 | no data"]["kl"] > by_cell["tiny | wanda 0.5 | equal | seed 0"]["kl"]
    )
    assert by_cell["tiny | shortgpt 0.25 | equal | seed 0"]["params"] < by_cell["tiny | dense"]["params"]


def test_a_cell_is_what_prune_measures(small, tmp_path, forked_reload):
    from secateur.search.app.recipe_file import RecipeFile, checked

    board, _, _ = small
    cell = Cell("tiny", "wanda", 0.5, "equal", 1)
    form = {
        "unit": "weights",
        "sparsity": 0.5,
        "metric": "wanda",
        "calibration": {"samples": 4, "length": 64},
    }
    raw = {"recipe": form, "sources": {"calibration": "docs"}, "seed": 1, "pool_tokens": 8 * 256}
    summary = app.prune(checked(RecipeFile, raw), "tiny", tmp_path / "model", tokens=256, window=128)
    pruned = summary.measured["test:256, as exported"]
    assert board.cells[cell].values["kl"] == pytest.approx(pruned["kl"], rel=1e-4)
    assert board.cells[cell].values["ce"] == pytest.approx(pruned["ce"], rel=1e-5)


def test_a_finished_board_measures_nothing_again(small, asked):
    _, directory, _ = small
    before, n_asked = (directory / MEASUREMENTS).read_bytes(), len(asked)
    app.bench(board_settings(SMALL), directory)
    assert len(asked) == n_asked
    assert (directory / MEASUREMENTS).read_bytes() == before


def test_more_methods_and_seeds_continue_a_board(small, asked, tmp_path):
    _, directory, _ = small
    n_asked, before = len(asked), (directory / MEASUREMENTS).read_bytes()
    more = {**SMALL, "methods": ["magnitude", "last"], "sparsities": ["0.5"], "seeds": [0, 1, 2]}
    app.bench(board_settings(more), directory)
    assert asked[n_asked:] == ["tiny | last 0.5 | no data"]
    assert (directory / MEASUREMENTS).read_bytes().startswith(before)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"tokens": 512}, "board.tokens: 256 -> 512"),
        ({"calibration_tokens": 512}, "board.calibration_tokens"),
    ],
)
def test_other_settings_are_another_board(small, change, named):
    _, directory, _ = small
    before = (directory / MEASUREMENTS).read_bytes()
    with pytest.raises(UsageError, match="Expected the board that .* belongs to, got another .*" + named):
        app.bench(board_settings({**SMALL, **change}), directory)
    assert (directory / MEASUREMENTS).read_bytes() == before


def test_what_can_not_be_measured_is_refused_before_anything_is(asked, tmp_path):
    n_asked = len(asked)
    raw = {**SMALL, "methods": ["reap", "shortgpt", "wanda"], "calibration": ["published"], "seeds": [0]}
    app.bench(board_settings({**raw, "sparsities": ["0.25"]}), tmp_path / "board")
    found = lines(tmp_path / "board")
    assert [line["candidate"] for line in found[:3]] == [
        "tiny | wanda 0.25 | published | seed 0",
        "tiny | reap 0.25 | published | seed 0",
        "tiny | shortgpt 0.25 | published | seed 0",
    ]
    assert re.search(
        r"Expected .*windows of 512 tokens.*got", found[0]["infeasible"]
    )  # the text is too short
    assert found[1]["infeasible"] == found[2]["infeasible"]
    assert found[1]["infeasible"].startswith("Expected a published number of calibration windows, got none")
    text = (tmp_path / "board" / "METHODS.md").read_text()
    assert f"- [shortgpt]({KNOWN['shortgpt'].paper}): Expected a published number" in text
    assert asked[n_asked:] == ["tiny | dense"]
    equal = {**raw, "methods": ["reap"], "calibration": ["equal"], "sparsities": ["0.25"]}
    app.bench(board_settings(equal), tmp_path / "experts")
    assert lines(tmp_path / "experts")[0]["infeasible"].startswith(
        "Expected a model with a mixture of experts"
    )


def test_the_command_writes_the_numbers_of_the_run(small, secateur):
    _, directory, _ = small
    status, out, err = secateur("bench", "tiny", *WORDS.split(), "--run", directory)
    assert status == 0, err
    assert str(directory / "METHODS.md") in out
    by_cell = {line["candidate"]: line["values"] for line in lines(directory)}
    kls = [by_cell[f"tiny | wanda 0.5 | equal | seed {seed}"]["kl"] for seed in (0, 1)]
    ppl = [math.exp(by_cell[f"tiny | wanda 0.5 | equal | seed {seed}"]["ce"]) for seed in (0, 1)]
    text = (directory / "METHODS.md").read_text()
    table = text.partition("## tiny: weights, 50% removed, equal calibration")[2].partition("##")[0]
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line[:1] == "|"
    ]
    names = [row[0] for row in rows[2:]]
    assert names == ["dense", f"[wanda]({KNOWN['wanda'].paper})", f"[magnitude]({KNOWN['magnitude'].paper})"]
    wanda, magnitude = (dict(zip(rows[0], row, strict=True)) for row in rows[3:])
    assert wanda["KL"] == f"{statistics.fmean(kls):.4f} ± {statistics.stdev(kls):.4f}"
    assert wanda["perplexity, docs"] == f"{statistics.fmean(ppl):.2f} ± {statistics.stdev(ppl):.2f}"
    assert (wanda["seeds"], magnitude["seeds"]) == ("2", "once")
    gap = by_cell["tiny | magnitude 0.5 | no data"]["kl"] - statistics.fmean(kls)
    assert magnitude["above the best"].startswith(f"{gap:+.4f} ± ")
    assert magnitude["KL"] == f"{by_cell['tiny | magnitude 0.5 | no data']['kl']:.4f}"
    page = (directory / "methods.html").read_text()
    assert wanda["KL"] in page
    assert not re.search(r'(src|href)="(?!https://(arxiv|openreview))', page)  # it needs no other file


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_the_screen_and_sorts(small, width):
    _, directory, _ = small
    found = look(
        directory / "methods.html",
        width,
        """const table = [...doc.querySelectorAll("section")].find(x => x.querySelector("h2").innerText.includes("50%"))
          .querySelector("table");
        const names = () => [...table.tBodies[0].rows].map(x => x.cells[0].innerText);
        const before = names();
        [...table.tHead.rows[0].cells].find(x => x.innerText.startsWith("CPU")).querySelector("button").click();
        const out = [...doc.querySelectorAll("main *")].filter(x => !x.closest(".scroll")
          && x.getBoundingClientRect().right > win.innerWidth + 1).map(x => x.outerHTML.slice(0, 80));
        return {width: doc.documentElement.scrollWidth, out, before, after: names()};""",
    )
    assert found["width"] == width
    assert found["out"] == []
    assert found["before"] == ["dense", "wanda", "magnitude"]
    assert found["after"] == ["magnitude", "wanda", "dense"]  # the dense one has none


def test_json_has_mean_and_deviation(small, secateur):
    _, directory, _ = small
    status, out, _ = secateur("bench", "tiny", *WORDS.split(), "--run", directory, "--json")
    assert status == 0
    table = next(x for x in json.loads(out)["tables"] if (x["unit"], x["share"]) == ("weights", 0.5))
    kls = [line["values"]["kl"] for line in lines(directory) if "wanda 0.5" in line["candidate"]]
    assert table["rows"][0]["values"]["kl"]["mean"] == pytest.approx(statistics.fmean(kls))
    assert table["rows"][0]["seeds"] == 2


def test_python_has_the_same_board(small, asked, tmp_path):
    _, directory, _ = small
    n_asked = len(asked)
    words = {key: value for key, value in SMALL.items() if key != "models"}
    board = api.bench("tiny", run=directory, markdown=tmp_path / "M.md", **words)
    assert len(asked) == n_asked
    [rows] = [x.rows for x in board.tables() if (x.unit, x.share) == ("weights", 0.5)]
    assert [row.method for row in rows] == ["wanda", "magnitude"]
    assert (tmp_path / "M.md").read_text().startswith("# Methods\n")


def test_a_settings_file_is_what_the_words_say(small, secateur, tmp_path):
    _, directory, _ = small
    file = tmp_path / "small.yaml"
    file.write_text(json.dumps(SMALL))
    before = (directory / MEASUREMENTS).read_bytes()
    status, _, err = secateur("bench", file, "--run", directory, "--seeds", "0")
    assert status == 0, err
    assert (directory / MEASUREMENTS).read_bytes() == before


@pytest.mark.parametrize("command", ["front", "status", "report", "doctor"])
def test_a_board_is_no_search(small, secateur, command):
    _, directory, _ = small
    status, _, err = secateur(command, directory)
    assert status == 2
    assert "Expected the run of a search, got a board of methods" in err


def test_wrong_words_are_refused(secateur, tmp_path):
    for words, named in (
        ("--methods wnada", "wnada"),
        ("--sparsities layers=0.5", "layers=0.5"),
        ("--calibration mine", "calibration"),
        ("--tasks piqa", "task_dir"),
        ("-o executor.kind=mpi", "executor.kind"),
    ):
        status, _, err = secateur("bench", "tiny", *words.split(), "--run", tmp_path / "board")
        assert status == 2
        assert named in err
    assert not (tmp_path / "board").exists()


def test_tasks_are_paired_by_their_samples():
    fidelity = Fidelity("test", 256)
    values = {"loss": 1.0, "task:t": 0.55, "samples:t": 100, "won:t": 5, "lost:t": 10}
    row = BoardRow("wanda", (Measurement("tiny | wanda 0.5 | equal | seed 0", fidelity, values),))
    change, half = row.task_change("t")
    assert change == pytest.approx(-0.05)
    assert half == pytest.approx(1.96 * math.sqrt((0.15 - 0.05**2) / 100), rel=1e-4)


def test_a_method_that_fails_with_one_seed_is_a_row_of_the_others():
    settings = board_settings(
        {**SMALL, "methods": ["wanda", "owl"], "sparsities": ["0.5"], "seeds": [0, 1, 2]}
    )
    fidelity = settings.fidelity
    values = {"loss": 0.5, "kl": 0.5, "ce": 3.0}
    trials = [
        Trial(0, Measurement("tiny | wanda 0.5 | equal | seed 0", fidelity, values)),
        Trial(1, Measurement("tiny | wanda 0.5 | equal | seed 1", fidelity, infeasible="no memory")),
    ]
    missing = [
        cell for cell in cells_of(settings) if cell.text not in {x.measurement.candidate for x in trials}
    ]
    board = Board(trials, missing=missing)
    [table] = board.tables()
    wanda, owl = table.rows
    assert (wanda.n, wanda.wanted, wanda.reasons) == (1, 3, ("no memory",))
    assert (owl.n, owl.wanted, owl.reasons) == (0, 3, ())
    text = markdown_text(board, settings)
    assert re.search(r"^\| \[wanda\].*\| 0.5000 \|.*\| 1 of 3 \|", text, re.MULTILINE)
    assert f"- [wanda]({KNOWN['wanda'].paper}): no memory" in text
    assert f"- [owl]({KNOWN['owl'].paper}): not measured yet" in text


def test_a_board_that_is_interrupted_has_its_tables(tmp_path, monkeypatch):
    measured_here(monkeypatch)
    measure = CellProcesses.evaluate

    def interrupted(processes, candidates, fidelity):
        if "wanda" in candidates[0]:
            raise KeyboardInterrupt
        return measure(processes, candidates, fidelity)

    monkeypatch.setattr(CellProcesses, "evaluate", interrupted)
    settings = board_settings({**SMALL, "sparsities": ["weights=0.5"], "seeds": [0]})
    with pytest.raises(KeyboardInterrupt):
        app.bench(settings, tmp_path / "board")
    text = (tmp_path / "board" / "METHODS.md").read_text()
    assert f"| [magnitude]({KNOWN['magnitude'].paper}) |" in text
    assert f"- [wanda]({KNOWN['wanda'].paper}): not measured yet" in text


def test_methods_over_two_texts_need_the_second(tmp_path):
    cell = Cell("tiny", "d_pruner", 0.5, "equal")
    without = board_settings(SMALL)
    assert "contrast_text" not in identity(without), "as boards from before"
    with pytest.raises(UsageError, match="second calibration text for the metric d_pruner, got none"):
        file_of(cell, without, None)
    given = board_settings({**SMALL, "contrast_text": "general.txt"})
    assert identity(given)["contrast_text"] == "general.txt"
    assert file_of(cell, given, None).texts == {"calibration": "docs", "contrast": "general.txt"}
    (tmp_path / "one.txt").write_text("a line of text\n" * 50)
    overlapping = board_settings(
        {**SMALL, "calibration_text": str(tmp_path / "one.txt"), "contrast_text": str(tmp_path / "one.txt")}
    )
    with pytest.raises(
        ValueError, match=r"`sources.contrast: .*one.txt` and `sources.calibration: .*, which overlap"
    ):
        board_texts(overlapping, [])
