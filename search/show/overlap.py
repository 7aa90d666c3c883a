"""The overlap of masks as a table of the report."""

from __future__ import annotations

from html import escape

from secateur.search.results.run import Run
from secateur.search.study.overlap import read_overlap


def overlap_table(run: Run) -> str:
    """A row for each formula, a column for each published one; "" where nothing was kept."""
    found = read_overlap(run.study.directory)
    if found is None or not found.overlap:
        return ""
    names = {text: name for name, text in found.known.items()}
    head = "".join(f"<th>pruned by {escape(name)}</th>" for name in found.known)
    rows = "\n".join(
        f"<tr><td><code>{escape(text)}</code> {escape(names.get(text, ''))}</td>"
        + "".join(f"<td>{shares[name]:.1%}</td>" if name in shares else "<td>–</td>" for name in found.known)
        + "</tr>"
        for text, shares in found.overlap.items()
    )
    table = f"<thead><tr><th>formula</th>{head}</tr></thead><tbody>\n{rows}\n</tbody>"
    return (
        "<p>The share of the weights that a formula prunes which published ones prune, too: the mean over the "
        f"projections of {len(found.blocks)} blocks.</p>\n"
        f'<div class="scroll"><table>{table}</table></div>'
    )
