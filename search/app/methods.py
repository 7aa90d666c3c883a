"""The table of methods for people: ``secateur list methods``."""

from __future__ import annotations

from collections.abc import Iterator

from secateur.spaces.methods import METHODS, RULES, MethodRow

Row = dict[str, str]

UNIT = {"weights": "weight", "structure": "KV group, channel", "blocks": "block"}
SETTING = {
    "metric": "metric",
    "reconstruction": "metric",
    "importance": "importance",
    "repair": "repairs",
    "allocation": "allocations",
    "depth": "baselines",
}
"""Of the section ``space``, by stage; the spaces of recipes and architectures name some by other keys too."""

EVIDENCE = {
    "scores": "the metric's scores",
    "influence": "data",
    "flap": "data",
    "outliers": "data",
    "profile": "a file",
}
STATISTICS = {"nothing": [], "data": ["data"], "moments": ["data"], "gram": ["data", "Gram matrices"]}


def method_rows() -> list[Row]:
    """A row a method: its name, the setting that names it, the unit that it works on, what it needs, its paper."""
    return list(_rows())


def _rows() -> Iterator[Row]:
    yielded = False
    for row in dict.fromkeys(METHODS.values()):
        if row.stage == "depth" and not yielded:
            yielded = True
            yield _row(RULES["flap"], "baselines")  # architectures have it as a baseline
        yield _row(row, _setting(row))


def _setting(row: MethodRow) -> str:
    if row.scope == "block":
        return "metrics"
    return (
        "repair"
        if row.stage == "repair" and row.unit == "structure" and not row.scope
        else SETTING[row.stage]
    )


def _row(row: MethodRow, setting: str) -> Row:
    of_repair = row.stage == "repair" and row.unit == "structure"
    return {
        "name": row.name,
        "setting": f"space.{setting}",
        "unit": "output projection" if of_repair else ", ".join(UNIT[unit] for unit in row.units),
        "needs": ", ".join(dict.fromkeys(_needs(row))) or "nothing",
        "origin": row.origin,
        "summary": row.summary,
        "source": row.paper,
    }


def _needs(row: MethodRow) -> Iterator[str]:
    """In words; gradients with the memory that they take beside one window's work."""
    from secateur.pruners.calibration.forward_kinds import FORWARD_KINDS, n_bytes

    yield from STATISTICS[row.needs]
    yield from sorted(EVIDENCE[name] for name in row.evidence)
    if row.gradients:
        yield "data"
        memory = sum(map(n_bytes, row.gradients))
        what = "gradients" if {*row.gradients} - {*FORWARD_KINDS} else "forward passes"
        yield f"{what} ({memory} bytes a weight)" if memory else what
    if row.trains:
        yield "training"
