"""The controllers by name.

A new one is a new file and a row here, or an entry point of the group ``secateur.controllers``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pydantic import BaseModel

from secateur.search.controller import Controller
from secateur.search.controllers.evolution import Evolution, EvolutionSettings
from secateur.search.controllers.genetic_programming.controller import Genetic
from secateur.search.controllers.genetic_programming.settings import GeneticSettings
from secateur.search.controllers.greedy import Greedy, GreedySettings
from secateur.search.controllers.optuna.controller import Optuna, OptunaSettings
from secateur.search.controllers.random import Random, RandomSettings
from secateur.search.controllers.sensitivity import Sensitivity, SensitivitySettings
from secateur.search.controllers.uniform import Uniform, UniformSettings
from secateur.spaces.plugins import Registry, Row


@dataclass(frozen=True)
class ControllerRow(Row):
    """One controller.

    Args:
        settings: model of the section ``controller`` of the settings.
        build: the controller, from (space, fidelities, seed, settings), and by the keyword `objectives` the
            names of the search's objectives if it takes several.
        summary: one line for ``secateur list controllers``.
        source: address of the paper that it comes from; empty if there is none.
        multi_objective: whether it supports several objectives; other controllers minimise ``loss``.
        screens: whether it takes the keywords `proxy`, a fidelity or None, and `n_workers`.
    """

    settings: type[BaseModel]
    build: Callable[..., Controller]
    summary: str
    source: str
    multi_objective: bool = False
    screens: bool = False


CONTROLLERS: Registry[ControllerRow] = Registry(
    "secateur.controllers",
    ControllerRow,
    {
        "uniform": ControllerRow(
            settings=UniformSettings,
            build=Uniform,
            summary="the dense model and the uniform candidates alone",
            source="",
        ),
        "random": ControllerRow(
            settings=RandomSettings,
            build=Random,
            summary="random candidates, the targets in turn",
            source="",
        ),
        "evolution": ControllerRow(
            settings=EvolutionSettings,
            build=Evolution,
            summary="elites for each target, mutation and crossover, successive halving over fidelities",
            source="https://arxiv.org/abs/2410.14649",
        ),
        "genetic": ControllerRow(
            settings=GeneticSettings,
            build=Genetic,
            summary="genetic programming over formulas, with proxy screening, selection by loss and size, and islands",
            source="https://arxiv.org/abs/2406.02924",
            screens=True,
        ),
        "sensitivity": ControllerRow(
            settings=SensitivitySettings,
            build=Sensitivity,
            summary="sensitivity of each slot alone, then the best combination by a knapsack",
            source="https://arxiv.org/abs/2202.04290",
        ),
        "greedy": ControllerRow(
            settings=GreedySettings,
            build=Greedy,
            summary="greedy removal of blocks, sub-layers or levels, the smallest loss first",
            source="https://arxiv.org/abs/2406.10594",
        ),
        "optuna": ControllerRow(
            settings=OptunaSettings,
            build=Optuna,
            summary="a sampler of Optuna: tpe, nsga2, nsga3, gp, cmaes, random, or a dotted name",
            source="https://arxiv.org/abs/1907.10902",
            multi_objective=True,
        ),
    },
)
