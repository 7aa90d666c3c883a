"""All pruning methods that settings can name, in one table over the registries of the other rooms."""

from __future__ import annotations

from collections.abc import Collection, Iterator

Row = dict[str, str]

UNITS, OUTPUT, BLOCK = "KV group, channel", "output projection", "block"


def method_rows() -> list[Row]:
    """A row a method: its name, the setting that names it, the unit that it works on, what it needs, its paper."""
    return [*_of_weights(), *_of_units(), *_of_blocks()]


def _row(name: str, setting: str, unit: str, needs: str, summary: str, source: str) -> Row:
    about = {"setting": f"space.{setting}", "unit": unit, "needs": needs}
    return {"name": name, **about, "summary": summary, "source": source}


def _of_weights() -> Iterator[Row]:
    from secateur.pruners.methods import Method
    from secateur.pruners.metrics import METRICS
    from secateur.pruners.reconstructions import RECONSTRUCTIONS

    for name, row in (METRICS | RECONSTRUCTIONS).items():
        method = Method(name)
        yield _row(name, "metric", "weight", _needs(method.needs, method.gradients), row.summary, row.paper)


def _of_units() -> Iterator[Row]:
    from secateur.pruners.structure.importance import IMPORTANCES
    from secateur.pruners.structure.refit import REPAIRS

    for name, score in IMPORTANCES.items():
        needs = _needs(score.needs, score.gradients)
        yield _row(name, "importance", UNITS, needs, score.summary, score.paper)
    for name, repair in REPAIRS.items():
        yield _row(name, "repair", OUTPUT, _needs(repair.needs), repair.summary, repair.paper)


def _of_blocks() -> Iterator[Row]:
    from secateur.pruners.structure.depth import DEPTH

    flap = "groups and channels below one threshold in the whole model"
    yield _row("flap", "baselines", UNITS, _needs("moments"), flap, "https://arxiv.org/abs/2312.11983")
    shortgpt = "blocks go first that turn their input least"
    yield _row("shortgpt", "baselines", BLOCK, "data", shortgpt, "https://arxiv.org/abs/2403.03853")
    for name, row in DEPTH.items():
        needs = _needs("data" if row.data else "nothing", row.gradients)
        yield _row(name, "baselines", BLOCK, needs, row.summary, row.paper)


DATA = {
    "nothing": (),
    "data": ("data",),
    "moments": ("data",),
    "gram": ("data", "Gram matrices"),
}


def _needs(inputs: str, gradients: Collection[str] = ()) -> str:
    """In words; gradients with the memory that they take beside one window's work."""
    from secateur.pruners.gradient_kinds import KINDS

    parts = [*DATA[inputs]]
    if gradients:
        n_bytes = sum(KINDS[kind].n_bytes for kind in KINDS if kind in gradients)
        parts = [*dict.fromkeys([*parts, "data"]), f"gradients ({n_bytes} bytes a weight)"]
    return ", ".join(parts) or "nothing"
