"""Order in which a search removed whole sub-layers, as lines for the allocation rule `prefix`."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from secateur.search.errors import UsageError
from secateur.search.results.run import Run
from secateur.spaces.shape import BlockShape

PARTS = {"attention": "kv_groups", "mlp": "ffn"}


SubLayer = tuple[int, str]
"""Block and kind, ``attention`` or ``mlp``."""

Removed = frozenset[SubLayer]


def removal_order(losses: Iterable[tuple[Removed, float]]) -> list[Removed]:
    """Sub-layers removed at each step: the fewest further ones, and of equally few those with the lowest loss.

    For the models of a greedy search these are its own steps; of equal losses the first.

    Args:
        losses: sub-layers that a model lacks, with its loss.

    Returns:
        The sub-layers that each step removed.
    """
    measured, now, steps = list(losses), Removed(), []
    while further := [(len(lacks), loss, i) for i, (lacks, loss) in enumerate(measured) if lacks > now]:
        lacks, _ = measured[min(further)[2]]
        steps.append(lacks - now)
        now = lacks
    return steps


def order_of(run: Run) -> list[dict[str, int | str]]:
    """Removal order of a run over architectures, as lines of a profile: ``{"block": 3, "kind": "mlp"}``.

    A block whose sub-layers were removed in one step is one line, without ``kind``. Losses are compared at the fidelity
    at which most models without whole sub-layers were measured.

    Raises:
        UsageError: if the run has no such models.
    """
    found: dict[str, list[tuple[Removed, float]]] = defaultdict(list)
    for trial in run.study.trials:
        measured = trial.measurement
        if measured.infeasible is None and measured.fidelity.part == "search":
            lacks = _removed(run.space.config(run.candidate(trial)), run.shape.blocks)
            if lacks is not None:
                found[measured.fidelity.text].append((lacks, measured.values["loss"]))
    most = max(found.values(), key=lambda losses: len({lacks for lacks, _ in losses}), default=[])
    steps = removal_order(most)
    if not steps:
        raise UsageError(
            "Expected a run that removed whole sub-layers or blocks, got none in this one. Search with "
            "`space: {kind: architecture, units: [attention, mlp]}` and `controller: {kind: greedy}`."
        )
    return [line for step in steps for line in _lines(step)]


def _removed(config: Mapping[str, Any], shapes: Sequence[BlockShape]) -> Removed | None:
    """Sub-layers that a candidate lacks; None if it lacks parts of others, or is not an architecture."""
    lacks = set()
    for index, (kept, shape) in enumerate(zip(config.get("blocks", ()), shapes, strict=False)):
        whole = {"attention": shape.n_kv_groups, "mlp": shape.ffn_width}
        if kept.get("queries"):
            return None
        for kind, name in PARTS.items():
            if kept[name] == 0 and whole[kind]:
                lacks.add((index, kind))
            elif kept[name] != whole[kind]:
                return None
    return frozenset(lacks)


def _lines(step: Removed) -> list[dict[str, int | str]]:
    both = Counter(block for block, _ in step)
    lines = {(block, "" if both[block] == len(PARTS) else kind) for block, kind in step}
    return [{"block": block, **({"kind": kind} if kind else {})} for block, kind in sorted(lines)]
