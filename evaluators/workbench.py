"""Everything that a worker holds, made once from a small plain description that can travel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from secateur.evaluators.blockwise import BlockwiseEvaluator
from secateur.evaluators.data import EvaluationData
from secateur.evaluators.rigs import RIGS, Rig
from secateur.evaluators.text import Part as TextPart
from secateur.evaluators.text import load_parts
from secateur.evaluators.tokens import Order, tokens_sha256, windows
from secateur.pruners.families.anatomy import Anatomy
from secateur.pruners.families.discover import dissect
from secateur.pruners.families.shape import describe
from secateur.pruners.loading import LoadedModel, load_model
from secateur.pruners.prune import prune
from secateur.spaces.cost import ModelShape
from secateur.spaces.measurement import Fidelity, Part
from secateur.spaces.registry import SPACES
from secateur.spaces.units import Prunable


@dataclass(frozen=True)
class Plan:
    """What a worker needs to know to set itself up; plain values only.

    Args:
        model, dtype, device, trust_remote_code: see `load_model`.
        space: settings of the space.
        loss: which loss is minimised.
        calibration, search, test: sources of text.
        window: tokens a window.
        calibration_tokens: size of the calibration set.
        search_fidelities: tokens, ascending.
        test_tokens: size of the test set.
        seed: which windows are drawn, and the noise of the random metric.
    """

    model: str
    dtype: str
    device: str
    trust_remote_code: bool
    space: Any
    loss: Literal["kl", "ce"]
    calibration: str
    search: str
    test: str
    window: int
    calibration_tokens: int
    search_fidelities: tuple[int, ...]
    test_tokens: int
    seed: int

    @property
    def rig(self) -> Rig:
        """How candidates of the space turn into weights."""
        return RIGS[self.space.kind]

    @property
    def fidelities(self) -> tuple[Fidelity, ...]:
        """All fidelities that may be asked for: the search's, ascending, then the test's."""
        search = tuple(Fidelity("search", n_tokens) for n_tokens in self.search_fidelities)
        return (*search, Fidelity("test", self.test_tokens))


class Workbench:
    """The dense model, its space and its data.

    Args:
        plan: what to set up.
        say: told in one line what is being done.

    Raises:
        ValueError: on anything in the plan that does not fit (model, family, metric, texts, target).
    """

    def __init__(self, plan: Plan, say: Callable[[str], None] = lambda line: None) -> None:
        self.plan = plan
        plan.rig.method(plan, {"metric": ""})  # refuses an unknown one before anything is loaded
        self._texts = load_parts(plan.calibration, plan.search, plan.test)
        say(f"loading {plan.model}")
        self.loaded: LoadedModel = load_model(
            plan.model, dtype=plan.dtype, device=plan.device, trust_remote_code=plan.trust_remote_code
        )
        self.anatomy: Anatomy = dissect(self.loaded.model)
        self.shape = describe(self.anatomy)
        self._check_groups()
        self.space: Any = SPACES[plan.space.kind].build(plan.space, self.prunables, self.space_shape)
        self.calibration = self._cut("calibration", plan.calibration_tokens)
        self.windows: Mapping[Part, Int[Tensor, "windows length"]] = {
            "search": self._cut("search", plan.search_fidelities[-1]),
            "test": self._cut("test", plan.test_tokens),
        }

    @property
    def prunables(self) -> list[Prunable]:
        """The prunable projections as spaces know them."""
        return [Prunable(x.name, x.block, x.sublayer, x.n_weights) for x in self.shape.linears]

    @property
    def space_shape(self) -> ModelShape:
        """The dense model's size as spaces know it: bytes as it is stored, MACs at a context of one window."""
        stored = self.loaded.stored_dtype.itemsize
        return ModelShape(
            n_params=self.shape.n_params,
            bytes_per_param=stored,
            macs_per_token=self.shape.macs_per_token(self.plan.window),
            kv_bytes_per_token=self.shape.kv_bytes_per_token * stored // self.shape.bytes_per_param,
        )

    def _check_groups(self) -> None:
        size = self.plan.space.group_size
        for linear in self.shape.linears:
            if size is not None and linear.in_features % size:
                raise ValueError(
                    f"Expected `space.group_size` to divide the number of inputs, got {size} for "
                    f"{linear.in_features} inputs at {linear.name}. Choose another, or protect this layer."
                )

    def _cut(self, part: TextPart, n_tokens: int) -> Int[Tensor, "windows length"]:
        order: Order = "sequential" if part == "test" else "random"
        return windows(
            self.loaded.tokenizer, self._texts[part], self.plan.window, n_tokens, order, self.plan.seed
        )

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
        return {"model": self.loaded.fingerprint, "calibration_tokens": self.calibration_sha256, **hashes}

    def build_levels(self, directory: Path, on_block: Callable[[int], None] = lambda index: None) -> None:
        """Make what candidates are switched by, such as the level store, unless it is there."""
        self.plan.rig.build(self, directory, on_block)

    def data(self) -> EvaluationData:
        """The search and test windows in batches; what is asked for first is prepared with the weights of then."""
        return EvaluationData(self.anatomy, self.windows, self.plan.fidelities)

    def evaluator(self, directory: Path, worker: str = "local") -> BlockwiseEvaluator:
        """An evaluator over what `build_levels` made in the directory."""
        return BlockwiseEvaluator(
            self.anatomy,
            self.space,
            self.plan.rig.switcher(self.plan, self.space, self.anatomy, directory),
            self.data(),
            loss=self.plan.loss,
            seed=self.plan.seed,
            worker=worker,
        )

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
        method = self.plan.rig.method(self.plan, config)
        prune(
            self.anatomy,
            config["sparsity"],
            method,
            self.calibration,
            sequential=sequential,
            on_block=on_block,
        )


def set_threads(threads: int | None) -> None:
    """Threads that torch computes with; None leaves its choice."""
    if threads is not None:
        torch.set_num_threads(threads)
