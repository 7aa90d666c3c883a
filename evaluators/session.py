"""Everything that a worker holds, made once from a small plain description that can travel."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from secateur.evaluators.assembly import assemble_all
from secateur.evaluators.cases import MAIN, cases_of, in_general
from secateur.evaluators.data.text import Part as TextPart
from secateur.evaluators.data.text import Text, load_parts, load_sources
from secateur.evaluators.data.tokens import Order, windows
from secateur.evaluators.data.windows import EvaluationData
from secateur.evaluators.evaluator import Evaluator
from secateur.evaluators.latency.store import find_table, table_sha256
from secateur.evaluators.plan import Plan
from secateur.evaluators.tasks.task_set import TaskSet, tasks_sha256
from secateur.pruners.calibration.tokens import tokens_sha256
from secateur.pruners.export.capability import held_groups
from secateur.pruners.models.anatomy import Anatomy
from secateur.pruners.models.discover import dissect
from secateur.pruners.models.loading import LoadedModel, load_model
from secateur.pruners.models.shape import model_shape, prunables
from secateur.pruners.recipes.pruner import RecipePruner
from secateur.spaces.architecture.candidate import KeptUnits
from secateur.spaces.latency import LatencyTable
from secateur.spaces.measurement import Part
from secateur.spaces.registry import SPACES
from secateur.spaces.shape import ModelShape, Prunable

__all__ = ["Plan", "Workbench", "set_threads"]

CHECK_TOKENS = 256
"""Positions on which a saved model's logits are compared."""


