"""Board of methods for people: METHODS.md, and a page of HTML that needs no other file."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.search.board.cells import DENSE
from secateur.search.board.rows import Board, BoardRow, BoardTable
from secateur.search.board.settings import BoardSettings, model_label
from secateur.search.results.compare import Spread
from secateur.search.show.compared import spread_text
from secateur.search.show.grid import Grid
from secateur.search.show.report import templates
from secateur.search.show.report_facts import date
from secateur.search.show.values import scaled
from secateur.spaces.method import Unit
from secateur.spaces.recipe.known import KNOWN
from secateur.spaces.whole_file import whole_file

MARKDOWN, PAGE = "METHODS.md", "methods.html"

TITLES: dict[Unit, str] = {
    "weights": "weights",
    "structure": "KV groups and FFN channels",
    "blocks": "whole blocks",
    "experts": "routed experts",
}
INFERRED = "†"
"""Mark of methods of which something is inferred."""


@dataclass(frozen=True)
class Columns:
    """Columns that a board has numbers for.

    Args:
        texts: that are measured on.
        tasks: that are answered.
        device: whether a GPU was used.
        calibration: whether methods calibrate on different numbers of tokens.
    """

    texts: Sequence[str]
    tasks: Sequence[str]
    device: bool
    calibration: bool

    @property
    def headings(self) -> list[str]:
        found = ["KL", "above the best", *(f"perplexity, {model_label(text)}" for text in self.texts)]
        for task in self.tasks:
            found += [task, f"{task}, change"]
        return [
            *found,
            "CPU seconds",
            *(["device seconds"] if self.device else []),
            "peak memory",
            *(["of the device"] if self.device else []),
            *(["calibration tokens"] if self.calibration else []),
            "seeds",
        ]

    def cells(self, row: BoardRow) -> list[str]:
        above = "–" if row.above is None else f"{row.above.value:+.4f}" + _half(row.above.half)
        found = [spread_text(row.spread("kl"), "kl"), above, spread_text(row.perplexity(), "ppl")]
        found += [spread_text(row.perplexity(text), "ppl") for text in self.texts[1:]]
        for task in self.tasks:
            change = row.task_change(task)
            found += [spread_text(row.spread(f"task:{task}"), "task")]
            found += ["–" if change is None else f"{change[0]:+.1%} ± {change[1]:.1%}"]
        device = (
            ["–" if row.method == DENSE else _seconds(row.spread("device_seconds"))] if self.device else []
        )
        held = [_most(row, "device_bytes")] if self.device else []
        return [
            *found,
            "–" if row.method == DENSE else _seconds(row.spread("cpu_seconds")),
            *device,
            _most(row, "memory_bytes"),
            *held,
            *([_tokens(row)] if self.calibration else []),
            _seeds(row),
        ]


def files_of(directory: Path, markdown: Path | None = None) -> list[Path]:
    """Files of the tables of a run: Markdown, by default its own, and the page."""
    return [markdown or directory / MARKDOWN, directory / PAGE]


def write_board(board: Board, settings: BoardSettings, directory: Path, markdown: Path | None = None) -> None:
    """Write the board in Markdown and as a page; existing files are replaced.

    Args:
        board: what was measured.
        settings: on what.
        directory: of the run.
        markdown: see `files_of`.

    Raises:
        OSError: if they can't be written.
    """
    texts = (markdown_text(board, settings), page_text(board, settings))
    for path, text in zip(files_of(directory, markdown), texts, strict=True):
        with whole_file(path) as new:
            new.write_text(text, encoding="utf-8")


def facts(board: Board, settings: BoardSettings) -> dict[str, str]:
    """Conditions of the measurements by their names."""
    last = max((x.measurement.ended for x in board.trials), default=0.0)
    samples, length = settings.calibration_tokens // settings.calibration_window, settings.calibration_window
    texts = ", ".join(map(model_label, settings.text))
    tokens, calibration = settings.tokens, model_label(settings.calibration_text)
    found = {
        "measured on": f"{texts}: {tokens:,} tokens of each in windows of {settings.window}, without overlap",
        "KL": "of the pruned model to the dense one, nats a token, on the first text; above the best: the mean "
        "difference, ± 95 % over its windows",
        "equal calibration": f"{samples} windows of {length} tokens of {calibration} for every method, drawn by the "
        "seed",
        "published calibration": f"as many windows of {calibration}, as long, as each paper or its code names; at most "
        "as long as the model's positions",
        "spread": "± standard deviation over seeds; a method that takes no data and draws nothing is measured once",
        "CPU seconds, peak memory": "of pruning, statistics included, in a process of its own; memory with the dense "
        "model and the libraries in it, see the row of the dense model",
        INFERRED: "inferred where the paper leaves something open, see the method's words",
    }
    if settings.contrast_text is not None:
        found["contrast text"] = (
            f"{model_label(settings.contrast_text)}, as many windows, for methods over two texts"
        )
    if board.tasks:
        found["tasks"] = (
            "accuracy; change: to the dense model, paired over the same samples, ± 95 % over samples"
        )
    return found | {"last measurement": date(last) if last else "–"}


def columns_of(board: Board, settings: BoardSettings) -> Columns:
    """Columns of all tables of a board."""
    device = any(x.measurement.values.get("device_bytes") for x in board.trials)
    return Columns(settings.text, board.tasks, bool(device), "published" in settings.calibration)


def title_of(table: BoardTable) -> str:
    """Title of a table, such as ``tiny: weights, 50% removed, equal calibration``."""
    removed = f"{TITLES[table.unit]}, {100 * table.share:.4g}% removed"
    return f"{model_label(table.model)}: {removed}, {table.calibration} calibration"


def markdown_text(board: Board, settings: BoardSettings) -> str:
    """The board in GitHub's Markdown."""
    columns = columns_of(board, settings)
    lines = [
        "# Methods",
        "",
        "Pruned once, without training afterwards. Written by `secateur bench`; the best first.",
        "",
    ]
    lines += [f"- {name}: {text}." for name, text in facts(board, settings).items()]
    for table in board.tables():
        lines += ["", f"## {title_of(table)}", ""]
        rows = [board.dense[table.model]] if table.model in board.dense else []
        cells = [[_linked(row), *columns.cells(row), _about(row)] for row in (*rows, *table.measured)]
        lines += [Grid(["method", *columns.headings, "what"], cells, words_last=True).markdown()]
        if table.incomplete:
            lines += ["", "Not measured:", ""]
            lines += [
                f"- {', '.join(map(_linked, rows))}: {reason}" for reason, rows in by_reason(table).items()
            ]
    return "\n".join(lines) + "\n"


