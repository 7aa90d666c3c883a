"""The table of methods for people: ``secateur list methods``."""

from __future__ import annotations

from collections.abc import Iterator

from secateur.spaces.method import MethodRow
from secateur.spaces.method_table import METHODS
from secateur.spaces.methods import RULES

Row = dict[str, str]

UNIT = {"weights": "weight", "structure": "KV group, channel", "blocks": "block", "experts": "expert"}
SETTING = {
    "metric": "metric",
    "reconstruction": "metric",
    "importance": "importance",
    "repair": "repairs",
    "allocation": "allocations",
    "depth": "baselines",
}
"""Key of the section ``space`` by stage; the spaces of recipes and architectures have other keys too."""

EVIDENCE = {
    "scores": "the metric's scores",
    "influence": "data",
    "flap": "data",
    "outliers": "data",
    "profile": "a file",
}
STATISTICS = {"nothing": [], "data": ["data"], "moments": ["data"], "gram": ["data", "Gram matrices"]}


def method_rows() -> list[Row]:
    """A row a method: its name, the setting that names it, its unit, its needs and its paper."""
    methods = [*dict.fromkeys(METHODS.values())]
    rows = [_row(row) for row in methods]
    n_before = [row.stage for row in methods].index("depth")
    baseline = {**_row(RULES["flap"]), "setting": "space.baselines"}  # of architectures
    return [*rows[:n_before], baseline, *rows[n_before:]]


def _row(row: MethodRow) -> Row:
    of_structure = row.stage == "repair" and row.unit == "structure"
    setting = "repair" if of_structure and not row.scope else SETTING[row.stage]
    if row.unit == "experts":
        setting = "repair" if row.stage == "repair" else "expert_importance"
    return {
        "name": row.name,
        "setting": "space.metrics" if row.scope and row.stage == "reconstruction" else f"space.{setting}",
        "unit": "output projection" if of_structure else ", ".join(UNIT[unit] for unit in row.units),
        "needs": ", ".join(dict.fromkeys(_needs(row))) or "nothing",
        "origin": row.origin,
        "summary": row.summary,
        "source": row.paper,
    }


def _needs(row: MethodRow) -> Iterator[str]:
    """Needs in words; gradients with their memory beside that of one window."""
    from secateur.pruners.calibration.pass_kinds import n_bytes, takes_backward

    yield from STATISTICS[row.needs]
    yield from sorted(EVIDENCE[name] for name in row.evidence if name in EVIDENCE)
    if row.gradients:
        yield "data"
        memory = sum(map(n_bytes, row.gradients))
        what = "gradients" if any(map(takes_backward, row.gradients)) else "forward passes"
        yield f"{what} ({memory} bytes a weight)" if memory else what
    if row.contrasts:
        yield "a contrast text"
    if row.trains:
        yield "training"