class Workbench:
    """The dense model, its space and its data.

    Args:
        plan: what to set up.
        say: told in one line what is being done.
        cases: plans that candidates are measured by, see `cases_of`; None: those of the plan.

    Raises:
        ValueError: on anything in the plan that does not fit (model, family, metric, texts, target).
    """

    def __init__(
        self,
        plan: Plan,
        say: Callable[[str], None] = lambda line: None,
        *,
        cases: Mapping[str, Plan] | None = None,
    ) -> None:
        self.plan = plan
        self._say = say
        self._cases = cases_of(plan) if cases is None else cases
        plan.rig.check(plan)
        self._texts = load_parts(plan.calibration, plan.search, plan.test)
        self.sources: Mapping[str, Text] = (
            load_sources(plan.sources, plan.calibration, plan.search, plan.test) if plan.sources else {}
        )
        say(f"loading {plan.model}")
        self.loaded: LoadedModel = load_model(
            plan.model, dtype=plan.dtype, device=plan.device, trust_remote_code=plan.trust_remote_code
        )
        self.anatomy: Anatomy = dissect(self.loaded.model)
        self.prunables: list[Prunable] = prunables(self.anatomy)
        for case in self._cases.values():
            if case.model == plan.model:
                case.rig.check_model(case, self.anatomy)
        self.space: Any = self._space(plan)
        self.cases: dict[str, tuple[Plan, Any]] = {
            name: (case, self.space if name == MAIN or case is plan else self._space(case))
            for name, case in self._cases.items()
            if case.model == plan.model
        }
        self.levels: Path | None = None
        """Where `build_levels` made what it makes, in this process or in one before, if it did."""
        self.units: Sequence[KeptUnits] = ()
        """Of each block, what stayed when the live model was pruned, if it was cut."""
        self.calibration = self._cut("calibration", plan.calibration_tokens)
        self.windows: Mapping[Part, Int[Tensor, "windows length"]] = {
            "search": self._cut("search", plan.fidelities[-2].n_tokens),
            "test": self._cut("test", plan.fidelities[-1].n_tokens),
        }
        plan.rig.check_texts(self)

    @cached_property
    def others(self) -> tuple[Workbench, ...]:
        """The benches of the other models that candidates are measured on.

        Raises:
            ValueError: as for this one.
        """
        by_model: dict[str, dict[str, Plan]] = {}
        for name, case in self._cases.items():
            if case.model != self.plan.model:
                by_model.setdefault(case.model, {})[name] = case
        return tuple(Workbench(next(iter(x.values())), self._say, cases=x) for x in by_model.values())

    def beside(self, directory: Path) -> Path:
        """Where the store or the kit of this bench is, if it is one of the others: beside that of the first."""
        return directory.with_name(f"{directory.name}-{self.loaded.fingerprint[:12]}")

    def _space(self, plan: Plan) -> Any:
        return SPACES[plan.space.kind].build(plan.space, self.prunables, self.space_shape)

    @cached_property
    def space_shape(self) -> ModelShape:
        """The dense model's size as spaces know it: bytes as it is stored, MACs at a context of one window."""
        cuts = self.plan.rig.cuts(self.plan)
        return model_shape(
            self.anatomy,
            self.plan.window,
            self.loaded.stored_dtype.itemsize,
            blocks=cuts,
            latency=self.latency_table,
            held_groups=held_groups(self.plan.space, self.anatomy) if cuts else None,
        )

    @cached_property
    def latency_table(self) -> LatencyTable | None:
        """What latencies are predicted from, if the plan asks for them."""
        source = self.plan.latency
        return None if source is None else find_table(self.anatomy, source, self.plan.model)

    @cached_property
    def task_set(self) -> TaskSet | None:
        """The tasks of the plan over the live model, if it has some.

        Raises:
            ValueError: if they can't be loaded.
        """
        tasks = self.plan.tasks
        return None if tasks is None else TaskSet(tasks, self.loaded.model, self.loaded.tokenizer)

    @cached_property
    def recipes(self) -> RecipePruner:
        """Decides recipes, if the space is one of them; made while the live model is dense."""
        return RecipePruner(self)

    def cost(self, candidate: Any) -> Mapping[str, float]:
        """What a candidate costs, exactly; of a recipe it must be known before the live model is pruned."""
        count = self.plan.rig.cost
        found = None if count is None else count(self, self.space.config(candidate))
        return self.space.cost(candidate) if found is None else found

    def _cut(self, part: TextPart, n_tokens: int) -> Int[Tensor, "windows length"]:
        order: Order = "sequential" if part == "test" else "random"
        return windows(
            self.loaded.tokenizer, self._texts[part], self.plan.window, n_tokens, order, self.plan.seed
        )

    @property
    def check_tokens(self) -> Int[Tensor, "1 length"]:
        """On which a saved model's logits are compared."""
        return self.windows["test"][:1, :CHECK_TOKENS]

    def training_windows(self) -> Int[Tensor, "windows length"]:
        """All windows of the calibration part: what may be trained on, in the order of the seed."""
        text = self._texts["calibration"]
        return windows(self.loaded.tokenizer, text, self.plan.window, None, "random", self.plan.seed)

    @cached_property
    def calibration_sha256(self) -> str:
        """Hash of the calibration tokens."""
        return tokens_sha256(self.calibration)

    def facts(self) -> dict[str, str]:
        """Content hashes that measurements depend on."""
        hashes = {f"{part}_text": text.sha256 for part, text in self._texts.items()}
        hashes |= {f"text of {name}": text.sha256 for name, text in self.sources.items()}
        profile = getattr(self.plan.space, "profile", None)
        if profile is not None:
            hashes["profile"] = hashlib.sha256(Path(profile).read_bytes()).hexdigest()
        if self.latency_table is not None:
            hashes["latency_table"] = table_sha256(self.latency_table)
        if self.plan.tasks is not None:
            hashes["tasks"] = tasks_sha256(self.plan.tasks)
        return {"model": self.loaded.fingerprint, "calibration_tokens": self.calibration_sha256, **hashes}

    def facts_of_others(self) -> dict[str, str]:
        """Content hashes of the other models, whose texts are the same.

        Raises:
            ValueError: if one of them does not fit the plan.
        """
        own = ("model", "calibration_tokens")
        return {f"{x.plan.model}: {name}": x.facts()[name] for x in self.others for name in own}

    def build_levels(self, directory: Path, on_block: Callable[[int], None] = lambda index: None) -> None:
        """Make what candidates are switched by, such as the level store, unless it is there.

        The space has further baselines afterwards, if its kind has some that need it.
        """
        self.levels, rig = directory, self.plan.rig
        rig.build(self, directory, on_block)
        if rig.further is not None:
            self.space = self.space.with_baselines(rig.further(self, directory))
        for other in self.others:
            other.build_levels(other.beside(directory), on_block)

    def data(self) -> EvaluationData:
        """The search and test windows in batches; what is asked for first is prepared with the weights of then."""
        return EvaluationData(self.anatomy, self.windows, self.plan.fidelities)

    def evaluator(self, directory: Path, worker: str = "local") -> Evaluator:
        """An evaluator over what `build_levels` made in the directory."""
        return in_general(self.evaluators(directory, worker), self.space)

    def evaluators(self, directory: Path, worker: str = "local") -> dict[str, Evaluator]:
        """The evaluator of each case by its name, over what `build_levels` made in the directory."""
        windows = self.training_windows() if self.plan.training is not None else None
        found = assemble_all(
            self.cases,
            self.anatomy,
            self.data(),
            directory,
            training_windows=windows,
            tasks=self.task_set,
            worker=worker,
        )
        for other in self.others:
            found |= other.evaluators(other.beside(directory), worker)
        return found

    def prune(
        self,
        config: Mapping[str, Any],
        *,
        sequential: bool,
        on_block: Callable[[int], None] = lambda index: None,
    ) -> None:
        """Prune the live model once, for real; the evaluator's levels are not used.

        Args:
            config: as the space gives it for a candidate.
            sequential: see `prune`.
            on_block: told the index of each block that is done.
        """
        self.units = self.plan.rig.prune(self, config, sequential, on_block)


def set_threads(threads: int | None) -> None:
    """Threads that torch computes with; None leaves its choice."""
    if threads is not None:
        torch.set_num_threads(threads)
