"""Report of runs: one self-contained page, by default ``report/index.html`` of a run, and its pictures as files."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from secateur.search.controller import Trial
from secateur.search.files import dump_yaml
from secateur.search.loop.notes import notes_line
from secateur.search.mirror.address import masked
from secateur.search.results.front import hypervolume_series
from secateur.search.results.run import Run
from secateur.search.results.targets import best_by_target, loss_series, target_sparsities
from secateur.search.show.front_plot import FrontPoints, plot_front, plot_fronts
from secateur.search.show.front_table import caption, columns, feasible_baselines, front_rows, outlook
from secateur.search.show.inline_svg import Picture, picture
from secateur.search.show.phases import phase_lines, phases
from secateur.search.show.plots import LEVELS, plot_allocation, plot_course, plot_typeset
from secateur.search.show.report_details import details, heat_of, titles
from secateur.search.show.report_facts import date, hashes, measured, method, numbers, tested
from secateur.search.show.screening import plot_screening, screened
from secateur.search.show.summary import grouped, summary
from secateur.search.show.values import shown
from secateur.search.study.overlap import read_overlap
from secateur.search.study.state import RunState, state_words
from secateur.spaces.whole_file import whole_file

N_TYPESET = 8


def write_report(
    run: Run, trial: Trial | None = None, *, beside: Sequence[Run] = (), to: Path | None = None
) -> list[Path]:
    """Write the page and its pictures into the run's directory; existing ones are replaced.

    Args:
        run: with at least one feasible trial at its largest search fidelity.
        trial: shown in detail; None: the best one of the middle target.
        beside: further such runs, in the same page.
        to: file of the page; None: ``report/index.html`` of the run.

    Returns:
        The files, the page first.

    Raises:
        UsageError: if no trial can be compared.
        OSError: if the files can't be written.
    """
    directory = run.report_directory
    page = to or directory / "index.html"
    parts = [_part(view, trial if view is run else None, f"r{i}-") for i, view in enumerate([run, *beside])]
    files = {name: directory / f"{name}.png" for name in parts[0]["draw"]}
    for name, path in files.items():
        function, *args = parts[0]["draw"][name]
        function(path, *args)
    text = _page([run, *beside], parts)
    page.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(page) as new:
        new.write_text(text, encoding="utf-8")
    return [page, *files.values()]


def _middle(run: Run) -> Trial:
    """Best trial of the middle target, so that it is a pruned one where possible."""
    known = target_sparsities(feasible_baselines(run))
    best = list(best_by_target(run.trials(), known).values()) or run.front()
    return best[len(best) // 2]


def _drawn(run: Run, trial: Trial) -> dict[str, tuple[Any, ...]]:
    """Pictures of a run by name, each a function and its arguments after the path."""
    study = run.study
    losses = loss_series(study.trials, run.fidelity, target_sparsities(feasible_baselines(run)))
    texts = set(study.about.baselines.values())
    volumes = hypervolume_series(study.trials, run.objectives, texts, run.fidelity)
    start = max((t.number for t in run.baselines.values()), default=0)  # volumes before it mean nothing
    volumes = [(number, volume) for number, volume in volumes if number >= start]
    found: dict[str, tuple[Any, ...]] = {
        "front": (plot_front, run),
        "course": (plot_course, losses, volumes, phases(run)),
    }
    if typeset := _typeset(run) if run.space.shown_as else []:
        found["candidate"] = (plot_typeset, typeset)
    elif not run.space.shown_as:
        linears = study.about.facts["shape"]["linears"]
        found["candidate"] = (plot_allocation, run.allocation(trial), linears, f"Trial {trial.number}")
    if screened(run).numbers:
        found["screening"] = (plot_screening, screened(run))
    return found


def _typeset(run: Run) -> list[tuple[str, str]]:
    """Labels and LaTeX of the best candidates and of the baselines, lowest loss first."""
    best = sorted(run.trials(), key=lambda t: t.measurement.values["loss"])
    names = {t.number: name for name, t in run.baselines.items()}
    kept = [t for i, t in enumerate(best) if i <= N_TYPESET or t.number in names]
    pairs = [(run.space.typeset(run.candidate(t)), t) for t in kept]
    return [
        (f"{shown('loss', t.measurement.values['loss'])}  {names.get(t.number, '')}", text)
        for text, t in pairs
        if text
    ]


def templates() -> Environment:
    """The templates of pages; everything from outside is escaped."""
    return Environment(
        loader=PackageLoader("secateur.search.show"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _page(runs: Sequence[Run], parts: Sequence[Mapping[str, Any]]) -> str:
    overview = None
    if len(runs) > 1:
        names = [str(run.study.directory) for run in runs]
        text = "Fronts of the runs: " + "; ".join(
            f"{name}: {FrontPoints(run).described()}" for name, run in zip(names, runs, strict=True)
        )
        overview = picture("fronts", text, plot_fronts, list(zip(names, runs, strict=True)))
    return (
        templates()
        .get_template("report.html")
        .render(parts=parts, overview=overview, made=date(time.time()), levels=LEVELS)
    )


def _part(run: Run, trial: Trial | None, prefix: str) -> dict[str, Any]:
    """Values of the template for one run; `prefix` makes ids unique."""
    rows, trial, facts = front_rows(run), trial or _middle(run), summary(run)
    draw, listed = _drawn(run, trial), details(run, rows, trial)
    return {
        "id": prefix,
        "draw": draw,
        "directory": str(run.study.directory),
        "title": f"{facts['space']} search of {facts['model']}",
        "outlook": outlook(run),
        "state": state_words(RunState(**facts["state"])) if facts["state"] else "",
        "numbers": {**tested(run), **numbers(run, facts)},
        "glance": _glance(facts),
        "pictures": _pictures(run, draw, prefix),
        "columns": columns(run, rows),
        "rows": rows,
        "caption": caption(run).partition("\n")[0],
        "fidelities": [f.n_tokens for f in run.settings.evaluator.search_fidelities],
        "n_partial": len(FrontPoints(run).partial),
        "phases": phase_lines(phases(run)),
        "notes": notes_line(run.notes),
        "screened": screened(run),
        "trial": trial,
        "measured": measured(run, trial),
        "heat": heat_of(run, trial),
        "details": listed[0],
        "further": listed[1],
        "config": dump_yaml(dict(run.space.config(run.candidate(trial)))),
        "shown_as": run.space.shown_as,
        "overlap": read_overlap(run.study.directory),
        "method": method(run),
        "hashes": hashes(run),
        "failures": grouped(facts["infeasible"]),
        "settings": masked(dump_yaml(dict(run.study.settings))),
    }


def _glance(facts: Mapping[str, Any]) -> list[str]:
    """Run in a row of a table of several: evaluations, tokens, front, hypervolume."""
    spent, volume = facts["spent"], facts["hypervolume"]
    last = "–" if volume is None else f"{volume:.3f}"
    return [f"{spent['evaluations']:,}", f"{spent['tokens']:,}", str(facts["front"]), last]


def _pictures(run: Run, draw: Mapping[str, tuple[Any, ...]], prefix: str) -> dict[str, Picture]:
    """Pictures within the page; allocations are tables there."""
    texts = {
        "front": FrontPoints(run).described(),
        "course": _course_words(draw["course"]),
        "candidate": f"The best of each {run.space.shown_as}, typeset, with the loss of each.",
        "screening": "Loss against proxy, and their rank correlation by trial"
        + ("." if (rho := screened(run).correlation) is None else f"; over all candidates it is {rho:.2f}."),
    }
    named: dict[str, dict[str, Any]] = {
        "front": {"titles": titles(run), "link": lambda number: f"#{prefix}trial-{number}"}
    }
    return {
        name: picture(prefix + name, texts[name], function, *args, **named.get(name, {}))
        for name, (function, *args) in draw.items()
        if function is not plot_allocation
    }


def _course_words(drawn: Sequence[Any]) -> str:
    """Course of the search in words, with numbers."""
    _, losses, volumes, _ = drawn
    parts = [
        f"at {label} from {shown('loss', points[0][1])} to {shown('loss', points[-1][1])}"
        for label, points in losses.items()
    ]
    text = "Best loss by tokens evaluated" + (f": {'; '.join(parts)}." if parts else ".")
    return text + (f" Hypervolume of the front at the end: {volumes[-1][1]:.3f}." if volumes else "")
