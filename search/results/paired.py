"""Ratios and differences of losses on the same test windows, with their uncertainty."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from secateur.search.controller import Trial
from secateur.search.results.run import Run
from secateur.search.results.targets import best_references, references, target_of, target_sparsities
from secateur.spaces.measurement import Measurement

Losses = NDArray[np.float64]
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """Number with an interval of 95 %, over windows of text like these.

    Args:
        value: the number itself, from all test tokens.
        half: half the width of the interval; None where there are no losses of windows, or too few of them.
        n_windows: that the interval comes from.
        of: name of what it is relative to.
    """

    value: float
    half: float | None
    n_windows: int
    of: str = ""

    @property
    def text(self) -> str:
        """Value and interval, e.g. ``0.941 ± 0.012``."""
        return f"{self.value:.3f}" + ("" if self.half is None else f" ± {self.half:.3f}")

    def to_json(self) -> dict[str, float | int | str | None]:
        """Plain values, with both ends of the interval."""
        ends = (None, None) if self.half is None else (self.value - self.half, self.value + self.half)
        return {
            "of": self.of,
            "value": self.value,
            "low": ends[0],
            "high": ends[1],
            "windows": self.n_windows,
        }


def ratio(found: Measurement, reference: Measurement, of: str = "") -> Estimate | None:
    """Ratio of two test losses, paired over windows; None if there is none.

    The interval is that of a ratio of means (delta method) by Student's t: the spread of ``x - ratio * y`` over
    windows. It says how much the ratio would change on other windows of this kind of text, taken as independent, and
    nothing about other seeds of the search.
    """
    if found.infeasible is not None or reference.infeasible is not None or reference.values["loss"] <= 0:
        return None
    value = found.values["loss"] / reference.values["loss"]
    x, y = _paired(found, reference)
    half = _half(x - value * y) / float(y.mean()) if len(x) > 1 else None
    return Estimate(value, half, len(x), of)


def difference(found: Sequence[Measurement], reference: Sequence[Measurement], of: str = "") -> Estimate:
    """Mean difference of test losses, paired over windows; of several measurements the mean of each window."""
    value = _mean_loss(found) - _mean_loss(reference)
    n_windows = {len(m.windows) for m in (*found, *reference)}
    if len(n_windows) > 1 or n_windows <= {0, 1}:
        return Estimate(value, None, 0, of)
    gaps = _mean_windows(found) - _mean_windows(reference)
    return Estimate(value, _half(gaps), len(gaps), of)


def against_baseline(run: Run, trial: Trial, *, best: bool = False) -> Estimate | None:
    """Ratio of a candidate's test loss to that of the baseline of its target; None if there is none.

    Args:
        run: that both are of.
        trial: the candidate.
        best: of the target's baselines with a test loss the one of the lowest loss on the search text, not the first.
    """
    baselines = {name: t for name, t in run.baselines.items() if t.measurement.infeasible is None}
    label = target_of(trial, target_sparsities(baselines))
    if label is None:
        return None
    known = {name: t for name, t in baselines.items() if not best or run.test_of(t) is not None}
    name = (best_references if best else references)(known).get(label)
    if name is None:
        return None
    found, reference = run.test_of(trial), run.test_of(baselines[name])
    return None if found is None or reference is None else ratio(found, reference, name)


def _paired(a: Measurement, b: Measurement) -> tuple[Losses, Losses]:
    """Losses of the windows that both have."""
    both = (a.windows, b.windows) if len(a.windows) == len(b.windows) else ((), ())
    return np.array(both[0], dtype=float), np.array(both[1], dtype=float)


def _mean_loss(measurements: Sequence[Measurement]) -> float:
    return sum(m.values["loss"] for m in measurements) / len(measurements)


def _mean_windows(measurements: Sequence[Measurement]) -> Losses:
    mean: Losses = np.array([m.windows for m in measurements], dtype=float).mean(0)
    return mean


def _half(values: Losses) -> float:
    """Half the width of the interval of a mean."""
    from scipy.special import stdtrit

    n = len(values)
    return float(stdtrit(n - 1, (1 + CONFIDENCE) / 2) * values.std(ddof=1) / math.sqrt(n))
