"""What commands print of a model that they have exported."""

from __future__ import annotations

from typing import TYPE_CHECKING

from secateur.search.show.answers import one_line, show_facts
from secateur.search.show.console import show

if TYPE_CHECKING:
    from secateur.evaluators.exporting import ExportSummary


def show_export(summary: ExportSummary, what: str) -> None:
    """An exported model for people: where it is, what it measured, what was checked.

    Args:
        summary: of the export.
        what: it is, e.g. ``trial 7``.
    """
    show(f"{what} {'was there already' if summary.already else 'exported'}: {summary.directory}")
    show_facts({where: one_line(values) for where, values in summary.measured.items()})
    show_facts({name: f"{v:.3g}" if isinstance(v, float) else str(v) for name, v in summary.checks.items()})
    show(summary.label)
