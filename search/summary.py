"""A run in a few facts."""

from __future__ import annotations

import json
import os
import socket
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from secateur.search.course import UNIFORM, best_by_budget, budgets
from secateur.search.display import duration
from secateur.search.front import hypervolume_series
from secateur.search.lock import RunLock
from secateur.search.run import Run
from secateur.search.tables import shown


def summary(run: Run) -> dict[str, Any]:
    """Plain values for programs; see `status_lines` for people."""
    study, settings = run.study, run.settings
    baselines = {n: t for n, t in run.baselines.items() if t.measurement.infeasible is None}
    best = best_by_budget(run.trials(), budgets(baselines))
    volumes = hypervolume_series(
        study.trials, run.objectives, set(study.about.baselines.values()), run.fidelity
    )
    return {
        "run": str(study.directory),
        "model": settings.model,
        "space": settings.space.kind,
        "controller": settings.controller.kind,
        "writer": _writer(study.directory),
        "measurements": dict(Counter(t.measurement.fidelity.text for t in study.trials)),
        "infeasible": dict(
            Counter(t.measurement.infeasible for t in study.trials if t.measurement.infeasible)
        ),
        "spent": asdict(study.spent),
        "budget": settings.budget.model_dump(exclude_none=True),
        "front": len(run.front()),
        "hypervolume": volumes[-1][1] if volumes else None,
        "best": {label: _beside(trial, baselines[UNIFORM + label]) for label, trial in best.items()},
    }


def _beside(trial: Any, uniform: Any) -> dict[str, Any]:
    losses = {"loss": trial.measurement.values["loss"], "uniform": uniform.measurement.values["loss"]}
    return {"trial": trial.number, **losses}


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
        "budget": ", ".join(f"{value:,} {name}" for name, value in budget.items()),
        "blocks": f"{spent['blocks']:,} computed, {spent['blocks_saved']:,} saved "
        f"({spent['blocks_saved'] / max(1, n_blocks):.0%})",
        "measured": ", ".join(f"{n:,} at {fidelity}" for fidelity, n in facts["measurements"].items()),
        "front": f"{facts['front']} trials" + _hypervolume(facts["hypervolume"]),
    }
    for label, best in facts["best"].items():
        lines[f"best at {label}"] = (
            f"loss {shown('loss', best['loss'])} (trial {best['trial']}); uniform {shown('loss', best['uniform'])}"
        )
    lines |= {f"{n} infeasible": reason for reason, n in facts["infeasible"].items()}
    return {name: line for name, line in lines.items() if line}


def _hypervolume(value: float | None) -> str:
    return "" if value is None else f", hypervolume {value:.4f}"


def _writer(directory: Path) -> str | None:
    """Who is writing the run, as far as its lock file tells; a process that is gone doesn't count."""
    try:
        holder = json.loads((directory / RunLock.NAME).read_text(encoding="utf-8"))
        host, pid = str(holder["host"]), int(holder["pid"])
        if host == socket.gethostname():
            os.kill(pid, 0)  # sends nothing; fails if there is no such process
    except PermissionError:  # it is there, and another user's
        pass
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return f"process {pid} on {host}"
