"""Agreement of a screening proxy with measured losses: rank correlation and its picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from secateur.search.controllers.proxy_screening import spearman
from secateur.search.results.run import Run
from secateur.search.show.plots import BLUE, LOG_FROM, NARROW, VERMILLION, figure_at

WINDOW = 64
"""Number of latest candidates behind each point of the running correlation."""


@dataclass(frozen=True)
class Screened:
    """Candidates measured both by the proxy and on data, in the order of their trials on data.

    Args:
        numbers: of the trials on data.
        proxies, losses: one a candidate; losses at the smallest fidelity of the search.
    """

    numbers: Sequence[int]
    proxies: Sequence[float]
    losses: Sequence[float]

    @property
    def correlation(self) -> float | None:
        """Spearman's rank correlation over all candidates."""
        return spearman(self.proxies, self.losses)

    def course(self) -> list[tuple[int, float]]:
        """Running correlation: (trial number, correlation of the last `WINDOW` candidates), from the tenth on."""
        points = []
        for end in range(10, len(self.numbers) + 1):
            some = slice(max(0, end - WINDOW), end)
            found = spearman(self.proxies[some], self.losses[some])
            if found is not None:
                points.append((self.numbers[end - 1], found))
        return points


def screened(run: Run) -> Screened:
    """Candidates of a run that the proxy screened; none without a proxy."""
    fidelity = run.settings.evaluator.search_fidelities[0]
    proxies = {
        t.measurement.candidate: t.measurement.values["loss"]
        for t in run.study.trials
        if t.measurement.fidelity.part == "proxy" and t.measurement.infeasible is None
    }
    both = [
        t
        for t in run.study.trials
        if t.measurement.fidelity == fidelity
        and t.measurement.infeasible is None
        and t.measurement.candidate in proxies
    ]
    return Screened(
        [t.number for t in both],
        [proxies[t.measurement.candidate] for t in both],
        [t.measurement.values["loss"] for t in both],
    )


def plot_screening(path: Path, found: Screened, *, narrow: bool = False) -> None:
    """Plot of the loss against the proxy, and of their running rank correlation, for at least one candidate."""
    with figure_at(path, *((NARROW, 7.4) if narrow else (11, 4.4))) as figure:
        left, right = figure.subplots(2, 1) if narrow else figure.subplots(1, 2)
        left.scatter(found.proxies, found.losses, s=22, color=BLUE, alpha=0.6, linewidths=0)
        for values, scale in ((found.proxies, left.set_xscale), (found.losses, left.set_yscale)):
            if min(values) > 0 and max(values) / min(values) >= LOG_FROM:
                scale("log")
        left.set(xlabel="proxy", ylabel="loss at the smallest fidelity (nats/token)")
        correlation = found.correlation
        left.set_title("Loss against proxy" + ("" if correlation is None else f": ρ = {correlation:.2f}"))
        if points := found.course():
            right.plot(*zip(*points, strict=True), color=VERMILLION, lw=1.8)
        right.set(xlabel="trial number", ylabel=f"rank correlation of the last {WINDOW}", ylim=(-1.05, 1.05))
        right.set_title("Agreement of proxy and loss")
