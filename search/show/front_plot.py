"""Picture of the front."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.search.controller import Trial
from secateur.search.objectives import objective
from secateur.search.results.run import Run
from secateur.search.show.plots import BLUE, GREY, INK, LOG_FROM, VERMILLION, figure_at, spread_out
from secateur.search.show.values import scaled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LEAST_SPAN = 0.08
"""Least span of the horizontal axis, as a share of its largest value or of all weights; below it ticks look equal."""


def plot_front(path: Path, run: Run) -> None:
    """Plot of the first objective against the second, or against sparsity: all trials, front, baselines.

    Trials without such a cost are left out; at least one is feasible.
    """
    y, x = run.objectives[0], run.objectives[1] if len(run.objectives) > 1 else "sparsity"
    names = {trial.number: name for name, trial in run.baselines.items()}
    trials = [t for t in run.trials() if not {x, y} & run.stand_ins(t)]
    on_front = {trial.number for trial in run.front()}
    pruned = [t for t in trials if t.number not in names]
    beside = [t for t in trials if names.get(t.number, "dense") != "dense"]
    dense = next((t for t in trials if names.get(t.number) == "dense"), None)
    front = sorted((t for t in trials if t.number in on_front), key=lambda trial: _value(trial, x))
    with figure_at(path, 8, 5) as figure:
        axes = figure.add_subplot()
        _label(axes, x, y, run.settings.evaluator.loss)
        is_log = spread_out(axes, [_value(t, y) for t in [*pruned, *beside]])
        floor = min((_value(t, y) for t in [*pruned, *beside] if _value(t, y) > 0), default=0.0) / LOG_FROM
        drawn = [t for t in front if not is_log or _value(t, y) > floor]
        _scatter(axes, pruned, x, y, "trials", s=22, color=GREY, alpha=0.5, linewidths=0)
        axes.plot(*_xy(drawn, x, y), color=BLUE, lw=1.4, marker="o", ms=5, label="front", zorder=4)
        ring: dict[str, Any] = {"facecolors": "none", "edgecolors": VERMILLION, "marker": "D"}
        _scatter(axes, beside, x, y, "baselines", s=110, lw=1.8, **ring)
        if dense is not None and is_log and _value(dense, y) <= floor:
            at = f"{tick(x, _value(dense, x))} {objective(x).label}"
            axes.plot([], [], " ", label=f"(dense: loss {_value(dense, y):.4f}\nat {at})")
        elif dense is not None:
            _scatter(axes, [dense], x, y, "dense", s=110, color=INK, marker="*", zorder=5)
        axes.set_title(f"{objective(y).label.capitalize()} against {objective(x).label}")
        widen(axes, x)
        axes.legend(loc="best")


def widen(axes: Axes, x: str) -> None:
    """Widen the horizontal axis until the texts of its ticks differ."""
    low, high = axes.get_xlim()
    missing = LEAST_SPAN * (1.0 if x == "sparsity" else high) - (high - low)
    if missing > 0:
        axes.set_xlim(low - missing / 2, high + missing / 2)


def _value(trial: Trial, name: str) -> float:
    return trial.measurement.values[name]


def _xy(trials: Sequence[Trial], x: str, y: str) -> tuple[list[float], list[float]]:
    return [_value(t, x) for t in trials], [_value(t, y) for t in trials]


def _scatter(axes: Axes, trials: Sequence[Trial], x: str, y: str, label: str, **style: Any) -> None:
    axes.scatter(*_xy(trials, x, y), label=label, **style)


def _label(axes: Axes, x: str, y: str, loss: str) -> None:
    names = {name: objective(name, loss) for name in (x, y)}
    texts = {n: o.label + (f" ({o.unit})" if o.unit and o.unit != o.label else "") for n, o in names.items()}
    axes.set(xlabel=texts[x], ylabel=texts[y])
    axes.xaxis.set_major_formatter(lambda value, _: tick(x, value))


def tick(name: str, value: float) -> str:
    """Text of a tick on an objective's axis."""
    return f"{value:.0%}" if name == "sparsity" else scaled(value)
