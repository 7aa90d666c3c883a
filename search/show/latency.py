"""Latency tables and comparisons as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from secateur.search.show.console import show


def show_table(measured: Mapping[str, Any], path: str) -> None:
    """Print a latency table, the content of a file: the dense model, then each size of a sub-layer."""
    show(conditions_line(measured["conditions"], measured["rounds"]))
    phases, dense = measured["table"]["phases"], measured["dense_ms"]
    n_blocks = len(measured["conditions"]["shape"]["blocks"])
    show(_row("ms", phases))
    show(_row("whole model", [_spread(dense[phase]) for phase in phases]))
    sums = [x["rest_ms"] + n_blocks * (x["attention_ms"][-1] + x["ffn"][-1][1]) for x in phases.values()]
    show(_row("sum of the table", [f"{ms:.3g}" for ms in sums]))
    show(_row("outside the blocks", [f"{x['rest_ms']:.3g}" for x in phases.values()]))
    first = next(iter(phases.values()))
    for groups in range(1, len(first["attention_ms"])):
        name = f"attention, {groups} KV group{'s' * (groups > 1)}"
        show(_row(name, [f"{x['attention_ms'][groups]:.3g}" for x in phases.values()]))
    for i, (width, _) in enumerate(first["ffn"][1:], start=1):
        show(_row(f"MLP, {width} channels", [f"{x['ffn'][i][1]:.3g}" for x in phases.values()]))
    show(f"saved in {path}")


def show_comparison(found: Mapping[str, Any]) -> None:
    """Print latencies of whole models, the dense one first."""
    show(conditions_line(found["conditions"], found["rounds"]))
    for phase, rows in found["phases"].items():
        show(phase)
        dense = next(iter(rows.values()))["predicted_ms"]
        for name, row in rows.items():
            ratio, predicted = row["ratio"], row["predicted_ms"]
            says = "" if predicted is None else f"; predicted {predicted:.4g} ms, {predicted / dense:.3f}x"
            spread = f"{ratio['median']:.3f}x ({ratio['low']:.3f} to {ratio['high']:.3f})"
            show(f"  {row['ms']:.4g} ms, {spread}{says}  {name}")


def conditions_line(conditions: Mapping[str, Any], rounds: int) -> str:
    """Conditions of latency measurements in one line."""
    threads = conditions["threads"]
    on = f"{conditions['device']}, {conditions['dtype']}" + (f", {threads} threads" if threads else "")
    clock = "wall time" if conditions["clock"] == "wall" else "processor time"
    steps = ", decode in CUDA graphs" if conditions.get("decode") == "graph" else ""
    batch = conditions["batch"]
    sizes = ", ".join(map(str, batch)) if isinstance(batch, list) else batch
    return f"{on}, batch {sizes}, prompt {conditions['prompt']}; {clock}, {rounds} rounds{steps}"


def _row(name: str, cells: Any) -> str:
    return f"  {name:<24}" + "".join(f"{cell:>28}" for cell in cells)


def _spread(spread: Mapping[str, float]) -> str:
    return f"{spread['median']:.3g} ({spread['low']:.3g} to {spread['high']:.3g})"
