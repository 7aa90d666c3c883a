"""Rows of a board's tables: one a method, with mean and spread over seeds, from the measurements of its cells."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from secateur.search.board.cells import DENSE, NO_DATA, Cell
from secateur.search.controller import Trial
from secateur.search.results.compare import Spread
from secateur.search.results.paired import Estimate, difference
from secateur.spaces.measurement import TASK, Measurement, perplexity_of
from secateur.spaces.method import UNITS, Unit
from secateur.spaces.recipe.known import KNOWN

Z = 1.959964
"""Quantile of the normal distribution for an interval of 95 %."""


@dataclass(frozen=True)
class BoardRow:
    """One method on one model, at one share and with one choice of calibration data.

    Args:
        method: its name, or ``dense``.
        found: feasible measurements, one a seed.
        reasons: why others are infeasible.
        wanted: number of seeds that are asked for.
        above: mean difference of the loss to the table's best, paired over test windows; None for that one.
    """

    method: str
    found: tuple[Measurement, ...]
    reasons: tuple[str, ...] = ()
    wanted: int = 1
    above: Estimate | None = None

    @property
    def n(self) -> int:
        """Number of seeds that are measured."""
        return len(self.found)

    @property
    def loss(self) -> float:
        """Mean loss; infinite without a measurement."""
        spread = self.spread("loss")
        return math.inf if spread is None else spread.mean

    def spread(self, name: str) -> Spread | None:
        """Spread of a value over seeds; None if no measurement has it."""
        return Spread.of([m.values[name] for m in self.found if name in m.values])

    def perplexity(self, text: str | None = None) -> Spread | None:
        """Spread of the perplexity on the first text, or on a further one."""
        name = "ce" if text is None else f"ce:{text}"
        return Spread.of([perplexity_of(m.values[name]) for m in self.found if name in m.values])

    def task_change(self, task: str) -> tuple[float, float] | None:
        """Accuracy beside the dense model's, paired over samples, and half its interval of 95 %; None without margins.

        Mean over seeds of ``(won - lost) / samples``; the interval is that of one measurement, of McNemar's paired
        counts by the normal distribution.
        """
        changes = [
            (m.values[f"won:{task}"], m.values[f"lost:{task}"], m.values[f"samples:{task}"])
            for m in self.found
            if f"won:{task}" in m.values
        ]
        if not changes:
            return None
        values = [(won - lost) / n for won, lost, n in changes]
        halves = [
            Z * math.sqrt(max((won + lost) / n - value**2, 0.0) / n)
            for (won, lost, n), value in zip(changes, values, strict=True)
        ]
        return sum(values) / len(values), sum(halves) / len(halves)

    def to_json(self) -> dict[str, Any]:
        """Plain values: mean and deviation of each value over seeds."""
        names = dict.fromkeys(name for m in self.found for name in m.values)
        spreads = {name: self.spread(name) for name in names}
        return {
            "method": self.method,
            "seeds": self.n,
            "values": {name: vars(spread) for name, spread in spreads.items() if spread is not None},
            "above": self.above and self.above.to_json(),
            "reasons": list(self.reasons),
            "wanted": self.wanted,
        }


@dataclass(frozen=True)
class BoardTable:
    """Methods of one unit on one model at one share.

    Args:
        model: its name.
        unit: that is removed.
        share: of it.
        calibration: ``equal`` or ``published``.
        rows: best first; those without a measurement last.
    """

    model: str
    unit: Unit
    share: float
    calibration: str
    rows: tuple[BoardRow, ...]

    @property
    def measured(self) -> tuple[BoardRow, ...]:
        return tuple(row for row in self.rows if row.found)

    @property
    def incomplete(self) -> tuple[BoardRow, ...]:
        """Methods without a measurement, or with a reason why a seed has none."""
        return tuple(row for row in self.rows if row.reasons or not row.found)


@dataclass(frozen=True)
class Board:
    """Everything that a run has measured.

    Args:
        trials: of the run.
        models: fingerprints by name.
        missing: cells that are asked for and not measured yet.
    """

    trials: Sequence[Trial]
    models: Mapping[str, str] = field(default_factory=dict)
    missing: Sequence[Cell] = ()

    @property
    def cells(self) -> dict[Cell, Measurement]:
        """Measurements by their cells, in the order of the run."""
        return {Cell.parse(x.measurement.candidate): x.measurement for x in self.trials}

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks."""
        names = (name for x in self.trials for name in x.measurement.values if name.startswith(TASK))
        return tuple(dict.fromkeys(name.removeprefix(TASK) for name in names))

    @property
    def dense(self) -> dict[str, BoardRow]:
        """Dense models by name."""
        return {
            cell.model: BoardRow(DENSE, (m,))
            for cell, m in self.cells.items()
            if cell.method == DENSE and m.infeasible is None
        }

    def to_json(self) -> dict[str, Any]:
        """Plain values: the dense models and the tables."""
        tables = [{**vars(x), "rows": [row.to_json() for row in x.rows]} for x in self.tables()]
        return {"dense": {name: row.to_json() for name, row in self.dense.items()}, "tables": tables}

    def tables(self) -> list[BoardTable]:
        """Tables by model, unit, share and calibration; a method without data is in those of either calibration."""
        cells: dict[Cell, Measurement | None] = {**self.cells, **dict.fromkeys(self.missing)}
        cells = {cell: m for cell, m in cells.items() if cell.method in KNOWN}
        data = {cell.calibration for cell in cells} - {NO_DATA} or {"equal"}
        by_table: dict[tuple[str, Unit, float, str], dict[str, list[Measurement | None]]] = {}
        for cell, m in cells.items():
            for calibration in sorted(data) if cell.calibration == NO_DATA else [cell.calibration]:
                key = cell.model, cell.row.unit, cell.share, calibration
                by_table.setdefault(key, {}).setdefault(cell.method, []).append(m)
        order = list(dict.fromkeys(cell.model for cell in cells))
        keys = sorted(by_table, key=lambda x: (order.index(x[0]), UNITS.index(x[1]), x[3], x[2]))
        return [BoardTable(*key, _rows(by_table[key])) for key in keys]


def _rows(by_method: Mapping[str, Sequence[Measurement | None]]) -> tuple[BoardRow, ...]:
    """Rows, the lowest mean loss first, with their differences to it; None: not measured yet."""
    rows = []
    for name, cells in by_method.items():
        measured = [m for m in cells if m is not None]
        found = tuple(m for m in measured if m.infeasible is None)
        reasons = dict.fromkeys(m.infeasible for m in measured if m.infeasible is not None)
        rows.append(BoardRow(name, found, tuple(reasons), len(cells)))
    rows.sort(key=lambda row: row.loss)
    best = rows[0]
    return tuple(
        row
        if row is best or not row.found
        else replace(row, above=difference(row.found, best.found, best.method))
        for row in rows
    )
