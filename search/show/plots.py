"""Pictures of a run: course of the search, allocation, formulas. Colours of Okabe and Ito (2008)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from secateur.search.show.values import scaled
from secateur.spaces.whole_file import whole_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from secateur.search.show.phases import Phase

BLUE, VERMILLION, GREY, INK = "#0072B2", "#D55E00", "#8A8A8A", "#222222"
_STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#666666",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "legend.frameon": False,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "svg.fonttype": "none",  # text as text
}
_METADATA: dict[str, dict[str, str | None]] = {
    "png": {"Software": "Secateur"},
    "svg": dict.fromkeys(("Creator", "Date", "Format", "Type")),  # none at all
}
LEVELS = 21
"""Colours of an allocation within a page, one for each 5 % removed."""

NARROW = 4.2
"""Width in inches of a picture for a telephone."""
Array = NDArray[np.float64]
LOG_FROM = 20  # ratio of the largest to the smallest positive value from which an axis is logarithmic
ANNOTATED_BLOCKS = 16  # most blocks for which an allocation's numbers fit into its cells


@contextmanager
def figure_at(path: Path | None, width: float, height: float) -> Iterator[Figure]:
    """Figure that is written at the end, whole or not at all, without a window and without pyplot's state.

    Args:
        path: of the picture, ``.png`` or ``.svg``; None: it is not written.
        width, height: inches.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    stem, form = ("", "") if path is None else (path.stem, path.suffix.removeprefix("."))
    with mpl.rc_context(_STYLE | {"svg.hashsalt": stem}):  # ids differ between the pictures of a page
        figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        yield figure
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as new:
            figure.savefig(new, format=form, dpi=160, metadata=_METADATA[form])


def spread_out(axes: Axes, values: Sequence[float]) -> bool:
    """Make the y axis logarithmic if the values span orders of magnitude; whether they do."""
    positive = [value for value in values if value > 0]
    if not positive or max(positive) / min(positive) < LOG_FROM:
        return False
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    return True


def plot_course(
    path: Path,
    losses: Mapping[str, Sequence[tuple[int, float]]],
    hypervolume: Sequence[tuple[int, float]],
    phases: Sequence[Phase],
    *,
    narrow: bool = False,
) -> None:
    """Plot of the best losses over tokens (see `loss_series`), and of the hypervolume (see `hypervolume_series`).

    Args:
        path: of the picture.
        losses: series of each target.
        hypervolume: after each trial.
        phases: of the search in order, at least one; each is a band with a letter.
        narrow: panels below each other.
    """
    with figure_at(path, *((NARROW, 7.4) if narrow else (11, 4.4))) as figure:
        left, right = figure.subplots(2, 1) if narrow else figure.subplots(1, 2)
        _plot_losses(left, losses, phases[-1].end_tokens, narrow)
        _bands(left, phases, [(p.first_tokens, p.end_tokens) for p in phases])
        if hypervolume:
            numbers, volumes = zip(*hypervolume, strict=True)
            right.step(numbers, volumes, where="post", color=BLUE, lw=1.8)
        _bands(right, phases, [(p.first, p.end) for p in phases])
        right.set(xlabel="trial number", ylabel="hypervolume (1 = the baselines' box)")
        right.set_title("Hypervolume of the front")


def _plot_losses(
    axes: Axes, losses: Mapping[str, Sequence[tuple[int, float]]], n_tokens: int, narrow: bool
) -> None:
    """Plot of the best loss of each target."""
    import matplotlib as mpl

    colors = mpl.colormaps["viridis"](np.linspace(0.0, 0.85, max(1, len(losses))))
    drawn: list[float] = []
    relative = len(losses) > 1  # targets lie orders of magnitude apart
    for (label, points), color in zip(losses.items(), colors, strict=False):
        tokens, values = zip(*[*points, (n_tokens, points[-1][1])], strict=True)
        shown = [value / (values[0] or 1.0) if relative else value for value in values]
        axes.step(
            tokens, shown, where="post", color=color, lw=1.8, label=f"{_percent(label)}: {values[-1]:.3g}"
        )
        axes.plot(tokens[:-1], shown[:-1], "o", color=color, ms=3.5)
        drawn += shown
    spread_out(axes, drawn)
    unit = "relative to the baseline" if relative else "nats/token"
    axes.set(xlabel="tokens evaluated for the search", ylabel=f"best loss so far ({unit})")
    axes.xaxis.set_major_formatter(lambda value, _: scaled(value))
    axes.set_title("Best loss of each target")
    if losses:
        place: dict[str, Any] = {} if narrow else {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)}
        title = "target: best loss\n(nats/token)"
        axes.legend(title=title, fontsize=9, title_fontsize=9, ncols=1 + narrow, **place)


def _bands(axes: Axes, phases: Sequence[Phase], spans: Sequence[tuple[int, int]]) -> None:
    """Band of each phase that is wide enough to be seen, with its letter."""
    whole = max(end for _, end in spans) or 1
    for i, (phase, (start, end)) in enumerate(zip(phases, spans, strict=True)):
        if end <= start:
            continue
        axes.axvspan(start, end, color="#0072B2", alpha=0.09 if i % 2 else 0.03, lw=0, zorder=0)
        place = axes.get_xaxis_transform()
        if end - start > 0.02 * whole:
            axes.text(
                (start + end) / 2,
                0.995,
                phase.letter,
                color=INK,
                fontsize=9,
                ha="center",
                va="top",
                transform=place,
            )


