"""Page of a report as a browser shows it, and what its parts say."""

import re
import shutil
from html import unescape
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from secateur.search.results.run import Run
from secateur.search.results.targets import best_references, references
from secateur.search.show import report_facts
from secateur.search.show.front_plot import FrontPoints, plot_front
from secateur.search.show.front_table import feasible_baselines, front_rows
from secateur.search.show.inline_svg import picture
from secateur.search.show.phases import phases
from secateur.search.show.report import write_report
from secateur.search.show.report_details import details, heat_of, titles
from secateur.search.study.state import write_state
from secateur.search.study.study import Study
from tests.browser import look
from tests.runs import SMALL, make_run, make_space, measure

LONG = "a model with a long name/" + "0123456789abcdef" * 8


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run in which some candidates were measured on fewer tokens alone."""
    found = make_run(tmp_path_factory.mktemp("page") / "run", model=LONG)
    space = make_space(found.settings)
    rng = np.random.default_rng(7)
    with Study.open_or_create(found.study.directory, dict(found.study.settings), found.study.about) as study:
        study.append([measure(space, space.sample(rng, 0), SMALL) for _ in range(3)])
    return Run(Study.open(found.study.directory))


@pytest.fixture(scope="module")
def page(run):
    return write_report(run)[0]


WIDTHS = pytest.mark.parametrize("width", [390, 1280])


@WIDTHS
def test_the_page_is_as_wide_as_the_screen(page, width):
    found = look(
        page,
        width,
        """for (const fold of doc.querySelectorAll("details")) fold.open = true;
        const seen = [...doc.querySelectorAll("figure svg")].filter(x => x.getClientRects().length);
        const text = Math.min(...seen.flatMap(x => [...x.querySelectorAll("text")])
          .filter(x => x.getClientRects().length).map(x => x.getBoundingClientRect().height));
        const out = [...doc.querySelectorAll("main *")].filter(x => !x.closest(".scroll") && !x.closest("svg")
          && x.getBoundingClientRect().right > win.innerWidth + 1).map(x => x.outerHTML.slice(0, 80));
        return {width: doc.documentElement.scrollWidth, pictures: seen.length, text, out};""",
    )
    assert found["width"] == width, found["out"]
    assert found["out"] == []  # long names wrap
    assert found["pictures"] == 2  # of front and course, in the form for this width
    assert found["text"] >= 9  # pixels


@WIDTHS
def test_a_click_on_a_point_shows_its_model_and_the_command(page, run, width):
    number = run.front()[-1].number
    found = look(
        page,
        width,
        f"""const points = [...doc.querySelectorAll('a.hit[data-trial="{number}"]')];
        const point = points.find(x => x.getClientRects().length);
        const panel = doc.querySelector(".chosen"), before = panel.hidden;
        point.dispatchEvent(new win.MouseEvent("click", {{bubbles: true, cancelable: true}}));
        const box = panel.getBoundingClientRect();
        return {{before, after: panel.hidden, text: panel.innerText, cells: panel.querySelectorAll(".heat td").length,
                title: point.querySelector("title").textContent, on: point.classList.contains("on")}};""",
    )
    assert (found["before"], found["after"], found["on"]) == (True, False, True)
    assert f"Trial {number}" in found["text"]
    command = f"secateur export {run.study.directory} {number} --to {run.study.directory}-trial-{number}"
    assert command in found["text"]
    assert found["cells"] == 6  # three projections of two blocks
    assert found["title"] == titles(run)[number]


def test_a_point_without_details_still_names_its_command(page, run):
    number = FrontPoints(run).partial[0].number
    found = look(
        page,
        1280,
        f"""const point = doc.querySelector('a.hit[data-trial="{number}"]');
        point.dispatchEvent(new win.MouseEvent("click", {{bubbles: true, cancelable: true}}));
        return doc.querySelector(".chosen").innerText;""",
    )
    assert "on 1,024 tokens alone" in found
    assert f"secateur export {run.study.directory} {number} --to" in found


def test_a_click_on_a_heading_sorts_by_numbers(page, run):
    script = """const head = [...doc.querySelectorAll("table.sortable th")].find(x => x.textContent.startsWith("loss"));
        const column = head.cellIndex, rows = () => [...head.closest("table").tBodies[0].rows]
          .map(x => parseFloat(x.cells[column].textContent));
        head.querySelector("button").click(); const up = rows();
        head.querySelector("button").click();
        return {up, down: rows(), sort: head.getAttribute("aria-sort")};"""
    found = look(page, 1280, script)
    assert found["up"] == sorted(found["up"])
    assert found["down"] == found["up"][::-1]
    assert found["sort"] == "descending"
    assert len(found["up"]) == len(front_rows(run))


def test_without_a_script_every_link_leads_to_a_model(page):
    text = re.sub(r"<script>.*</script>", "", page.read_text(), flags=re.DOTALL)
    table = text[text.index("<tbody>") : text.index("</tbody>")]
    targets = set(re.findall(r'href="#(r0-trial-\d+)"', table))
    assert targets
    assert targets <= set(re.findall(r'<details class="model" id="([^"]+)"', text))


def test_names_with_markup_do_not_run(tmp_path):
    run = make_run(tmp_path / "run", model="</script><script>document.title='hit'</script>\"'<img src=x>")
    found = look(write_report(run)[0], 390, "return {title: doc.title, images: doc.images.length};")
    assert found["title"].startswith("Allocation search of </script>")
    assert found["images"] == 0


def test_the_picture_is_described_with_its_numbers(page, run):
    text = FrontPoints(run).described()
    assert f"{len(run.trials())} models measured on 2,048 tokens, and 3 on fewer" in text
    first, last = run.front()[0].measurement.values, run.front()[-1].measurement.values
    assert f"parameters {last['params']:.0f} with loss {last['loss']:.4f}" in text
    assert f"parameters {first['params'] / 1000:.4g} k with loss {first['loss']:.4f}" in text
    assert f'aria-label="{text}"' in unescape(page.read_text())


def test_the_front_is_a_staircase_of_what_is_reached(run):
    """At a number of parameters the loss of the largest model that is not larger."""
    svg = picture("front", "", plot_front, run).wide
    (steps,) = re.findall(r'<path d="([^"]*)"[^>]*stroke: #0072b2; stroke-width: 1\.4', svg)
    places = [tuple(map(float, x.split())) for x in re.findall(r"[ML] ([\d.]+ [\d.]+)", steps)]
    assert len(places) == 2 * len(FrontPoints(run).front) - 1
    for (x0, y0), (x1, y1), (x2, y2) in zip(places[::2], places[1::2], places[2::2], strict=False):
        assert y0 == y1
        assert x0 < x1
        assert x1 == x2
        assert y2 > y1  # downwards: more parameters, less loss


def test_allocations_are_tables_of_percentages(run):
    trial = next(t for t in run.trials() if len(set(run.allocation(t).values())) > 2)
    heat, shares = heat_of(run, trial), run.allocation(trial)
    assert list(heat.rows) == ["self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"]
    for row, cells in heat.rows.items():
        for block, cell in zip(heat.blocks, cells, strict=True):
            assert cell == round(100 * shares[f"model.layers.{block}.{row}"])
    uniform = heat_of(run, run.baselines["uniform@0.6"])
    assert uniform.rows == {"self_attn": [60, 60], "mlp": [60, 60]}  # alike within each


def test_details_have_both_texts(run):
    listed, further = details(run, front_rows(run), run.front()[0])
    found = next(d for d in listed if d.number == run.front()[0].number)
    test = run.test_of(run.front()[0])
    assert found.values["loss"][1] == f"{test.values['loss']:.4f}"
    numbers = {d.number for d in [*listed, *further]}
    assert {t.number for t in run.trials()} == numbers


def test_phases_follow_each_other(tmp_path):
    start = {"kind": "evolution", "start": "sensitivity", "sensitivity": {"levels": [0.5]}}
    run = make_run(tmp_path / "run", controller=start, n_trials=30)
    found = phases(run)
    assert [p.name for p in found] == ["baselines", "start by sensitivity", "search by evolution"]
    assert found[0].first == 0
    assert found[0].end == len(run.study.about.baselines)
    assert all(a.end == b.first and a.end_tokens == b.first_tokens for a, b in pairwise(found))
    assert found[-1].end_tokens == run.study.spent.tokens
    plain = make_run(tmp_path / "plain", controller={"kind": "evolution", "start": "uniform"})
    assert [p.name for p in phases(plain)] == ["baselines", "search by evolution"]


def test_the_state_of_the_run_is_told(tmp_path):
    run = make_run(tmp_path / "run")
    assert "State:" not in write_report(run)[0].read_text()  # a run of old
    write_state(tmp_path / "run", "finished", "<its budget> is used up")
    assert "State: finished: &lt;its budget&gt; is used up." in write_report(run)[0].read_text()


def test_several_runs_share_a_page(run, tmp_path, secateur):
    other = make_run(tmp_path / "other", seed=3, n_trials=6)
    page = tmp_path / "both" / "page.html"
    status, out, _ = secateur("report", run.study.directory, "--beside", other.study.directory, "--to", page)
    assert status == 0
    assert str(page) in out
    found = look(
        page,
        390,
        """const ids = [...doc.querySelectorAll("[id]")].map(x => x.id);
        return {width: doc.documentElement.scrollWidth, twice: ids.filter((x, i) => ids.indexOf(x) !== i),
                rows: doc.querySelector("table").tBodies[0].rows.length, title: doc.title};""",
    )
    assert found == {"width": 390, "twice": [], "rows": 2, "title": "2 searches"}


@pytest.fixture(scope="module")
def recipes(tmp_path_factory):
    """Copy of a run of recipes, whose first baseline is not the best."""
    to = tmp_path_factory.mktemp("recipes") / "run"
    shutil.copytree(Path(__file__).parent / "old_runs" / "recipe", to)
    return Run(Study.open(to))


@WIDTHS
def test_a_number_and_its_sign_stay_in_one_line_of_their_card(recipes, width):
    found = look(
        write_report(recipes)[0],
        width,
        """const numbers = [...doc.querySelectorAll(".number b")];
        numbers[0].innerText = "0.039 ± 0.004\\u00a0×";  // as long as a ratio with its interval is
        return {lines: Math.max(...numbers.map(x => x.offsetHeight / parseFloat(win.getComputedStyle(x).lineHeight))),
                out: Math.max(...numbers.map(x => x.scrollWidth - x.clientWidth))};""",
    )
    assert found["lines"] == pytest.approx(1, abs=0.05)
    assert found["out"] <= 0


def test_recipes_are_read_without_scrolling_and_beside_the_best_baseline(recipes):
    page = write_report(recipes)[0]
    found = look(
        page,
        1280,
        """const table = doc.querySelector("table.sortable.first"), box = table.closest(".scroll");
        const text = [...table.tBodies[0].rows].map(x => x.lastElementChild);
        return {cut: box.scrollWidth - box.clientWidth, width: Math.min(...text.map(x => x.offsetWidth)),
                lines: Math.max(...text.map(x => x.offsetHeight / parseFloat(win.getComputedStyle(x).lineHeight))),
                links: table.querySelectorAll("a[data-trial]").length, rows: text.length, words: doc.body.innerText,
                note: text[1].innerText};""",
    )
    assert found["cut"] <= 0
    assert found["width"] >= 340
    assert found["lines"] <= 8
    assert found["links"] == found["rows"] == len(front_rows(recipes))
    assert "for its recipe and the command that exports it" in found["words"]
    assert "0.04x the loss of wanda_sp@0.2 in the search" in found["note"]
    names = references(recipes.baselines), best_references(feasible_baselines(recipes))
    assert names == ({"0.2": "wanda_sp@0.2"}, {"0.2": "ziplm@0.2"})
    best = recipes.study.trials[24]
    loss, reference = (recipes.test_of(x).values["loss"] for x in (best, recipes.baselines["ziplm@0.2"]))
    (headline,) = report_facts.tested(recipes).items()
    assert headline[0].startswith("the loss of ziplm@0.2 on the test text, at the target 0.2")
    assert headline[1].startswith(f"{loss / reference:.3f}")
    assert headline[1].endswith("×")
    assert headline[1].removesuffix("\N{NO-BREAK SPACE}×") in found["words"]
    losses = {x: recipes.baselines[x].measurement.values["loss"] for x in recipes.baselines if x != "dense"}
    assert min(losses, key=losses.get) == "ziplm@0.2"
