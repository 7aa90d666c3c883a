"""Why a formula is infeasible."""

from __future__ import annotations


class FormulaError(ValueError):
    """The formula gives no ranking of a layer's weights; one line that says why."""
