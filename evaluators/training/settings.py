"""Settings of a light training and its learning rates: plain values, sent to workers and kept beside the model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, Literal

Method = Literal["full", "norms", "lora", "spp", "scale_lora", "perp", "slope", "last", "merged"]
Loss = Literal["kl", "ce", "reconstruct"]
Schedule = Literal["cosine", "constant"]
Data = Literal["all", "paser"]

LEARNING_RATES: Mapping[Method, float] = MappingProxyType(
    {
        "full": 3e-4,
        "norms": 3e-3,
        "lora": 2e-3,
        "slope": 3e-4,
        "spp": 4e-3,
        "scale_lora": 5e-4,
        "perp": 5e-4,
        "last": 1e-5,
        "merged": 2e-4,
    }
)
"""Defaults of `Training.lr`: of the first four ours, the larger the fewer parameters are trained; else published."""

RANKED: tuple[Method, ...] = ("lora", "spp", "scale_lora", "perp", "slope")
"""Methods with updates of a rank."""


def cosine(step: int, n_steps: int, warmup: float) -> float:
    """Learning rate as a fraction of the largest: a linear rise, then a cosine towards 0.

    No step has the rate 0: the rise begins above it, and the cosine would reach it one step after the last.

    Args:
        step: from 0.
        n_steps: of the whole run.
        warmup: fraction of the steps in which it rises.
    """
    n_rising = round(warmup * n_steps)
    if step < n_rising:
        return (step + 1) / (n_rising + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - n_rising) / (n_steps - n_rising)))


def constant(step: int, n_steps: int, warmup: float) -> float:
    """1 in every step: no step depends on the length of the run, so that any run can be continued."""
    return 1.0


SCHEDULES: Mapping[Schedule, Callable[[int, int, float], float]] = MappingProxyType(
    {"cosine": cosine, "constant": constant}
)


@dataclass(frozen=True)
class Training:
    """A short training run of AdamW.

    Args:
        method: trained parameters. ``full``: all of them; ``norms``: gains and biases of the norms; ``lora``: low-rank
            updates of the projections (https://arxiv.org/abs/2106.09685), see `lora`; ``spp``: `SparsityPreserving`;
            ``scale_lora``: `ScaledUpdate`; ``perp``: biases, norms and `MaskedUpdate`; ``slope``: all of them, see
            `LazyAdapter`; ``last``: the last three blocks, the final norm and the head; ``merged``: the blocks beside
            dropped ones, see `merge_targets.blocks_beside_dropped`. Zeros stay zeros in all.
        loss: ``kl``, distillation from the dense model (https://arxiv.org/abs/1503.02531, at temperature 1), ``ce``,
            the cross-entropy of the next token, or ``reconstruct``, block after block, see `reconstruct.block_loss`.
        tokens: trained on, repetitions counted; whole batches.
        batch: windows a step.
        lr: largest learning rate; None for that of the method in `LEARNING_RATES`.
        rank: of updates, for those of `RANKED`; their scale is 2.
        warmup: fraction of the steps in which the learning rate rises, for the schedule ``cosine``.
        weight_decay: decoupled (https://arxiv.org/abs/1711.05101).
        clip: largest norm of a gradient.
        seed: order of the windows, and the first values of ``lora``.
        schedule: of the learning rate, a name in `SCHEDULES`.
        data: windows to train on: ``all`` that are given, or a choice of them, see `paser.choose_windows`.
        share: of the windows, that ``paser`` chooses at most.

    Raises:
        ValueError: on a value that is out of its range.
    """

    method: Method = "lora"
    loss: Loss = "kl"
    tokens: int = 65536
    batch: int = 4
    lr: float | None = None
    rank: int = 16
    warmup: float = 0.05
    weight_decay: float = 0.0
    clip: float = 1.0
    seed: int = 0
    schedule: Schedule = "cosine"
    data: Data = "all"
    share: float = 0.2

    def __post_init__(self) -> None:
        for name in ("tokens", "batch", "rank", "clip"):
            if getattr(self, name) <= 0:
                raise ValueError(f"Expected `{name}` > 0, got {getattr(self, name)}.")
        if self.method == "merged" and self.loss == "reconstruct":
            raise ValueError(
                "Expected the loss kl or ce with the method merged, got reconstruct: a block that stands for several "
                "has no counterpart in the dense model. Choose another loss."
            )
        if self.lr is not None and not (self.lr > 0 and math.isfinite(self.lr)):
            raise ValueError(f"Expected `lr` > 0, got {self.lr}.")
        if not 0 < self.share <= 1:
            raise ValueError(f"Expected `share` within (0, 1], got {self.share}.")
        if not 0 <= self.warmup < 1 or self.weight_decay < 0:
            raise ValueError(
                f"Expected `warmup` in [0, 1) and `weight_decay` >= 0, got {self.warmup} and {self.weight_decay}."
            )

    @property
    def learning_rate(self) -> float:
        """The largest learning rate."""
        return LEARNING_RATES[self.method] if self.lr is None else self.lr

    def n_steps(self, window: int) -> int:
        """Number of steps of `batch` windows of `window` tokens.

        Raises:
            ValueError: if `tokens` are no whole number of them.
        """
        steps, rest = divmod(self.tokens, self.batch * window)
        if rest:
            near = max(1, round(self.tokens / (self.batch * window))) * self.batch * window
            raise ValueError(
                f"Expected `tokens` in whole batches of {self.batch} windows of {window} tokens, got {self.tokens}. "
                f"Use {near}."
            )
        return steps

    def to_json(self) -> dict[str, Any]:
        """Plain values, with the learning rate that is used; equal ones mean the same training."""
        rank = self.rank if self.method in RANKED else None
        plain = asdict(self) | {"lr": self.learning_rate, "rank": rank}
        if self.schedule == "cosine":
            del plain["schedule"]  # as in records that were made before there was another one
        if self.data == "all":  # likewise
            del plain["data"], plain["share"]
        return plain

    @property
    def text(self) -> str:
        """Canonical text."""
        return json.dumps(self.to_json(), sort_keys=True)
