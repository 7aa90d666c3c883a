"""Run as Python sees it: its front and trials as tables, choice by bounds, pictures, and models made from it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.api.tables import frame, html
from secateur.search.results import run as results
from secateur.search.results.paired import Estimate, against_baseline
from secateur.search.results.pick import parse_bounds
from secateur.search.show.summary import status_lines, summary
from secateur.search.show.values import perplexity, shown
from secateur.spaces.measurement import Measurement

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

    from secateur.evaluators.exporting import ExportSummary
    from secateur.search.controller import Trial
    from secateur.spaces.streaming import Stream


class Found:
    """One trial of a run: a pruned model that was measured.

    Attributes:
        run: that it is of.
        number: of the trial, as the commands take it.
    """

    def __init__(self, run: Run, trial: Trial) -> None:
        self.run = run
        self.number = trial.number
        self._trial = trial

    @property
    def candidate(self) -> str:
        """Canonical text of the candidate."""
        return self._trial.measurement.candidate

    @property
    def values(self) -> dict[str, float | None]:
        """Values by name, as searched: ``loss``, ``kl`` and ``ce`` in nats per token, costs; None: it has no such."""
        return self.run.view.values_of(self._trial)

    @property
    def test(self) -> dict[str, float] | None:
        """Values on the test text; None if it was not measured there."""
        found = self.run.view.test_of(self._trial)
        return None if found is None or found.infeasible is not None else dict(found.values)

    @property
    def test_ratio(self) -> Estimate | None:
        """Ratio of the test loss to that of the target's baseline, ± 95 % over test windows; None if there is none."""
        return against_baseline(self.run.view, self._trial)

    @property
    def sparsity_of(self) -> dict[str, float]:
        """Share of each linear that is zeroed or cut, by its full name; empty where only pruning tells."""
        return self.run.view.allocation(self._trial)

    def export(
        self,
        to: str | Path,
        *,
        calibration: str | None = None,
        format: str | None = None,
        stream: Stream | None = None,
    ) -> ExportSummary:
        """Prune the model by this trial, and write a directory that transformers loads; see ``secateur export``.

        Args:
            to: new or empty directory, or one that holds this export already.
            calibration: ``sequential``, ``dense`` or ``expected``; None: as in the run's settings.
            format: a name of ``secateur list formats``; None: that of the settings, or the usual one.
            stream: ``always``, ``never`` or ``auto``: block by block, never the whole model; None: as in the settings.

        Raises:
            UsageError: if the run's model, data or methods have changed, or the format can't carry the model.
        """
        from secateur.search import app

        how: dict[str, Any] = {"calibration": calibration, "form": format, "stream": stream}
        return app.export(self.run.directory, self._trial, Path(to), **how)

    def _facts(self) -> dict[str, str]:
        ratio = self.test_ratio
        facts = {} if ratio is None else {f"test loss / {ratio.of}": ratio.text}
        facts |= {f"test {name}": text for name, text in _shown(self.test or {}).items()}
        return facts | self._searched() | {"candidate": self.candidate}

    def _searched(self) -> dict[str, str]:
        """Texts of the search's values; of a structured trial the removed shares, which are no sparsity."""
        removed = self.run.view.removed(self._trial)
        values = {name: x for name, x in self.values.items() if removed is None or name != "sparsity"}
        shares = {f"of {part} removed": f"{share:.1%}" for part, share in (removed or {}).items()}
        return _shown(values) | shares

    def __repr__(self) -> str:
        values = ", ".join(f"{name} {text}" for name, text in self._searched().items())
        ratio = self.test_ratio
        tested = "" if ratio is None else f", test loss {ratio.text} of {ratio.of}"
        return f"<trial {self.number} of {self.run.directory}: {values}{tested}>"

    def _repr_html_(self) -> str:
        return html(f"trial {self.number} of {self.run.directory}", self._facts())