def plot_allocation(
    path: Path, sparsity: Mapping[str, float], linears: Sequence[Mapping[str, Any]], title: str
) -> None:
    """Heat map of the share removed of each linear, projections by blocks, below the means of the blocks.

    Args:
        sparsity: in [0, 1], by full name.
        linears: plain `Prunable` values of all linears, in order; means are weighted by number of weights.
    """
    grid, rows = allocation_grid(sparsity, linears)
    sizes, _ = allocation_grid({linear["name"]: linear["n_weights"] for linear in linears}, linears)
    means = np.nansum(grid * sizes, axis=0) / np.nansum(sizes, axis=0)
    n_blocks = grid.shape[1]
    low, high = np.floor(np.nanmin(grid) * 10) / 10, np.ceil(np.nanmax(grid) * 10) / 10
    if high - low < 0.2:
        low, high = low - 0.1, high + 0.1
    with figure_at(path, min(16.0, max(7.0, 2.6 + 0.42 * n_blocks)), 2.6 + 0.42 * len(rows)) as figure:
        top, heat = figure.subplots(2, 1, sharex=True, height_ratios=[1.5, len(rows) * 0.5 + 0.5])
        whole = float(np.nansum(grid * sizes) / np.nansum(sizes))
        top.bar(range(n_blocks), means, color=BLUE, width=0.8)
        top.axhline(whole, color=VERMILLION, lw=1.4, ls="--")
        top.set(ylabel="mean share removed", ylim=(0, 1))
        top.grid(visible=False, axis="x")
        top.set_title(f"{title}; dashed: all weights, {whole:.1%}")
        image = heat.imshow(grid, aspect="auto", cmap="cividis", vmin=low, vmax=high, interpolation="nearest")
        heat.grid(visible=False)
        heat.set_yticks(range(len(rows)), rows)
        heat.set_xticks(range(0, n_blocks, 1 if n_blocks <= 32 else 4))
        heat.set(xlabel="block")
        if n_blocks <= ANNOTATED_BLOCKS:
            _annotate(heat, grid, (low + high) / 2)
        figure.colorbar(image, ax=heat, label="share removed", pad=0.01)


def plot_typeset(path: Path, rows: Sequence[tuple[str, str]], *, narrow: bool = False) -> None:
    """Typeset candidates, one a row: a label and math-mode LaTeX each, below each other if `narrow`."""
    with figure_at(path, NARROW if narrow else 11.0, 0.6 + (0.8 if narrow else 0.55) * len(rows)) as figure:
        axes = figure.subplots()
        axes.set_axis_off()
        for i, (label, text) in enumerate(rows):
            at, below = 1 - (i + 0.5) / max(len(rows), 1), 0.2 / max(len(rows), 1) if narrow else 0.0
            axes.text(0.0, at + below, label, color=INK, va="center", transform=axes.transAxes)
            place: dict[str, Any] = {"va": "center", "transform": axes.transAxes}
            size = 11 if narrow else 13
            axes.text(
                0.0 if narrow else 0.25, at - below, _mathtext(text), color=BLUE, fontsize=size, **place
            )


_MATHTEXT = {r"\lVert": r"\|", r"\rVert": r"\|", r"\lvert": "|", r"\rvert": "|", r"\tfrac": r"\frac"}


def _mathtext(latex: str) -> str:
    """Text in matplotlib's subset of LaTeX; plain text where the subset does not suffice."""
    from matplotlib.mathtext import MathTextParser

    for ours, theirs in _MATHTEXT.items():
        latex = latex.replace(ours, theirs)
    try:
        MathTextParser("path").parse(f"${latex}$")
    except ValueError:
        return latex.replace("$", "")
    return f"${latex}$"


def allocation_grid(
    values: Mapping[str, float], linears: Sequence[Mapping[str, Any]]
) -> tuple[Array, list[str]]:
    """Grid of a value of each linear, ``projections blocks``, NaN for a missing projection; and the rows' names."""
    # The name of a row is that of a linear within its block, i.e. after the block's number.
    names = [x["name"].partition(f".{x['block']}.")[2] or x["name"] for x in linears]
    blocks, rows = sorted({x["block"] for x in linears}), list(dict.fromkeys(names))
    grid = np.full((len(rows), len(blocks)), np.nan)
    for linear, name in zip(linears, names, strict=True):
        grid[rows.index(name), blocks.index(linear["block"])] = values.get(linear["name"], 0.0)
    return grid, rows


def _annotate(axes: Axes, grid: Array, middle: float) -> None:
    for (row, block), value in np.ndenumerate(grid):
        if not np.isnan(value):
            text = f"{value:.2f}".lstrip("0") if value < 1 else "1"
            color = "white" if value < middle else "black"
            axes.text(block, row, text, ha="center", va="center", fontsize=9, color=color)


def _percent(label: str) -> str:
    """Percentage for a target's label, e.g. ``60%`` for ``0.6``."""
    try:
        return f"{float(label):.4g}" if float(label) > 1 else f"{float(label) * 100:.4g}%"
    except ValueError:
        return label
