"""Session: the dense model, its space, its pruner and its data, opened once from a plan."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from secateur.evaluators.cases import MAIN, Case, cases_of, in_general
from secateur.evaluators.damaged import Damaged, find_damaged, read_damaged, reference_of
from secateur.evaluators.data.text import Part as TextPart
from secateur.evaluators.data.text import Text, load_contrast, load_parts, load_sources
from secateur.evaluators.data.tokens import Order, windows
from secateur.evaluators.data.windows import EvaluationData
from secateur.evaluators.evaluator import Evaluator
from secateur.evaluators.latency.store import find_table, table_sha256
from secateur.evaluators.plan import SessionPlan
from secateur.evaluators.tasks.task_set import TaskSet, tasks_sha256
from secateur.pruners.calibration.tokens import Calibration, Source, bos_token, tokenize
from secateur.pruners.curvature import build_curvature
from secateur.pruners.experts.routing import starved_experts
from secateur.pruners.models.anatomy import Anatomy
from secateur.pruners.models.compiled import check_compiler
from secateur.pruners.models.loading import EMBEDDED, SPREAD, LoadedModel
from secateur.pruners.models.mapped import MappedModel, NotStreamedError
from secateur.pruners.models.opening import open_model
from secateur.pruners.models.shape import prunables
from secateur.pruners.models.usable import check_windows
from secateur.pruners.pruner import Config, DenseModel, pruner_class
from secateur.spaces.latency import LatencyTable
from secateur.spaces.located import located
from secateur.spaces.measurement import Fidelity, Part
from secateur.spaces.method import CONTRAST
from secateur.spaces.registry import SPACES
from secateur.spaces.shape import Prunable

GRADIENT_TOKENS = 65_536
"""Largest number of tokens that gradients are computed on, each on a few of them."""


class Session:
    """The dense model, its space, its pruner and its data.

    Args:
        plan: of the session.
        say: given progress, one line at a time.
        cases: plans that candidates are measured by, see `cases_of`; None: those of the plan.

    Attributes:
        damaged: positions that ``weighted_kl`` is measured at, see `open_damaged`; None: it is not measured.

    Raises:
        ValueError: on anything in the plan that does not fit (model, family, metric, texts, target).
    """

    def __init__(
        self,
        plan: SessionPlan,
        say: Callable[[str], None] = lambda line: None,
        *,
        cases: Mapping[str, SessionPlan] | None = None,
    ) -> None:
        self._say = say
        pruner_class(plan.space).check_settings(plan.space)
        self._texts = load_parts(plan.calibration, plan.search, plan.test, say)
        texts, parts = plan.space.texts, (plan.calibration, plan.search, plan.test)
        contrast, self._contrast = plan.contrast, None
        if contrast is not None and texts:  # windows of both are chosen by candidates
            texts = {**texts, CONTRAST: contrast}
        elif contrast is not None:
            self._contrast = load_contrast(contrast, *parts, say)
        self.sources: Mapping[str, Text] = load_sources(texts, *parts, say) if texts else {}
        say(f"loading {plan.model}")
        embedded = plan.model in EMBEDDED
        self.loaded: LoadedModel = open_model(
            plan.model if embedded else located(plan.model, plan.folders),
            stream=plan.stream,
            dtype=plan.dtype,
            device=plan.device,
            trust_remote_code=plan.trust_remote_code,
            check=partial(pruner_class(plan.space).check_config, plan.space),
            check_streamed=partial(check_streamed, plan),
            say=say,
        )
        for length in (plan.window, *plan.space.window_lengths):
            check_windows(self.loaded.model, length, allow_long=plan.allow_long_windows)
        if plan.compiled:
            check_compiled(plan, self.loaded)
        self.anatomy: Anatomy = replace(
            self.loaded.dissect(bos_token(self.loaded.tokenizer, plan.bos)), all_experts=plan.moe_all_experts
        )
        self.prunables: list[Prunable] = prunables(self.anatomy)
        settled = pruner_class(plan.space).settled(plan.space, self.anatomy)
        plan = plan if settled is plan.space else replace(plan, space=settled)
        self.plan = plan
        self._cases = cases_of(plan) if cases is None else cases
        plans = {name: case for name, case in self._cases.items() if case.model == plan.model}
        for case in plans.values():
            pruner_class(case.space).check_model(case.space, self.anatomy)
        main = self._case(plan)
        self.dense = main.dense
        self.space: Any = main.space
        self.cases: dict[str, Case] = {
            name: main if name == MAIN or case is plan else self._case(case) for name, case in plans.items()
        }
        self.windows: dict[Part, Int[Tensor, "windows length"]] = {
            "search": self._cut("search", plan.fidelities[-2].n_tokens),
            "test": self._cut("test", plan.fidelities[-1].n_tokens),
        }
        self.damaged: Damaged | None = None
        self._of_curvature: Int[Tensor, "windows length"] | None = None
        if plan.curvature is not None:
            self.windows |= {"gradient": self._set_aside()}
            self._of_curvature = self._curvature_tokens(plan.curvature)
        self.pruner = main.pruner()
        self.pruner.check_calibration()

    def _case(self, plan: SessionPlan) -> Case:
        settings, pruner = plan.space, pruner_class(plan.space)
        dense = DenseModel.of(
            self.loaded,
            self.anatomy,
            plan.window,
            blocks=pruner.is_smaller(settings),
            latency=self.latency_table,
            held=pruner.held_of(settings, self.anatomy),
        )
        space = SPACES[settings.kind].build(settings, self.prunables, dense.shape)
        return Case(plan, space, dense, self._calibration)

    @cached_property
    def _calibration(self) -> Calibration:
        of, tokenizer = self.plan, self.loaded.tokenizer
        n_tokens = of.space.n_text_tokens
        return Calibration(
            self._cut("calibration", of.calibration_tokens),
            of.calibration,
            {
                name: Source(tokenize(tokenizer, text.text, n_tokens), text.sha256, text.source)
                for name, text in self.sources.items()
            },
            of.moe_all_experts,
            self._contrasted,
        )

    @property
    def _contrasted(self) -> Int[Tensor, "windows length"] | None:
        """Windows of the second calibration text: as many tokens as the first has, or all."""
        if self._contrast is None:
            return None
        of, text, bos = self.plan, self._contrast, self.anatomy.bos
        n_tokens, tokenizer = of.calibration_tokens, self.loaded.tokenizer
        return windows(
            tokenizer, text, of.window, n_tokens, "random", of.seed, bos, at_most=True, say=self._say
        )

    @cached_property
    def others(self) -> tuple[Session, ...]:
        """Sessions of the cases' other models.

        Raises:
            ValueError: as for this one.
        """
        by_model: dict[str, dict[str, SessionPlan]] = {}
        for name, case in self._cases.items():
            if case.model != self.plan.model:
                by_model.setdefault(case.model, {})[name] = case
        return tuple(Session(next(iter(x.values())), self._say, cases=x) for x in by_model.values())

    def beside(self, directory: Path) -> Path:
        """Directory of a session for one of the other models, beside that of the first."""
        return directory.with_name(f"{directory.name}-{self.loaded.fingerprint[:12]}")

    @cached_property
    def latency_table(self) -> LatencyTable | None:
        """The latency table, if the plan asks for latencies."""
        source = self.plan.latency
        return None if source is None else find_table(self.anatomy, source, self.plan.model)

    @cached_property
    def task_set(self) -> TaskSet | None:
        """The tasks of the plan over the live model, if it has some.

        Raises:
            ValueError: if they can't be loaded.
        """
        tasks = self.plan.tasks
        return (
            None if tasks is None else TaskSet(tasks, self.loaded.model, self.loaded.tokenizer, self.plan.bos)
        )

    def _cut(self, part: TextPart, n_tokens: int) -> Int[Tensor, "windows length"]:
        order: Order = "sequential" if part == "test" else "random"
        return self._windows(part, n_tokens, order)

    def _windows(
        self, part: TextPart, n_tokens: int | None, order: Order, *, at_most: bool = False
    ) -> Int[Tensor, "windows length"]:
        of, text, bos = self.plan, self._texts[part], self.anatomy.bos
        tokenizer, say = self.loaded.tokenizer, self._say
        return windows(tokenizer, text, of.window, n_tokens, order, of.seed, bos, at_most=at_most, say=say)

    def _set_aside(self) -> Int[Tensor, "windows length"]:
        """Windows of the search part for gradients: `GRADIENT_TOKENS`, or as many as losses are not measured on."""
        n_used, window = self.plan.fidelities[-2].n_tokens, self.plan.window
        most = n_used + max(1, GRADIENT_TOKENS // window) * window
        rest = self._windows("search", most, "random", at_most=True)[n_used // window :]
        if not len(rest):
            raise ValueError(
                f"Expected a search text of more than the {n_used:,} tokens of the largest fidelity, for gradients on "
                f"windows of their own, got {self._texts['search'].source}. Give a longer text, lower "
                "`evaluator.fidelities`, or name `controller: {kind: evolution}`, which takes no gradients."
            )
        return rest

    def _curvature_tokens(self, fidelity: Fidelity) -> Int[Tensor, "windows length"]:
        """The first windows of the calibration set."""
        tokens = self._calibration.tokens
        n_windows, rest = divmod(fidelity.n_tokens, self.plan.window)
        if rest or not 0 < n_windows <= len(tokens):
            raise ValueError(
                f"Expected the curvature from whole windows of {self.plan.window} tokens, at most "
                f"{tokens.numel()} tokens (`evaluator.calibration_tokens`), got {fidelity.n_tokens}."
            )
        return tokens[:n_windows]

    def training_windows(self) -> Int[Tensor, "windows length"]:
        """Training data: all windows of the calibration part, in the order of the seed."""
        return self._windows("calibration", None, "random")

    def config(self, candidate: str) -> Config:
        """Plain configuration of a candidate's canonical text; a ValueError if it is none."""
        config: Config = self.space.config(self.space.parse(candidate))
        return config

    def starved_experts(self) -> dict[str, int]:
        """The experts that get too few tokens of the calibration set, see `routing.starved_experts`."""
        return starved_experts(self.anatomy, self._calibration.tokens)

    def facts(self) -> dict[str, str]:
        """Content hashes that measurements depend on."""
        hashes = {f"{part}_text": text.sha256 for part, text in self._texts.items()}
        hashes |= {f"text of {name}": text.sha256 for name, text in self.sources.items()}
        if self._contrast is not None:
            hashes["contrast_text"] = self._contrast.sha256
        for name, path in self.plan.space.files.items():
            hashes[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        if self.latency_table is not None:
            hashes["latency_table"] = table_sha256(self.latency_table)
        if self.plan.tasks is not None:
            hashes["tasks"] = tasks_sha256(self.plan.tasks)
        if self.anatomy.bos is not None:  # absent in studies from before windows could begin with one
            hashes["bos"] = str(self.anatomy.bos)
        return {"model": self.loaded.fingerprint, "calibration_tokens": self._calibration.sha256, **hashes}

    def facts_of_others(self) -> dict[str, str]:
        """Content hashes of the other models, whose texts are the same.

        Raises:
            ValueError: if one of them does not fit the plan.
        """
        own = ("model", "calibration_tokens")
        return {f"{x.plan.model}: {name}": x.facts()[name] for x in self.others for name in own}

    def build_levels(self, directory: Path, on_block: Callable[[int], None] = lambda index: None) -> None:
        """Write the data shared by all candidates, such as the level store, unless it is there.

        The space has further baselines afterwards, if some need that data.
        """
        self.pruner.prepare(directory, on_block)
        if self._of_curvature is not None:
            self.pruner.open(directory)
            build_curvature(self.pruner, directory, self._of_curvature, on_block)
        further = self.pruner.baselines(directory)
        if further:
            self.space = self.space.with_baselines(further)
        for other in self.others:
            other.build_levels(other.beside(directory), on_block)

    def open_damaged(self, directory: Path, levels: Path | None = None) -> None:
        """Set the damaged positions, if the plan measures ``weighted_kl``: those of a run, which it keeps.

        Args:
            directory: of the run.
            levels: written by `build_levels`, to find the positions if the run has none of these windows yet, of the
                cases' other models, too; None: those of this model must be there.

        Raises:
            ValueError: if they must be there and are not, or can't be read, or the reference has no weights.
        """
        if "weighted_kl" not in self.plan.measures:
            return
        path = directory / f"damaged-{self.loaded.fingerprint[:12]}.safetensors"
        windows: dict[Part, Tensor] = {part: x for part, x in self.windows.items() if part != "gradient"}
        self.damaged, reference = read_damaged(path, windows)
        if self.damaged is None and levels is None:
            raise ValueError(
                f"Expected the positions of `weighted_kl` for these windows in {path}, got none. Continue the search, "
                f"which finds them again."
            )
        if self.damaged is None and levels is not None:
            pruner = next(iter(self.cases.values())).pruner()
            pruner.open(levels)
            reference = reference or reference_of(self.space)
            self.damaged = find_damaged(pruner, windows, reference, path, self._say)
        if levels is not None:
            for other in self.others:
                other.open_damaged(directory, other.beside(levels))

    def data(self) -> EvaluationData:
        """The search and test windows in batches, see `EvaluationData.of`."""
        return EvaluationData(self.anatomy, self.windows, self.plan.fidelities, **self.measured)

    @property
    def measured(self) -> dict[str, Any]:
        """Keyword arguments of `EvaluationData` for measures besides KL and cross-entropy."""
        return {
            "acceptance": "acceptance" in self.plan.measures,
            "damaged": self.damaged,
            "compiled": self.plan.compiled,
        }

    def evaluator(self, directory: Path) -> Evaluator:
        """An evaluator over the directory that `build_levels` wrote."""
        return in_general(self.evaluators(directory), self.space)

    def evaluators(self, directory: Path) -> dict[str, Evaluator]:
        """The evaluator of each case by its name, over the directory that `build_levels` wrote."""
        data, tasks = self.data(), self.task_set
        windows = self.training_windows() if self.plan.training is not None else None
        found = {name: case.evaluator(data, directory, windows, tasks) for name, case in self.cases.items()}
        for other in self.others:
            found |= other.evaluators(other.beside(directory))
        return found


def check_streamed(plan: SessionPlan, mapped: MappedModel) -> None:
    """Raise a NotStreamedError for a plan that needs more converted weights at a time than those of a block."""
    what = needs_whole(plan) if mapped.converts else None
    if what is not None:
        raise NotStreamedError(
            f"Expected `dtype` as the weights are stored, or a search that works block by block, got {what}."
        )


def check_compiled(plan: SessionPlan, loaded: LoadedModel) -> None:
    """Raise a ValueError for a plan whose blocks can't be compiled once for all candidates."""
    reasons = {
        f"candidates of the space {plan.space.kind}, whose blocks differ in shape": pruner_class(
            plan.space
        ).is_smaller(plan.space),
        "a streamed model, whose weights are converted while they are used": isinstance(loaded, MappedModel)
        and loaded.converts,
        "blocks on several devices (`device: spread`)": plan.device == SPREAD,
    }
    reason = next((what for what, is_so in reasons.items() if is_so), None)
    if reason is not None:
        raise ValueError(f"Expected `compile: never`, got always with {reason}.")
    check_compiler(next(loaded.model.parameters()).device)


def needs_whole(plan: SessionPlan) -> str | None:
    """Part of a plan that needs all weights at a time in the dtype that they compute in; None: there is none."""
    needs: dict[str, bool] = {
        f"the space {plan.space.kind} with these methods": not pruner_class(plan.space).by_blocks(plan.space),
        "further cases (`space.also`)": bool(plan.space.cases),
        "light training (`evaluator.training`)": plan.training is not None,
        "a controller that begins with gradients, such as trust_region": plan.curvature is not None,
    }
    return next((what for what, needed in needs.items() if needed), None)


def set_threads(threads: int | None) -> None:
    """Set the number of torch's threads; None: its default."""
    if threads is not None:
        torch.set_num_threads(threads)
