"""Parts of a search that depend on its seeds, in one line for people."""

from __future__ import annotations

from collections.abc import Iterator

from secateur.search.controllers.registry import CONTROLLERS
from secateur.search.settings.settings import Settings


def seeds_line(settings: Settings) -> str:
    """Line that says which parts of this search depend on `seed`, on a seed of their own, or on none."""
    by_seed: dict[str, list[str]] = {f"seed {settings.seed}": []}
    for name, value, part in _parts(settings):
        key = f"seed {settings.seed}" if name == "seed" else f"`{name}` {value}"
        by_seed.setdefault(key, []).append(part)
    decided = [f"{key} decides: {', '.join(parts) or 'nothing'}" for key, parts in by_seed.items()]
    fixed = ["the test text"]
    if not CONTROLLERS[settings.controller.kind].draws:
        fixed.append(f"the controller {settings.controller.kind}, which draws nothing at random")
    return f"{'; '.join(decided)}. The same for every seed: {' and '.join(fixed)}"


def _parts(settings: Settings) -> Iterator[tuple[str, int, str]]:
    """Setting, value and what it decides; a seed of its own that equals the search's counts as that."""
    of, seed = settings.evaluator, settings.data_seed
    if CONTROLLERS[settings.controller.kind].draws:
        yield "seed", settings.seed, f"proposals of {settings.controller.kind}"
    data = "seed" if seed == settings.seed else "evaluator.seed"
    yield data, seed, "windows of the calibration and search texts"
    if "random" in _metrics(settings):
        yield data, seed, "scores of the metric random"
    if of.tasks is not None and of.tasks.samples is not None and settings.task_values:
        yield data, seed, "samples of tasks"
    if of.training is not None:
        trained = settings.training_seed
        own = data if trained == seed else "seed" if trained == settings.seed else "evaluator.training.seed"
        yield own, trained, "order of light training"


def _metrics(settings: Settings) -> tuple[str, ...]:
    """Metrics that the space names."""
    space = settings.space
    return (getattr(space, "metric", ""), *(getattr(space, "metrics", None) or ()))
