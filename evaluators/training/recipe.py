"""How a pruned model is trained: plain values that travel and that are kept beside the model."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, Literal

from secateur.evaluators.training.schedule import Schedule

Method = Literal["full", "norms", "lora"]
Loss = Literal["kl", "ce"]

LEARNING_RATES: Mapping[Method, float] = MappingProxyType({"full": 3e-4, "norms": 3e-3, "lora": 2e-3})
"""Used where a recipe names none; the fewer parameters learn, the larger."""


@dataclass(frozen=True)
class Recipe:
    """A short training run of AdamW.

    Args:
        method: what learns. ``full``: every parameter; ``norms``: gains and biases of the norms; ``lora``: low-rank
            updates of the projections (https://arxiv.org/abs/2106.09685), see `lora`. Zeros stay zeros in all.
        loss: ``kl``, distillation from the dense model (https://arxiv.org/abs/1503.02531, at temperature 1), or
            ``ce``, the cross-entropy of the next token.
        tokens: trained on, repetitions counted; whole batches.
        batch: windows a step.
        lr: largest learning rate; None for that of the method in `LEARNING_RATES`.
        rank: of the updates of ``lora``; their scale is 2.
        warmup: fraction of the steps in which the learning rate rises, for the schedule ``cosine``.
        weight_decay: decoupled (https://arxiv.org/abs/1711.05101).
        clip: largest norm of a gradient.
        seed: order of the windows, and the first values of ``lora``.
        schedule: of the learning rate, see `schedule`.

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

    def __post_init__(self) -> None:
        for name in ("tokens", "batch", "rank", "clip"):
            if getattr(self, name) <= 0:
                raise ValueError(f"Expected `{name}` > 0, got {getattr(self, name)}.")
        if self.lr is not None and not (self.lr > 0 and math.isfinite(self.lr)):
            raise ValueError(f"Expected `lr` > 0, got {self.lr}.")
        if not 0 <= self.warmup < 1 or self.weight_decay < 0:
            raise ValueError(
                f"Expected `warmup` in [0, 1) and `weight_decay` >= 0, got {self.warmup} and {self.weight_decay}."
            )

    @property
    def learning_rate(self) -> float:
        """The largest learning rate."""
        return LEARNING_RATES[self.method] if self.lr is None else self.lr

    def n_steps(self, window: int) -> int:
        """Steps of `batch` windows of so many tokens.

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
        plain = asdict(self) | {
            "lr": self.learning_rate,
            "rank": self.rank if self.method == "lora" else None,
        }
        if self.schedule == "cosine":
            del plain["schedule"]  # as in records that were made before there was another one
        return plain

    @property
    def text(self) -> str:
        """Canonical text."""
        return json.dumps(self.to_json(), sort_keys=True)
