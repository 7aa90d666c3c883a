"""The controllers by name.

A new one is a new file and a row here, or an entry point of the group ``secateur.controllers``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from secateur.search.controller import Controller
from secateur.search.controllers.evolution import Evolution, EvolutionSettings
from secateur.search.controllers.genetic_programming.controller import Genetic
from secateur.search.controllers.genetic_programming.settings import GeneticSettings
from secateur.search.controllers.greedy import Greedy, GreedySettings
from secateur.search.controllers.learned import Learned, LearnedSettings
from secateur.search.controllers.local_model import curvature_fidelity
from secateur.search.controllers.optuna.controller import Optuna, OptunaSettings
from secateur.search.controllers.random import Random, RandomSettings
from secateur.search.controllers.sensitivity import Sensitivity, SensitivitySettings
from secateur.search.controllers.surrogate.controller import Surrogate, SurrogateSettings
from secateur.search.controllers.trust_region import TrustRegion, TrustRegionSettings
from secateur.search.controllers.uniform import Uniform, UniformSettings
from secateur.spaces.measurement import Fidelity
from secateur.spaces.plugins import Registry, Row


@dataclass(frozen=True)
class ControllerRow(Row):
    """One controller.

    Args:
        settings: model of the section ``controller`` of the settings.
        build: the controller, from the space, the fidelities (ascending, of the part ``search``), the seed of all
            random choices and the settings; by the keyword `objectives` the names of the search's objectives if it
            takes several. Raises a ValueError if they do not fit.
        summary: one line for ``secateur list controllers``.
        source: address of the paper that it comes from; empty if there is none.
        multi_objective: whether it supports several objectives; other controllers minimise ``loss``.
        screens: whether it takes the keyword `proxy`, a fidelity or None, with these settings.
        islands: whether it takes the keyword `n_workers`.
        curvature: from its settings and the fidelities to that of the dense model's curvature, if it proposes
            measurements of the part ``gradient``, else None.
        draws: whether its proposals depend on the seed.
    """

    settings: type[BaseModel]
    build: Callable[..., Controller]
    summary: str
    source: str = ""
    multi_objective: bool = False
    screens: Callable[[Any], bool] = lambda settings: False
    islands: bool = False
    curvature: Callable[[Any, Sequence[Fidelity]], Fidelity | None] = lambda settings, fidelities: None
    draws: bool = True


def curvature_of(settings: Any, fidelities: Sequence[Fidelity]) -> Fidelity | None:
    """See `ControllerRow`: of controllers that take the curvature or gradients, and of those that start with one."""
    if settings.kind in ("trust_region", "learned") or (
        settings.kind == "sensitivity" and settings.by == "curvature"
    ):
        return curvature_fidelity(fidelities, settings.n_tokens)
    if getattr(settings, "guided", 1) > 1:
        return curvature_fidelity(fidelities, settings.trust_region.n_tokens)
    first = getattr(settings, "start", None) or getattr(settings, "prior", None)
    return (
        curvature_of(getattr(settings, first), fidelities)
        if first in ("sensitivity", "trust_region")
        else None
    )


CONTROLLERS: Registry[ControllerRow] = Registry(
    "secateur.controllers",
    ControllerRow,
    {
        "uniform": ControllerRow(
            UniformSettings, Uniform, "the dense model and the uniform candidates alone", draws=False
        ),
        "random": ControllerRow(RandomSettings, Random, "random candidates, the targets in turn"),
        "evolution": ControllerRow(
            EvolutionSettings,
            Evolution,
            "elites for each target, mutation and crossover, successive halving over fidelities",
            "https://arxiv.org/abs/2410.14649",
            screens=lambda settings: settings.screening is not None,
            curvature=curvature_of,
        ),
        "genetic": ControllerRow(
            GeneticSettings,
            Genetic,
            "genetic programming over formulas, with proxy screening, selection by loss and size, and islands",
            "https://arxiv.org/abs/2406.02924",
            screens=lambda settings: True,
            islands=True,
        ),
        "sensitivity": ControllerRow(
            SensitivitySettings,
            Sensitivity,
            "sensitivity of each slot alone, then the best combination by a knapsack",
            "https://arxiv.org/abs/2202.04290",
            curvature=curvature_of,
        ),
        "trust_region": ControllerRow(
            TrustRegionSettings,
            TrustRegion,
            "steps from the curvature's solution, by the gradient of the loss, within a trust region",
            curvature=curvature_of,
        ),
        "learned": ControllerRow(
            LearnedSettings,
            Learned,
            "logits of every slot's options, learned by gradients at candidates drawn from them",
            "https://arxiv.org/abs/2409.17481",
            curvature=curvature_of,
        ),
        "surrogate": ControllerRow(
            SurrogateSettings,
            Surrogate,
            "exact minimisers of draws from a model of the loss that learns from all measurements",
            "https://arxiv.org/abs/1806.08838",
            curvature=curvature_of,
        ),
        "greedy": ControllerRow(
            GreedySettings,
            Greedy,
            "greedy removal of blocks, sub-layers or levels, the smallest loss first",
            "https://arxiv.org/abs/2406.10594",
        ),
        "optuna": ControllerRow(
            OptunaSettings,
            Optuna,
            "a sampler of Optuna: tpe, nsga2, nsga3, gp, cmaes, random, or a dotted name",
            "https://arxiv.org/abs/1907.10902",
            multi_objective=True,
        ),
    },
)
