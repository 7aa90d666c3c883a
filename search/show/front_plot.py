"""Picture of the front, and its description in words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from secateur.search.controller import Trial
from secateur.search.objectives import objective
from secateur.search.results.run import Run
from secateur.search.show.plots import (
    BLUE,
    GREY,
    INK,
    LOG_FROM,
    NARROW,
    VERMILLION,
    Array,
    figure_at,
    spread_out,
)
from secateur.search.show.values import scaled, shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEAST_SPAN = 0.08
"""Least span of the horizontal axis, as a share of its largest value or of all weights; below it ticks look equal."""

MOST_POINTS = 1500
"""Most points of a kind that are drawn as shapes of their own, each of which may be a link; more are a bitmap."""


@dataclass(frozen=True)
class FrontPoints:
    """Trials of a run in the picture of its front, by kind; those without such a cost are left out.

    Args:
        run: with a feasible trial.
    """

    run: Run

    @property
    def y(self) -> str:
        """First objective."""
        return self.run.objectives[0]

    @property
    def x(self) -> str:
        """Second objective, or sparsity."""
        return self.run.objectives[1] if len(self.run.objectives) > 1 else "sparsity"

    @cached_property
    def trials(self) -> list[Trial]:
        return [t for t in self.run.trials() if not {self.x, self.y} & self.run.stand_ins(t)]

    @cached_property
    def names(self) -> dict[int, str]:
        """Names of the baselines by number of the trial."""
        return {trial.number: name for name, trial in self.run.baselines.items()}

    @property
    def pruned(self) -> list[Trial]:
        return [t for t in self.trials if t.number not in self.names]

    @property
    def beside(self) -> list[Trial]:
        """Baselines, apart from the dense model."""
        return [t for t in self.trials if self.names.get(t.number, "dense") != "dense"]

    @property
    def dense(self) -> Trial | None:
        return next((t for t in self.trials if self.names.get(t.number) == "dense"), None)

    @cached_property
    def front(self) -> list[Trial]:
        """Front from left to right."""
        on_front = {trial.number for trial in self.run.front()}
        return sorted(
            (t for t in self.trials if t.number in on_front), key=lambda trial: value_of(trial, self.x)
        )

    @cached_property
    def tested(self) -> list[tuple[Trial, float]]:
        """Trials of the front with their value of `y` on the test text."""
        found = [(trial, self.run.test_of(trial)) for trial in self.front]
        return [(t, m.values[self.y]) for t, m in found if m and not m.infeasible and self.y in m.values]

    @cached_property
    def partial(self) -> list[Trial]:
        """Feasible trials of the search on fewer tokens, of candidates that were not measured on more."""
        found = {
            t.measurement.candidate: t  # the last and largest
            for t in self.run.study.trials
            if t.measurement.fidelity.part == "search" and not t.measurement.infeasible
        }
        whole = self.run.fidelity
        kept = [t for t in found.values() if t.measurement.fidelity != whole]
        return [t for t in kept if {self.x, self.y} <= t.measurement.values.keys()]

    def described(self) -> str:
        """Description in words, with the numbers of the picture."""
        names = {name: objective(name, self.run.settings.evaluator.loss).label for name in (self.x, self.y)}

        def place(trial: Trial) -> str:
            at, value = shown(self.x, value_of(trial, self.x)), shown(self.y, value_of(trial, self.y))
            return f"{names[self.x]} {at} with {names[self.y]} {value}"

        text = (
            f"{names[self.y].capitalize()} against {names[self.x]}: {len(self.trials):,} models measured on "
            f"{self.run.fidelity.n_tokens:,} tokens, and {len(self.partial):,} on fewer."
        )
        if self.front:
            first, last = self.front[0], self.front[-1]
            text += f" The front has {len(self.front)}, from {place(first)} to {place(last)}."
        if self.tested:
            trial, test = self.tested[-1]
            text += f" On the test text its last one (trial {trial.number}) has {shown(self.y, test)}."
        return text


def plot_front(
    path: Path | None, run: Run, *, narrow: bool = False, link: Callable[[int], str] = lambda number: ""
) -> Figure:
    """Plot of the first objective against the second, or against sparsity: all trials, front, baselines.

    The front is drawn as steps: what is reached at a place is what the next point on it reaches. With more than two
    objectives, of which the picture shows two, its points are not joined.

    Args:
        path: of the picture; None: it is not written.
        run: with at least one feasible trial.
        narrow: for a telephone.
        link: address of a trial in a picture of the form SVG; "" for none.

    Returns:
        The figure.
    """
    points = FrontPoints(run)
    x, y, front = points.x, points.y, points.front
    with figure_at(path, *((NARROW, 5.2) if narrow else (8, 5))) as figure:
        axes = figure.add_subplot()
        draw = _Drawing(axes, x, y, link)
        _label(axes, x, y, run.settings.evaluator.loss)
        known = [value_of(t, y) for t in [*points.pruned, *points.beside]]
        is_log = spread_out(axes, known)
        floor = min((value for value in known if value > 0), default=0.0) / LOG_FROM
        drawn = [t for t in front if not is_log or value_of(t, y) > floor]
        partial = [t for t in points.partial if not is_log or value_of(t, y) > floor]
        draw.scatter(
            partial, "fewer tokens", s=14, facecolors="none", edgecolors=GREY, alpha=0.6, linewidths=0.7
        )
        draw.scatter(points.pruned, "trials", s=22, color=GREY, alpha=0.5, linewidths=0)
        if len(run.objectives) <= 2:
            style = "steps-post" if objective(x).direction == "minimize" else "steps-pre"
            axes.plot(*draw.places(drawn), color=BLUE, lw=1.4, drawstyle=style, zorder=3)
        draw.scatter(drawn, "front", s=30, color=BLUE, zorder=5, linewidths=0)
        for trial, test in points.tested:
            if not is_log or min(test, value_of(trial, y)) > floor:
                axes.plot(
                    [value_of(trial, x)] * 2, [value_of(trial, y), test], color=BLUE, lw=0.8, ls=":", zorder=3
                )
        tested = [(value_of(t, x), test) for t, test in points.tested if not is_log or test > floor]
        if tested:
            square: dict[str, Any] = {"facecolors": "white", "edgecolors": BLUE, "marker": "s", "zorder": 4}
            at, values = zip(*tested, strict=True)
            axes.scatter(at, values, s=26, linewidths=1.1, label="front on test text", **square)
        ring: dict[str, Any] = {"facecolors": "none", "edgecolors": VERMILLION, "marker": "D"}
        draw.scatter(points.beside, "baselines", s=110, lw=1.8, zorder=4, **ring)
        _draw_dense(draw, points.dense, is_log, floor)
        if not narrow:
            axes.set_title(f"{objective(y).label.capitalize()} against {objective(x).label}")
        widen(axes, x)
        if narrow:
            figure.legend(loc="outside lower center", ncols=2, fontsize=9)
        else:
            axes.legend(loc="best")
    return figure


def plot_fronts(path: Path, runs: Sequence[tuple[str, Run]], *, narrow: bool = False) -> None:
    """Plot of the fronts of several runs, with their names, in the objectives of the first one.

    A run without these objectives is left out.
    """
    import matplotlib as mpl

    first = FrontPoints(runs[0][1])
    x, y = first.x, first.y
    with figure_at(path, *((NARROW, 5.2) if narrow else (8, 5))) as figure:
        axes = figure.add_subplot()
        _label(axes, x, y, runs[0][1].settings.evaluator.loss)
        colors = mpl.colormaps["viridis"](np.linspace(0.0, 0.85, len(runs)))
        drawn: list[float] = []
        for (name, run), color in zip(runs, colors, strict=True):
            points = FrontPoints(run)
            if (points.x, points.y) != (x, y):
                continue
            places = [(value_of(t, x), value_of(t, y)) for t in points.front if value_of(t, y) > 0]
            if places:
                drawn += [value for _, value in places]
                style = "steps-post" if objective(x).direction == "minimize" else "steps-pre"
                axes.plot(
                    *zip(*places, strict=True),
                    color=color,
                    lw=1.4,
                    drawstyle=style,
                    marker="o",
                    ms=4,
                    label=name,
                )
        spread_out(axes, drawn)
        widen(axes, x)
        figure.legend(loc="outside lower center", ncols=1, fontsize=9)


@dataclass(frozen=True)
class _Drawing:
    """Axes, the names of their values, and the addresses of trials."""

    axes: Axes
    x: str
    y: str
    link: Callable[[int], str]

    def places(self, trials: Sequence[Trial]) -> tuple[Array, Array]:
        x, y = ([value_of(t, name) for t in trials] for name in (self.x, self.y))
        return np.array(x), np.array(y)  # matplotlib takes numbers of a list one by one

    def scatter(self, trials: Sequence[Trial], label: str, **style: Any) -> None:
        if trials:
            bitmap = len(trials) > MOST_POINTS
            points = self.axes.scatter(*self.places(trials), label=label, rasterized=bitmap, **style)
            if not bitmap:
                points.set_urls([self.link(t.number) or None for t in trials])


def _draw_dense(draw: _Drawing, dense: Trial | None, is_log: bool, floor: float) -> None:
    """Draw the dense model, or say where it is if it lies far below."""
    if dense is None:
        return
    if is_log and value_of(dense, draw.y) <= floor:
        at = f"{tick(draw.x, value_of(dense, draw.x))} {objective(draw.x).label}"
        draw.axes.plot([], [], " ", label=f"(dense: loss {value_of(dense, draw.y):.4f}\nat {at})")
    else:
        draw.scatter([dense], "dense", s=110, color=INK, marker="*", zorder=5)


def widen(axes: Axes, x: str) -> None:
    """Widen the horizontal axis until the texts of its ticks differ."""
    low, high = axes.get_xlim()
    missing = LEAST_SPAN * (1.0 if x == "sparsity" else high) - (high - low)
    if missing > 0:
        axes.set_xlim(low - missing / 2, high + missing / 2)


def value_of(trial: Trial, name: str) -> float:
    """Value of a trial by its name."""
    return trial.measurement.values[name]


def _label(axes: Axes, x: str, y: str, loss: str) -> None:
    names = {name: objective(name, loss) for name in (x, y)}
    texts = {n: o.label + (f" ({o.unit})" if o.unit and o.unit != o.label else "") for n, o in names.items()}
    axes.set(xlabel=texts[x], ylabel=texts[y])
    axes.xaxis.set_major_formatter(lambda value, _: tick(x, value))


def tick(name: str, value: float) -> str:
    """Text of a tick on an objective's axis."""
    return f"{value:.0%}" if name == "sparsity" else scaled(value)
