"""Report of a run: one self-contained page, ``report/index.html``, and its pictures as files beside it."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from secateur.search.controller import Trial
from secateur.search.files import dump_yaml
from secateur.search.loop.notes import notes_line
from secateur.search.losses import loss_of
from secateur.search.mirror.address import masked
from secateur.search.results.front import hypervolume_series
from secateur.search.results.paired import against_baseline
from secateur.search.results.run import Run
from secateur.search.results.targets import best_by_target, loss_series, target_sparsities
from secateur.search.show.front_plot import plot_front
from secateur.search.show.front_table import (
    FrontRow,
    caption,
    columns,
    feasible_baselines,
    front_rows,
    loss_words,
    outlook,
)
from secateur.search.show.plots import plot_allocation, plot_course, plot_typeset
from secateur.search.show.screening import plot_screening, screened
from secateur.search.show.summary import grouped, summary
from secateur.search.show.values import duration, perplexity, scaled, shown
from secateur.search.study.overlap import read_overlap
from secateur.spaces.whole_file import whole_file

DIRECTORY = "report"
N_TYPESET = 8


def write_report(run: Run, trial: Trial | None = None) -> list[Path]:
    """Write the page and its pictures into the run's directory; existing ones are replaced.

    Args:
        run: with at least one feasible trial at its largest search fidelity.
        trial: shown in detail; None: the best one of the middle target.

    Returns:
        The files, the page first.

    Raises:
        UsageError: if no trial can be compared.
        OSError: if the files can't be written.
    """
    rows = front_rows(run)
    trial = trial or _middle(run)
    directory = run.study.directory / DIRECTORY
    drawn = ("candidate",) if not run.space.shown_as or _typeset(run) else ()
    names = ("front", "course", *drawn, *(["screening"] if screened(run).numbers else []))
    pictures = {name: directory / f"{name}.png" for name in names}
    _draw(run, trial, pictures)
    page = directory / "index.html"
    text = _page(run, rows, trial, pictures)
    with whole_file(page) as new:
        new.write_text(text, encoding="utf-8")
    return [page, *pictures.values()]


def _middle(run: Run) -> Trial:
    """Best trial of the middle target, so that it is a pruned one where possible."""
    known = target_sparsities(feasible_baselines(run))
    best = list(best_by_target(run.trials(), known).values()) or run.front()
    return best[len(best) // 2]


def _draw(run: Run, trial: Trial, pictures: Mapping[str, Path]) -> None:
    study = run.study
    plot_front(pictures["front"], run)
    losses = loss_series(study.trials, run.fidelity, target_sparsities(feasible_baselines(run)))
    texts = set(study.about.baselines.values())
    volumes = hypervolume_series(study.trials, run.objectives, texts, run.fidelity)
    start = max((t.number for t in run.baselines.values()), default=0)  # volumes before it mean nothing
    volumes = [(number, volume) for number, volume in volumes if number >= start]
    plot_course(pictures["course"], losses, volumes, study.spent.tokens)
    if "screening" in pictures:
        plot_screening(pictures["screening"], screened(run))
    if "candidate" not in pictures:
        return
    if run.space.shown_as:
        plot_typeset(pictures["candidate"], _typeset(run))
        return
    linears = study.about.facts["shape"]["linears"]
    plot_allocation(pictures["candidate"], run.allocation(trial), linears, f"Trial {trial.number}")


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


def _page(run: Run, rows: Sequence[FrontRow], trial: Trial, pictures: Mapping[str, Path]) -> str:
    facts = summary(run)
    templates = Environment(
        loader=PackageLoader("secateur.search.show"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return templates.get_template("report.html").render(
        title=f"{facts['space']} search of {facts['model']}",
        outlook=outlook(run),
        numbers={**_tested(run), **_numbers(facts)},
        pictures={
            name: base64.b64encode(path.read_bytes()).decode("ascii") for name, path in pictures.items()
        },
        columns=columns(run),
        rows=rows,
        caption=caption(run).partition("\n")[0],
        notes=notes_line(run.notes),
        screened=screened(run),
        trial=trial,
        measured=_measured(run, trial),
        config=dump_yaml(dict(run.space.config(run.candidate(trial)))),
        shown_as=run.space.shown_as,
        overlap=read_overlap(run.study.directory),
        method=_method(run),
        failures=grouped(facts["infeasible"]),
        settings=masked(dump_yaml(dict(run.study.settings))),
    )


def _tested(run: Run) -> dict[str, str]:
    """Ratio of the test loss of each target's best model, by its caption."""
    best = best_by_target(run.trials(), target_sparsities(feasible_baselines(run)))
    found = {label: against_baseline(run, trial) for label, trial in best.items()}
    return {
        f"the loss of {x.of} on the test text, at sparsity {label}; ± 95 % over its windows": f"{x.text} ×"
        for label, x in found.items()
        if x is not None
    }


