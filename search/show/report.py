"""A run as one self-contained page: ``report/index.html``, with its pictures beside it as files, too."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from secateur.search.controller import Trial
from secateur.search.errors import UsageError
from secateur.search.files import dump_yaml
from secateur.search.mirror.address import masked
from secateur.search.results.course import best_by_budget, budgets, loss_series
from secateur.search.results.front import hypervolume_series
from secateur.search.results.run import Run
from secateur.search.show.front_plot import plot_front
from secateur.search.show.overlap import overlap_table
from secateur.search.show.plots import plot_allocation, plot_course, plot_typeset
from secateur.search.show.reasons import grouped
from secateur.search.show.screening import plot_screening, screened, screening_section
from secateur.search.show.summary import summary
from secateur.search.show.tables import Row, caption, columns, front_rows, loss_words, outlook
from secateur.search.show.values import duration, perplexity, scaled, shown

DIRECTORY = "report"
N_TYPESET = 8


def write_report(run: Run, trial: Trial | None = None) -> list[Path]:
    """Write the page and its pictures into the run's directory; existing ones are replaced.

    Args:
        run: with at least one feasible trial at its largest search fidelity.
        trial: to show in detail; None for the best one of the middle budget.

    Returns:
        The files, the page first.

    Raises:
        UsageError: if there is nothing to report.
        OSError: if the files can't be written.
    """
    rows = front_rows(run)
    if not rows:
        raise UsageError(
            f"Expected a run with trials to compare, got {run.study.directory} without. Let it search on."
        )
    trial = trial or _middle(run)
    directory = run.study.directory / DIRECTORY
    drawn = ("candidate",) if not run.space.shown_as or _typeset(run) else ()
    names = ("front", "course", *drawn, *(["screening"] if screened(run).numbers else []))
    pictures = {name: directory / f"{name}.png" for name in names}
    _draw(run, trial, pictures)
    page = directory / "index.html"
    page.write_text(_page(run, rows, trial, pictures), encoding="utf-8")
    return [page, *pictures.values()]


def _middle(run: Run) -> Trial:
    """The best trial of the middle budget: a pruned one, where there is any."""
    baselines = {n: t for n, t in run.baselines.items() if t.measurement.infeasible is None}
    best = list(best_by_budget(run.trials(), budgets(baselines)).values()) or run.front()
    return best[len(best) // 2]


def _draw(run: Run, trial: Trial, pictures: Mapping[str, Path]) -> None:
    study, baselines = run.study, run.baselines
    feasible = {name: t for name, t in baselines.items() if t.measurement.infeasible is None}
    plot_front(pictures["front"], run)
    losses = loss_series(study.trials, run.fidelity, budgets(feasible))
    texts = set(study.about.baselines.values())
    volumes = hypervolume_series(study.trials, run.objectives, texts, run.fidelity)
    start = max((t.number for t in baselines.values()), default=0)  # before it the volume says nothing
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
    plot_allocation(
        pictures["candidate"], run.allocation(trial), linears, f"What trial {trial.number} removes"
    )


def _typeset(run: Run) -> list[tuple[str, str]]:
    """The best candidates and the baselines in LaTeX, each with its loss, best first."""
    best = sorted(run.trials(), key=lambda t: t.measurement.values["loss"])
    names = {t.number: name for name, t in run.baselines.items()}
    kept = [t for i, t in enumerate(best) if i <= N_TYPESET or t.number in names]
    pairs = [(run.space.typeset(run.space.parse(t.measurement.candidate)), t) for t in kept]
    return [
        (f"{shown('loss', t.measurement.values['loss'])}  {names.get(t.number, '')}", text)
        for text, t in pairs
        if text
    ]


def _page(run: Run, rows: Sequence[Row], trial: Trial, pictures: Mapping[str, Path]) -> str:
    facts, templates = summary(run), resources.files("secateur.search.show") / "templates"
    title = f"{facts['space']} search of {facts['model']}"
    return Template((templates / "report.html").read_text(encoding="utf-8")).substitute(
        title=escape(title[0].upper() + title[1:]),
        css=(templates / "report.css").read_text(encoding="utf-8"),
        label=escape(outlook(run)[0].upper() + outlook(run)[1:]) + ".",
        numbers=_numbers(facts),
        front_picture=_image(
            pictures["front"], "Loss against the other objective for all trials, front and baselines"
        ),
        front_table=_front_table(run, rows),
        caption=escape(caption(run).partition("\n")[0]),
        course_picture=_image(pictures["course"], "Best loss by tokens, and hypervolume by trial"),
        screening=_screening(run, pictures.get("screening")),
        trial=trial.number,
        trial_text=_trial_text(run, trial),
        candidate_picture=_candidate(run, trial, pictures.get("candidate")),
        overlap=overlap_table(run),
        method=_facts_table(_method(run)),
        failures=_failures(facts["infeasible"]),
        settings=escape(masked(dump_yaml(dict(run.study.settings)))),
    )


def _candidate(run: Run, trial: Trial, picture: Path | None) -> str:
    """What the trial is: drawn, or where that can't be, its plain configuration."""
    if picture is None:
        config = run.space.config(run.space.parse(trial.measurement.candidate))
        return f"<pre>{escape(dump_yaml(dict(config)))}</pre>"
    of_linears = "Share of each linear that is removed, and the mean of each block"
    return _image(picture, f"The best of each {run.space.shown_as}" if run.space.shown_as else of_linears)


