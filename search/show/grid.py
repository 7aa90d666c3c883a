"""Tables of texts: for a terminal, as CSV, LaTeX or Markdown."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from secateur.search.show.console import show

FORMS = ("table", "csv", "latex", "markdown")
_LATEX = {"\\": r"\textbackslash{}", "±": r"$\pm$", "–": "--", "×": r"$\times$"} | {
    character: "\\" + character for character in "&%$#_{}"
}


@dataclass(frozen=True)
class Grid:
    """Headings and rows of texts; the first `n_text` columns are words, the others numbers.

    Args:
        caption: below a table for people.
        words_last: the last column is words, too.
    """

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    n_text: int = 1
    words_last: bool = False

    def _is_words(self, column: int) -> bool:
        return column < self.n_text or (self.words_last and column == len(self.headings) - 1)

    def csv(self) -> str:
        """Comma-separated values, as RFC 4180 has them."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([self.headings, *self.rows])
        return text.getvalue().rstrip("\n")

    def markdown(self) -> str:
        """Table of GitHub's Markdown."""
        rule = ["---" if self._is_words(i) else "---:" for i in range(len(self.headings))]
        lines = [self.headings, rule, *self.rows]
        return "\n".join(f"| {' | '.join(x.replace('|', chr(92) + '|') for x in line)} |" for line in lines)

    def latex(self) -> str:
        """Tabular with the rules of the package ``booktabs``."""
        columns = "".join("l" if self._is_words(i) else "r" for i in range(len(self.headings)))
        head, *lines = [" & ".join(map(_escaped, line)) + r" \\" for line in (self.headings, *self.rows)]
        body = [r"\toprule", head, r"\midrule", *lines, r"\bottomrule"]
        return "\n".join([rf"\begin{{tabular}}{{{columns}}}", *body, r"\end{tabular}"])

    def show(self, form: str = "table", width: int | None = None) -> None:
        """Print in one of `FORMS`; `width` in columns where stdout is no terminal."""
        if form != "table":
            show({"csv": self.csv, "markdown": self.markdown, "latex": self.latex}[form]())
            return
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(caption=self.caption or None, caption_justify="left", caption_style="dim")
        for index, heading in enumerate(self.headings):
            table.add_column(heading, justify="left" if self._is_words(index) else "right")
        for row in self.rows:
            table.add_row(*map(Text, row))
        Console(width=None if sys.stdout.isatty() else width, highlight=False).print(table)


def _escaped(text: str) -> str:
    """Text for LaTeX."""
    return "".join(_LATEX.get(character, character) for character in text)