def by_reason(table: BoardTable) -> dict[str, list[BoardRow]]:
    """Methods of a table that are not measured, or not with each seed, by the reason."""
    found: dict[str, list[BoardRow]] = {}
    for row in table.incomplete:
        found.setdefault(" ".join(row.reasons) or "not measured yet", []).append(row)
    return found


def page_text(board: Board, settings: BoardSettings) -> str:
    """The board as a page."""
    columns, dense = columns_of(board, settings), board.dense
    tables: list[dict[str, Any]] = []
    for table in board.tables():
        rows = [dense[table.model]] if table.model in dense else []
        tables.append(
            {
                "title": title_of(table),
                "rows": [
                    {
                        "name": _name(row),
                        "paper": _paper(row),
                        "about": _about(row),
                        "cells": columns.cells(row),
                    }
                    for row in (*rows, *table.measured)
                ],
                "incomplete": [
                    {"names": [(_name(row), _paper(row)) for row in found], "reason": reason}
                    for reason, found in by_reason(table).items()
                ],
            }
        )
    return (
        templates()
        .get_template("board.html")
        .render(
            headings=columns.headings, tables=tables, facts=facts(board, settings), made=date(time.time())
        )
    )


def _seeds(row: BoardRow) -> str:
    """Number of seeds that are measured, of those asked for."""
    if row.method == DENSE or not KNOWN[row.method].uses_data:
        return "once"
    return str(row.n) if row.n == row.wanted else f"{row.n} of {row.wanted}"


def _tokens(row: BoardRow) -> str:
    n_tokens = max((m.values.get("calibration_tokens", 0.0) for m in row.found), default=0.0)
    return f"{n_tokens:,.0f}" if n_tokens else "–"


def _name(row: BoardRow) -> str:
    return row.method + (f" {INFERRED}" if row.method in KNOWN and KNOWN[row.method].inferred else "")


def _paper(row: BoardRow) -> str:
    return KNOWN[row.method].paper if row.method in KNOWN else ""


def _about(row: BoardRow) -> str:
    return KNOWN[row.method].summary if row.method in KNOWN else "the model as it is"


def _linked(row: BoardRow) -> str:
    return f"[{_name(row)}]({_paper(row)})" if _paper(row) else _name(row)


def _half(half: float | None) -> str:
    return "" if half is None else f" ± {half:.4f}"


def _seconds(spread: Spread | None) -> str:
    return "–" if spread is None else f"{spread.mean:.3g}"


def _most(row: BoardRow, name: str) -> str:
    """Largest value over seeds, in bytes."""
    values = [m.values[name] for m in row.found if name in m.values]
    return scaled(max(values), "B") if values else "–"
