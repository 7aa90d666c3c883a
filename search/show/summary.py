"""Summary of a run or of a running search: plain values for programs, lines for people."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from secateur.search.loop.notes import notes_line
from secateur.search.results.run import Run
from secateur.search.show.forecast import truth_line
from secateur.search.show.progress import Progress
from secateur.search.show.values import duration, shown
from secateur.search.study.foreseen import read_foreseen
from secateur.search.study.lock import writer_of
from secateur.search.study.state import RunState, read_state, state_words

if TYPE_CHECKING:
    from rich.table import Table

Facts = Mapping[str, Any]

N_REASONS = 6
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")


def summary(run: Run, progress: Progress | None = None) -> dict[str, Any]:
    """Plain values for programs; `progress` is the fold over the run's trials, if there is one already."""
    if progress is None:
        progress = Progress(run.settings, run.study.about.baselines)
        progress.add(run.study.trials)
    for trial in progress.front:
        run.candidate(trial)
    foreseen = read_foreseen(run.study.directory)
    return {
        "run": str(run.study.directory),
        "model": run.settings.model,
        "space": run.settings.space.kind,
        "controller": run.settings.controller.kind,
        "writer": writer_of(run.study.directory),
        "state": None if (state := read_state(run.study.directory)) is None else state.to_json(),
        **progress.facts(),
        "notes": run.notes,
        "forecast": None if foreseen is None else {"forecast": foreseen[0], "truth": foreseen[1]},
    }


def status_lines(facts: Facts) -> dict[str, str]:
    """Lines for people, by name, from the facts of `Progress`, of its pace and of the run where there are any."""
    spent = facts["spent"]
    lines = {}
    if "run" in facts:
        lines = {
            "run": facts["run"],
            "search": f"{facts['space']} of {facts['model']}, controller {facts['controller']}",
            **({"state": state_words(RunState(**facts["state"]))} if facts["state"] else {}),
            "now": f"written by {facts['writer']}" if facts["writer"] else "no process is writing it",
        }
    lines |= {
        "spent": f"{_counts(facts)}, {duration(spent['seconds'])} of work",
        "pace": ", ".join(_pace(facts)),
        "budget": f"{', '.join(f'{n:,} {name}' for name, n in facts['budget'].items())} ({facts['used']:.0%} used)",
        "blocks": f"{spent['blocks']:,} computed, {spent['blocks_saved']:,} saved ({_saved(spent):.0%})",
        "measured": ", ".join(f"{n:,} at {fidelity}" for fidelity, n in facts["measurements"].items()),
        "front": f"{facts['front']} trials{_hypervolume(facts)}",
        "counted": notes_line(facts["notes"]),
    }
    if facts.get("forecast"):
        lines["forecast"] = truth_line(**facts["forecast"])
    for label, best in facts["best"].items():
        ratio = f", ratio {best['loss'] / best['reference_loss']:.2f}" if best["reference_loss"] > 0 else ""
        loss = f"loss {shown('loss', best['loss'])} (trial {best['trial']})"
        lines[f"best at {label}"] = f"{loss}; {_beside(best)}{ratio}"
    for reason, n in grouped(facts["infeasible"])[:N_REASONS]:
        name = f"{n:,} infeasible"
        lines[name] = f"{lines[name]} {reason}" if name in lines else reason
    return {name: line for name, line in lines.items() if line}


def status_line(facts: Facts) -> str:
    """All that changes while a search runs, in one line; `facts` as for `status_lines`."""
    spent = facts["spent"]
    screened = sum(n for fidelity, n in facts["measurements"].items() if fidelity.startswith("proxy"))
    losses = [f"{shown('loss', x['loss'])} at {label} ({_beside(x)})" for label, x in facts["best"].items()]
    failures = [f"{n} {reason!r}" for reason, n in grouped(facts["infeasible"])[:N_REASONS]]
    parts = [
        f"{_counts(facts)} ({facts['used']:.0%} of the budget)",
        f"{screened:,} screened" if screened else "",
        *_pace(facts),
        notes_line(facts["notes"]),
        f"{spent['blocks']:,} blocks ({_saved(spent):.0%} saved)" if spent["blocks"] else "",
        f"front of {facts['front']}{_hypervolume(facts)}",
        f"best {', '.join(losses)}" if losses else "",
        f"infeasible: {', '.join(failures)}" if failures else "",
    ]
    return "; ".join(part for part in parts if part)


def as_table(lines: Mapping[str, str]) -> Table:
    """Names and lines for a terminal."""
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    for name, line in lines.items():
        table.add_row(Text(name, "dim"), Text(line))  # as they are, not as markup
    return table


def grouped(reasons: Mapping[str, int]) -> list[tuple[str, int]]:
    """Reasons with their counts, the most frequent first; those that differ only in numbers count as one.

    Args:
        reasons: counts by reason. A group is named after its most frequent reason.
    """
    names: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for reason, n in Counter(reasons).most_common():
        counts[names.setdefault(_NUMBER.sub("#", reason), reason)] += n
    return counts.most_common()


def _counts(facts: Facts) -> str:
    """Evaluations and tokens, each with its budget; measurements of earlier processes are told apart."""
    spent, budget = facts["spent"], facts["budget"]
    known = f" ({facts['known']:,} from before)" if facts.get("known") else ""
    evaluations, tokens = (
        f"{spent[name]:,}" + (f"/{budget[name]:,}" if name in budget else "")
        for name in ("evaluations", "tokens")
    )
    return f"{evaluations} evaluations{known}, {tokens} tokens"


def _pace(facts: Facts) -> list[str]:
    speed, pace, left = (
        facts.get(name) for name in ("tokens_per_second", "evaluations_per_hour", "seconds_left")
    )
    return [
        *([] if speed is None else [f"{speed:,.0f} tokens/s"]),
        *([] if pace is None else [f"{pace:,.0f} evaluations/h"]),
        *([f"about {duration(left)} left"] if left else []),
    ]


def _saved(spent: Mapping[str, int]) -> float:
    """Share of the block evaluations that were saved by sharing."""
    return spent["blocks_saved"] / max(1, spent["blocks"] + spent["blocks_saved"])


def _beside(best: Mapping[str, Any]) -> str:
    """Baseline that the best trial of a target is compared with, and its loss."""
    return f"{best['reference']} {shown('loss', best['reference_loss'])}"


def _hypervolume(facts: Facts) -> str:
    return "" if facts["hypervolume"] is None else f", hypervolume {facts['hypervolume']:.4f}"