def _numbers(facts: Mapping[str, Any]) -> dict[str, str]:
    """Summary of the run in a few large numbers, by their captions."""
    spent = facts["spent"]
    n_blocks = spent["blocks"] + spent["blocks_saved"]
    limits = ", ".join(f"{value:,} {name}" for name, value in facts["budget"].items())
    volume = facts["hypervolume"]
    cards = {
        f"evaluations, of a budget of {limits}": f"{spent['evaluations']:,}",
        "tokens evaluated for the search": scaled(spent["tokens"]),
        "of work, summed over workers": duration(spent["seconds"]),
        f"of {n_blocks:,} block evaluations saved by sharing": f"{spent['blocks_saved'] / max(1, n_blocks):.0%}",
        "trials on the front": str(facts["front"]),
        "hypervolume (1 = the baselines' box)": "–" if volume is None else f"{volume:.3f}",
    }
    for label, best in facts["best"].items():
        if best["reference_loss"] > 0:
            name = f"the loss of {best['reference']}, at sparsity {label}, on the search text"
            cards[name] = f"{best['loss'] / best['reference_loss']:.2f} ×"
    return cards


def _measured(run: Run, trial: Trial) -> str:
    """Values of the trial in detail, on the search text and on the test text."""
    values, test = trial.measurement.values, run.test_of(trial)
    text = f"Sparsity {shown('sparsity', values.get('sparsity'))}, {_loss_and_perplexity(values)}"
    if test is not None and test.infeasible is None:
        text += f"; on the test text {_loss_and_perplexity(test.values)}"
    return text


def _loss_and_perplexity(values: Mapping[str, float]) -> str:
    loss = f"loss {shown('loss', values['loss'])}"
    return f"{loss}, perplexity {shown('ppl', perplexity(values))}" if "ce" in values else loss


def _method(run: Run) -> dict[str, str]:
    """Data, settings and versions behind the numbers, with hashes."""
    of, about = run.settings.evaluator, run.study.about
    facts = {
        "model": run.settings.model,
        "loss": loss_of(of.loss).summary + (", mean in " + unit if (unit := loss_of(of.loss).unit) else ""),
        "perplexity": f"exp of the mean cross-entropy of the next token, windows of {of.window} tokens, no overlap",
        "search text": f"{of.data.search}, {', '.join(f'{n:,}' for n in of.fidelities)} tokens (nested)",
        "test text": f"{of.data.test}, {of.test_tokens:,} tokens; no controller sees it",
        "calibration text": f"{of.data.calibration}, {of.calibration_tokens:,} tokens",
        "seeds": f"{run.settings.seed} of the controller, {run.settings.data_seed} of the windows",
    }
    if of.training is not None:
        facts["light training"] = of.training.text
    also = [case.name for case in run.settings.space.cases]
    if also:
        facts["loss"] = f"{loss_words(run)}; cases: {'; '.join(['main', *also])}"
    content = about.identity.get("content", {})
    facts |= {f"sha256 of {name.replace('_', ' ')}": str(value) for name, value in content.items()}
    facts |= {name: str(version) for name, version in about.facts.get("versions", {}).items()}
    return facts
