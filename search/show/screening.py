"""How far a proxy that screened candidates could be trusted: a picture and a paragraph of the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from secateur.search.results.correlation import spearman
from secateur.search.results.run import Run
from secateur.search.show.plots import BLUE, LOG_FROM, VERMILLION, figure_at

WINDOW = 64
"""Candidates that a point of the course looks back on."""


@dataclass(frozen=True)
class Screened:
    """Candidates that were measured both by the proxy and on data, in the order of the latter.

    Args:
        numbers: of the trials on data.
        proxies, losses: one a candidate; losses at the smallest fidelity of the search.
    """

    numbers: Sequence[int]
    proxies: Sequence[float]
    losses: Sequence[float]

    @property
    def correlation(self) -> float | None:
        """Spearman's, over all of them."""
        return spearman(self.proxies, self.losses)

    def course(self) -> list[tuple[int, float]]:
        """(trial number, correlation over the last `WINDOW` candidates), from the tenth candidate on."""
        points = []
        for end in range(10, len(self.numbers) + 1):
            some = slice(max(0, end - WINDOW), end)
            found = spearman(self.proxies[some], self.losses[some])
            if found is not None:
                points.append((self.numbers[end - 1], found))
        return points


def screened(run: Run) -> Screened:
    """What a run tells of its proxy; empty if it had none."""
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


def plot_screening(path: Path, found: Screened) -> None:
    """The loss against the proxy, and how their rank correlation went.

    Args:
        path: of the PNG.
        found: at least one candidate.
    """
    with figure_at(path, 11, 4.4) as figure:
        left, right = figure.subplots(1, 2)
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
        right.set_title("How far the proxy could be trusted")