class Run:
    """A search's results, which are read anew by `open_run`.

    Attributes:
        directory: of the run.
        view: the run as the commands see it, without torch.
    """

    def __init__(self, view: results.Run) -> None:
        self.view = view
        self.directory = view.study.directory

    def front_list(self) -> list[Found]:
        """Trials of the Pareto front, the best of the first objective first."""
        return [Found(self, trial) for trial in self.view.front()]

    def trials_list(self) -> list[Found]:
        """Feasible trials at the largest search fidelity, in the order of their numbers."""
        return [Found(self, trial) for trial in self.view.trials()]

    def front(self) -> pandas.DataFrame:
        """The Pareto front as a data frame by trial: test ratio and losses, values of the search, candidate.

        Raises:
            UsageError: if pandas is not installed: `front_list` needs none.
        """
        return frame([_row(found) for found in self.front_list()], "Run.front_list()")

    def trials(self) -> pandas.DataFrame:
        """All measurements as a data frame by trial, infeasible ones, smaller fidelities and the test included.

        Raises:
            UsageError: if pandas is not installed: `trials_list` needs none.
        """
        rows = [_measured(trial.number, trial.measurement) for trial in self.view.study.trials]
        return frame(rows, "Run.trials_list()")

    def pick(self, trial: int | None = None, **bounds: float | str) -> Found:
        """The trial with the lowest loss within bounds, or the one with a number.

        Args:
            trial: number, in place of bounds.
            bounds: as options of ``secateur pick``: ``sparsity=0.5``, ``max_params="90M"``, ``max_latency="0.7x"``.

        Raises:
            UsageError: if there is none, or a bound is unknown.
        """
        if trial is not None and not bounds:
            return Found(self, self.view.pick(number=trial))
        parsed = parse_bounds({name.replace("_", "-"): str(value) for name, value in bounds.items()})
        return Found(self, self.view.pick(parsed))

    def plot_front(self) -> Figure:
        """Picture of the front: all trials, baselines, losses on the test text; a figure of matplotlib."""
        from secateur.search.show.front_plot import plot_front

        return plot_front(None, self.view)

    def report(self) -> Path:
        """Write the page ``report/index.html`` into the run's directory; its path."""
        from secateur.search.show.report import write_report

        return write_report(self.view)[0]

    def __repr__(self) -> str:
        facts = summary(self.view)
        return (
            f"<run {self.directory}: {facts['space']} of {facts['model']}, controller {facts['controller']}, "
            f"{len(self.view.study.trials):,} trials, front of {facts['front']}>"
        )

    def _repr_html_(self) -> str:
        return html(f"run {self.directory}", status_lines(summary(self.view)))


def open_run(run: str | Path) -> Run:
    """A run to read from and to make models from.

    Args:
        run: its directory.

    Raises:
        UsageError: if the directory holds no study, or a damaged one.
    """
    return Run(results.open_run(run))


def _shown(values: Any) -> dict[str, str]:
    """Texts of values, with the perplexity."""
    ppl = perplexity({name: x for name, x in values.items() if x is not None})
    texts = {name: shown(name, value, absent="–") for name, value in values.items()}
    return texts if ppl is None else {**texts, "perplexity": shown("ppl", ppl)}


def _row(found: Found) -> dict[str, Any]:
    """Columns of the front."""
    ratio, test = found.test_ratio, found.test or {}
    tested = {
        "test_ratio": ratio and ratio.value,
        "test_ratio_half": ratio and ratio.half,
        "test_loss": test.get("loss"),
        "test_perplexity": perplexity(test),
    }
    return {"trial": found.number, **tested, **found.values, "candidate": found.candidate}


def _measured(number: int, m: Measurement) -> dict[str, Any]:
    """Columns of a measurement."""
    facts = {"fidelity": m.fidelity.text, "infeasible": m.infeasible, "seconds": m.seconds}
    return {"trial": number, **facts, **m.values, "candidate": m.candidate}
