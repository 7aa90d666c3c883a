"""All pruning methods that settings can name, in one table over the registries of the other rooms."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from secateur.pruners.calibration.gradient_kinds import Kind

Row = dict[str, str]

UNITS, OUTPUT, BLOCK = "KV group, channel", "output projection", "block"


def method_rows() -> list[Row]:
    """A row a method: its name, the setting that names it, the unit that it works on, what it needs, its paper."""
    return [*_of_weights(), *_of_units(), *_of_blocks(), *_of_rules()]


def _row(name: str, setting: str, unit: str, needs: str, summary: str, source: str) -> Row:
    about = {"setting": f"space.{setting}", "unit": unit, "needs": needs}
    return {"name": name, **about, "summary": summary, "source": source}


def _of_weights() -> Iterator[Row]:
    from secateur.pruners.weights.block_reconstructions import BLOCK_RECONSTRUCTIONS
    from secateur.pruners.weights.mask_repairs import MASK_REPAIRS
    from secateur.pruners.weights.method import Method
    from secateur.pruners.weights.metrics import METRICS
    from secateur.pruners.weights.reconstructions import RECONSTRUCTIONS

    for name, row in (METRICS | RECONSTRUCTIONS).items():
        method = Method(name)
        yield _row(name, "metric", "weight", _needs(method.needs, method.gradients), row.summary, row.paper)
    for name, whole in BLOCK_RECONSTRUCTIONS.items():
        yield _row(name, "metrics", "weight", _needs("gram"), whole.summary, whole.paper)
    for name, repair in MASK_REPAIRS.items():
        yield _row(name, "repairs", "weight", _needs(repair.needs), repair.summary, repair.paper)


def _of_units() -> Iterator[Row]:
    from secateur.pruners.structure.importance import IMPORTANCES
    from secateur.pruners.structure.kprune import STREAM_REPAIRS
    from secateur.pruners.structure.refit import REPAIRS

    for name, score in IMPORTANCES.items():
        needs = _needs(score.needs, score.gradients)
        yield _row(name, "importance", UNITS, needs, score.summary, score.paper)
    for name, repair in REPAIRS.items():
        yield _row(name, "repair", OUTPUT, _needs(repair.needs), repair.summary, repair.paper)
    for name, stream in STREAM_REPAIRS.items():
        yield _row(name, "repairs", OUTPUT, _needs("gram"), stream.summary, stream.paper)


def _of_blocks() -> Iterator[Row]:
    from secateur.pruners.depth.depth import DEPTH
    from secateur.pruners.depth.depth_repairs import DEPTH_REPAIRS

    flap = "groups and channels below one threshold in the whole model"
    yield _row("flap", "baselines", UNITS, _needs("moments"), flap, "https://arxiv.org/abs/2312.11983")
    shortgpt = "blocks go first that turn their input least"
    yield _row("shortgpt", "baselines", BLOCK, "data", shortgpt, "https://arxiv.org/abs/2403.03853")
    for name, row in DEPTH.items():
        needs = _needs("data" if row.data else "nothing", row.gradients)
        yield _row(name, "baselines", BLOCK, needs, row.summary, row.paper)
    for name, repair in DEPTH_REPAIRS.items():
        needs = _needs("data" if repair.data else "nothing") + (", training" if repair.trains else "")
        yield _row(name, "repairs", BLOCK, needs, repair.summary, repair.paper)


def _of_rules() -> Iterator[Row]:
    from secateur.spaces.recipe.rules import RULES

    spread = {"weights": "weight", "structure": UNITS}
    for name, row in RULES.items():
        unit = ", ".join(spread[of] for of in spread if of in row.units)
        needs = ", ".join(RULE_NEEDS[need] for need in sorted(row.needs)) or "nothing"
        yield _row(name, "allocations", unit, needs, row.summary, row.paper)


RULE_NEEDS = {
    "scores": "the metric's scores",
    "influence": "data",
    "flap": "data",
    "outliers": "data",
    "profile": "a file",
}
DATA = {
    "nothing": (),
    "data": ("data",),
    "moments": ("data",),
    "gram": ("data", "Gram matrices"),
}


def _needs(inputs: str, gradients: Collection[Kind] = ()) -> str:
    """In words; gradients with the memory that they take beside one window's work."""
    from secateur.pruners.calibration.forward_kinds import FORWARD_KINDS, n_bytes

    parts = [*DATA[inputs], *(["data"] if gradients else [])]
    memory = sum(map(n_bytes, gradients))
    if gradients:
        what = "gradients" if {*gradients} - {*FORWARD_KINDS} else "forward passes"
        parts.append(f"{what} ({memory} bytes a weight)" if memory else what)
    return ", ".join(dict.fromkeys(parts)) or "nothing"
