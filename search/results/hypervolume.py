"""Exact hypervolume: the volume of objective space that a set of points dominates."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def hypervolume(points: Array, reference: Array) -> float:
    """Volume between the points and the reference, every objective minimised.

    For fronts of up to some hundred points in two to four objectives; time grows exponentially with the
    number of objectives. WFG: While, Bradstreet, Barone, "A fast way of calculating exact hypervolumes",
    IEEE TEVC 2012, https://doi.org/10.1109/TEVC.2010.2077298, without its special cases.

    Args:
        points: ``n_points n_objectives``; points that don't beat the reference everywhere add nothing.
        reference: ``n_objectives``.
    """
    points = _front(points[np.all(points < reference, axis=1)])
    return sum(exclusive_volume(point, points[i + 1 :], reference) for i, point in enumerate(points))


def exclusive_volume(point: Array, others: Array, reference: Array) -> float:
    """Volume that the point dominates and the others don't: its contribution to their hypervolume.

    Args:
        point: ``n_objectives``.
        others: ``n_points n_objectives``.
        reference: ``n_objectives``.
    """
    if np.any(point >= reference) or np.any(np.all(others <= point, axis=1)):
        return 0.0
    inclusive = float(np.prod(reference - point))
    return inclusive - hypervolume(np.maximum(others, point), reference) if len(others) else inclusive


def _front(points: Array) -> Array:
    """Non-dominated points, sorted, equal ones once."""
    points = np.unique(points, axis=0)
    kept = points[:0]
    for point in points:  # ascending: nothing that follows dominates what is kept
        if not np.any(np.all(kept <= point, axis=1)):
            kept = np.vstack([kept, point])
    return kept
