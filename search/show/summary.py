"""A run in a few facts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from secateur.search.loop.notes import notes_line
from secateur.search.results.run import Run
from secateur.search.show.progress import Progress
from secateur.search.show.reasons import grouped
from secateur.search.show.values import duration, shown
from secateur.search.study.lock import writer_of

MOST_REASONS = 6


def summary(run: Run, progress: Progress | None = None) -> dict[str, Any]:
    """Plain values for programs; see `status_lines` for people.

    Args:
        run: the run.
        progress: folded from its trials, if that was done before.
    """
    if progress is None:
        progress = Progress(run.settings, run.study.about.baselines)
        progress.add(run.study.trials)
    return {
        "run": str(run.study.directory),
        "model": run.settings.model,
        "space": run.settings.space.kind,
        "controller": run.settings.controller.kind,
        "writer": writer_of(run.study.directory),
        **progress.facts(),
        "notes": run.notes,
    }


def status_lines(facts: Mapping[str, Any]) -> dict[str, str]:
    """The facts for people."""
    spent, budget = facts["spent"], facts["budget"]
    n_blocks = spent["blocks"] + spent["blocks_saved"]
    lines = {
        "run": facts["run"],
        "search": f"{facts['space']} of {facts['model']}, controller {facts['controller']}",
        "now": f"written by {facts['writer']}" if facts["writer"] else "nobody is writing it",
        "spent": f"{spent['evaluations']:,} evaluations, {spent['tokens']:,} tokens, {duration(spent['seconds'])} "
        f"of work",
        "pace": _pace(facts.get("evaluations_per_hour")),
        "budget": ", ".join(f"{value:,} {name}" for name, value in budget.items())
        + f" ({facts['used']:.0%} used)",
        "blocks": f"{spent['blocks']:,} computed, {spent['blocks_saved']:,} saved "
        f"({spent['blocks_saved'] / max(1, n_blocks):.0%})",
        "measured": ", ".join(f"{n:,} at {fidelity}" for fidelity, n in facts["measurements"].items()),
        "front": f"{facts['front']} trials" + _hypervolume(facts["hypervolume"]),
    }
    lines["counted"] = notes_line(facts["notes"])
    for label, best in facts["best"].items():
        lines[f"best at {label}"] = (
            f"loss {shown('loss', best['loss'])} (trial {best['trial']}); {_beside(best)}"
        )
    for reason, n in grouped(facts["infeasible"])[:MOST_REASONS]:
        name = f"{n:,} infeasible"
        lines[name] = f"{lines[name]} {reason}" if name in lines else reason
    return {name: line for name, line in lines.items() if line}


def status_line(facts: Mapping[str, Any]) -> str:
    """What changes while a search runs, in one line."""
    spent = facts["spent"]
    n_blocks = spent["blocks"] + spent["blocks_saved"]
    losses = [
        f"{shown('loss', best['loss'])} at {label} ({_beside(best)})" for label, best in facts["best"].items()
    ]
    failures = grouped(facts["infeasible"])[:MOST_REASONS]
    parts = [
        f"{facts['used']:.0%}: {spent['evaluations']:,} evaluations, {spent['tokens']:,} tokens",
        _pace(facts.get("evaluations_per_hour")),
        notes_line(facts["notes"]),
        f"{spent['blocks_saved'] / n_blocks:.0%} of blocks saved" if n_blocks else "",
        f"front {facts['front']}" + _hypervolume(facts["hypervolume"]),
        f"best {', '.join(losses)}" if losses else "",
        f"infeasible: {', '.join(f'{n} {reason!r}' for reason, n in failures)}" if failures else "",
    ]
    return "; ".join(part for part in parts if part)


def _beside(best: Mapping[str, Any]) -> str:
    """The baseline that the best trial of a target is compared with, and its loss."""
    return f"{best['reference']} {shown('loss', best['reference_loss'])}"


def _pace(evaluations_per_hour: float | None) -> str:
    return "" if evaluations_per_hour is None else f"{evaluations_per_hour:,.0f} evaluations/h"


def _hypervolume(value: float | None) -> str:
    return "" if value is None else f", hypervolume {value:.4f}"
