"""Spearman's rank correlation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's rank correlation in [-1, 1], equal values sharing their mean rank; None for constant values."""
    from scipy.stats import rankdata  # takes half a second to import

    a, b = rankdata(first), rankdata(second)
    if len(a) < 2 or not np.ptp(a) or not np.ptp(b):
        return None
    return float(np.corrcoef(a, b)[0, 1])