def _numbers(facts: Mapping[str, Any]) -> str:
    """The summary in a few large numbers."""
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
            name = f"the loss of {best['reference']}, at sparsity {label}"
            cards[name] = f"{best['loss'] / best['reference_loss']:.2f} ×"
    return "\n".join(
        f'<div class="number"><b>{escape(number)}</b><span>{escape(text)}</span></div>'
        for text, number in cards.items()
    )


def _front_table(run: Run, rows: Sequence[Row]) -> str:
    cells = columns(run)
    head = "".join(f"<th>{escape(heading)}</th>" for heading, _ in cells)
    body = "\n".join(
        f"<tr{'' if row.on_front else ' class=beside'}>"
        + "".join(f"<td>{escape(cell(row))}</td>" for _, cell in cells)
        + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def _trial_text(run: Run, trial: Trial) -> str:
    values, test = trial.measurement.values, run.test_of(trial)
    text = f"Sparsity {shown('sparsity', values.get('sparsity'))}, loss {shown('loss', values['loss'])}"
    text += f", perplexity {shown('ppl', perplexity(values))}" if "ce" in values else ""
    if test is not None and test.infeasible is None:
        text += f"; on the test text loss {shown('loss', test.values['loss'])}"
        text += f", perplexity {shown('ppl', perplexity(test.values))}" if "ce" in test.values else ""
    return f"{escape(text)}. Its candidate: <code>{escape(trial.measurement.candidate)}</code>"


def _method(run: Run) -> dict[str, str]:
    """What the numbers are based on, with hashes."""
    of, about = run.settings.evaluator, run.study.about
    losses = {"kl": "KL divergence to the dense model", "ce": "cross-entropy of the next token"}
    facts = {
        "model": run.settings.model,
        "loss": f"{losses[of.loss]}, mean over tokens, in nats",
        "perplexity": f"exp of the mean cross-entropy of the next token, windows of {of.window} tokens, no overlap",
        "search text": f"{of.data.search}, {', '.join(f'{n:,}' for n in of.fidelities)} tokens (nested)",
        "test text": f"{of.data.test}, {of.test_tokens:,} tokens; no controller sees it",
        "calibration text": f"{of.data.calibration}, {of.calibration_tokens:,} tokens",
        "seeds": f"{run.settings.seed} of the controller, {of.seed} of the windows",
    }
    if of.training is not None:
        facts["light training"] = of.training.text
    also = [case.name for case in getattr(run.settings.space, "also", ())]
    if also:
        facts["loss"] = f"{loss_words(run)}; cases: {'; '.join(['main', *also])}"
    content = about.identity.get("content", {})
    facts |= {f"sha256 of {name.replace('_', ' ')}": str(value) for name, value in content.items()}
    facts |= {name: str(version) for name, version in about.facts.get("versions", {}).items()}
    return facts


def _screening(run: Run, picture: Path | None) -> str:
    about = "Loss against proxy, and their rank correlation by trial"
    return screening_section(run, screened(run), "" if picture is None else _image(picture, about))


def _failures(infeasible: Mapping[str, int]) -> str:
    if not infeasible:
        return "<p>None: every candidate could be measured.</p>"
    pairs = grouped(sorted(infeasible.items(), key=lambda pair: -pair[1]))
    return _facts_table({reason: f"{n:,} measurements" for reason, n in pairs}, wide=True)


def _facts_table(facts: Mapping[str, str], *, wide: bool = False) -> str:
    pairs: Iterable[tuple[str, str]] = ((b, a) for a, b in facts.items()) if wide else facts.items()
    lines = "\n".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in pairs)
    return f'<div class="scroll"><table class="facts"><tbody>\n{lines}\n</tbody></table></div>'


def _image(path: Path, description: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<img alt="{escape(description)}" src="data:image/png;base64,{data}">'
