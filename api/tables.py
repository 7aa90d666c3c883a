"""Tables of trials: as data frames where pandas is installed, as HTML anywhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from secateur.search.errors import UsageError

if TYPE_CHECKING:
    import pandas


def frame(rows: Sequence[Mapping[str, Any]], instead: str) -> pandas.DataFrame:
    """Rows as a data frame, indexed by ``trial``.

    Args:
        rows: values by column, the same columns in each.
        instead: what gives them without pandas, for the error.

    Raises:
        UsageError: if pandas is not installed.
    """
    try:
        import pandas
    except ImportError:
        raise UsageError(
            f"Expected pandas for a data frame, got none installed. Install pandas, or use `{instead}`."
        ) from None
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return pandas.DataFrame(list(map(dict, rows)), columns=columns or ["trial"]).set_index("trial")


def html(title: str, facts: Mapping[str, str]) -> str:
    """Names and values as HTML, with everything escaped."""
    lines = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in facts.items()
    )
    return f"<b>{escape(title)}</b><table>{lines}</table>"
