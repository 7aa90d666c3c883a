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
        settings: what the section ``controller`` of the settings may hold.
        build: the controller, from (space, fidelities, seed, settings), and by the keyword `objectives` the
            names of the search's objectives if it takes several.
        summary: one line for ``secateur list controllers``.
        source: address of the paper that it comes from; empty if there is none.
        multi_objective: whether it takes several objectives; the others minimise ``loss``.
        screens: whether it takes, by keywords, the fidelity of a `proxy` if the evaluator has one, and `n_workers`.
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
            summary="random candidates of every target in turn",
            source="",
        ),
        "evolution": ControllerRow(
            settings=EvolutionSettings,
            build=Evolution,
            summary="elites for each target, varied, winnowed by successive halving over fidelities",
            source="https://arxiv.org/abs/2410.14649",
        ),
        "genetic": ControllerRow(
            settings=GeneticSettings,
            build=Genetic,
            summary="genetic programming over formulas: screened by a proxy, kept by loss and size, on islands",
            source="https://arxiv.org/abs/2406.02924",
            screens=True,
        ),
        "sensitivity": ControllerRow(
            settings=SensitivitySettings,
            build=Sensitivity,
            summary="measures every slot alone and solves for the best combination",
            source="https://arxiv.org/abs/2202.04290",
        ),
        "greedy": ControllerRow(
            settings=GreedySettings,
            build=Greedy,
            summary="removes the block, sub-layer or level whose removal hurts least, again and again",
            source="https://arxiv.org/abs/2406.10594",
        ),
        "optuna": ControllerRow(
            settings=OptunaSettings,
            build=Optuna,
            summary="a sampler of Optuna's: tpe, nsga2, nsga3, gp, cmaes, random, or a dotted name",
            source="https://arxiv.org/abs/1907.10902",
            multi_objective=True,
        ),
    },
)
