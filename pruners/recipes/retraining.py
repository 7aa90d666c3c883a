"""Light training of a recipe's schedule: in rounds, within the masks, saved after each and continued after a kill."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from secateur.pruners.calibration.choose import choose, most_samples
from secateur.pruners.calibration.tokens import tokens_sha256
from secateur.pruners.learned.masked_weights import replaced_weights
from secateur.pruners.learned.training import MaskTrainer, warmed_cosine_rate
from secateur.pruners.learned.training_size import TrainingSize
from secateur.pruners.models.anatomy import Anatomy, Linear
from secateur.pruners.models.losses import ce_loss, head_inputs, kl_loss
from secateur.pruners.models.memory import check_memory
from secateur.pruners.models.runner import in_fp32
from secateur.pruners.recipes.context import RecipeContext, Sample
from secateur.pruners.recipes.plan import key_of
from secateur.pruners.recipes.schedule import using
from secateur.pruners.stores.saved_state import SavedState
from secateur.spaces.recipe.schedule import BATCH, n_steps, shares_of, trained_tokens

WARMUP, LOWEST = 0.05, 0.1
"""Share of a phase's steps in which the learning rate rises, and its share of the largest at the end."""

WHAT = "the `schedule` of a recipe"
_DONE, _WEIGHT = "done", "weight "

Masks = Mapping[str, Bool[Tensor, "..."]]
"""True = keep, broadcast to the weight, by the projection's full name."""


class Retraining:
    """Weights of a recipe in rounds: projections alone are trained, embeddings, norms, biases and the head are not.

    Each phase of training (before the first round, one a round, and after the last) is a run of AdamW without decay
    in float32, whose rate rises and falls along a cosine, over windows of the recipe's calibration sources: those that
    it calibrates on come first, then the further ones of its pools, in turn.

    Args:
        context: of the recipe; the live model is dense now.
        sample: its calibration windows.
        config: its complete plain form.

    Attributes:
        weights: of the live model after the rounds so far, by full name, in dense shapes; those that differ from the
            dense ones.
        done: number of finished rounds.
        facts: what the last finished round chose, as its unit saved it.
    """

    def __init__(self, context: RecipeContext, sample: Sample, config: Mapping[str, Any]) -> None:
        self.context, self.sample = context, sample
        of = self._of = {"loss": "ce", "lr": 3e-4, "penalty": 0, **config["schedule"]}
        self._length = config["calibration"]["length"]
        self._steps = {x: n_steps(of.get(x, 0), self._length) for x in ("before", "retrain", "after")}
        self._shares = shares_of(config)
        self.trains = any(self._steps.values())
        self._tokens = sample.tokens
        if self.trains:
            self._tokens = _windows(context, config["calibration"], BATCH * self._n_steps)
        self.name = key_of(
            json.dumps(config, sort_keys=True),
            sample.sha256,
            sorted(context.protected),
            context.seed,
            context.dampening,
            tokens_sha256(self._tokens),
        )
        self.weights: dict[str, Tensor] = {}
        self.done, self.facts = 0, dict[str, Tensor]()
        self._targets: dict[int, Tensor] = {}
        self._training: SavedState | None = None
        self._restore()

    @property
    def _n_steps(self) -> int:
        """Steps of all phases."""
        return self._steps["before"] + len(self._shares) * self._steps["retrain"] + self._steps["after"]

    @property
    def left(self) -> list[float]:
        """Shares that the rounds reach which are not finished."""
        return self._shares[self.done :]

    @property
    def penalty(self) -> float:
        """Factor of the squares of what was chosen to go, which is trained before it goes; 0: it goes first."""
        return float(self._of["penalty"])

    @contextmanager
    def live(self) -> Iterator[None]:
        """Context in which the live model has the weights after the rounds so far."""
        with using(self.context.anatomy.linears, self.weights):
            yield

    def seen(self, sample: Sample) -> Sample:
        """A sample with statistics of the live model after the rounds so far."""
        if not self.weights and not self.done:
            return sample
        return self.context.changed_sample(sample, f"{self.name} {self.done}")

    def begin(self, linears: Iterable[Linear]) -> None:
        """Train before the first round, unless that is over; the live model is dense."""
        if self._of["loss"] == "kl" and self.trains and not self._over:
            self._look_at_dense()
        if self.done == 0 and not self.weights and self._steps["before"]:
            self.weights |= self._train("before", 0, linears, {})
            self._save()

    def train(self, linears: Iterable[Linear], masks: Masks, going: Masks | None = None) -> None:
        """Train in a round; within `live`, and with the masks in the live weights.

        Args:
            linears: to train.
            masks: of the weights that are there.
            going: of those that stay after the round, for a penalty on the others.
        """
        first = self._steps["before"] + self.done * self._steps["retrain"]
        self.weights |= self._train("retrain", first, linears, masks, going or {})

    def finish(self, linears: Iterable[Linear], masks: Masks) -> None:
        """Train after the last round, unless that is over; within `live`."""
        if not self._over:
            first = self._n_steps - self._steps["after"]
            self.weights |= self._train("after", first, linears, masks)
            self.end_round(self.facts)

    @property
    def _over(self) -> bool:
        return self.done == len(self._shares) + (self._steps["after"] > 0)

    def end_round(self, facts: Mapping[str, Tensor]) -> None:
        """Save the weights, with what was chosen, as a finished round."""
        self.done, self.facts = self.done + 1, dict(facts)
        self._save()

    def _state(self, name: str) -> SavedState:
        return self.sample.statistics.state(f"schedule-{self.name}{name}")

    def _save(self) -> None:
        tensors = {f"{_WEIGHT}{name}": weight.contiguous() for name, weight in self.weights.items()}
        self._state("").save({_DONE: torch.tensor(self.done), **self.facts, **tensors})
        if self._training is not None:
            self._training.clear()

    def _restore(self) -> None:
        saved = self._state("").load()
        if not saved:
            return
        self.done = int(saved.pop(_DONE))
        device = self.context.anatomy.embedding.weight.device
        for name, tensor in saved.items():
            if name.startswith(_WEIGHT):
                self.weights[name.removeprefix(_WEIGHT)] = tensor.to(device)
            else:
                self.facts[name] = tensor

    def _train(
        self, phase: str, first: int, linears: Iterable[Linear], masks: Masks, going: Masks | None = None
    ) -> dict[str, Tensor]:
        """Weights after a phase; `first`: its first step among those of all phases."""
        anatomy, n = self.context.anatomy, self._steps[phase]
        free = [x for x in linears if x.name not in self.context.protected]
        if not n or not free:
            return {}
        _check_memory(anatomy, free, self._length, teacher=self._of["loss"] == "kl")
        dtypes = {x.name: x.weight.dtype for x in free}
        self._training = self._state(f"-{phase}-{self.done}")
        with in_fp32(anatomy.model):
            trained = {x.name: x.weight.detach().float().clone().requires_grad_() for x in free}
            functions = {name: _within(weight, masks.get(name)) for name, weight in trained.items()}

            def loss(step: int) -> Float[Tensor, ""]:
                with replaced_weights(free, functions):
                    found = self._loss(first + step)
                for name, stays in (going or {}).items():
                    if name in trained:
                        found = found + self.penalty * (functions[name]() * ~stays).square().sum()
                return found

            MaskTrainer(
                trained,
                torch.optim.AdamW(trained.values(), lr=float(self._of["lr"]), weight_decay=0.0),
                loss,
                n,
                what=WHAT,
                rate=lambda step: warmed_cosine_rate(step, n, WARMUP, LOWEST),
                clip=1.0,
                state=self._training,
            ).run()
            return {name: functions[name]().detach().to(dtypes[name]) for name in trained}

    def _loss(self, step: int) -> Float[Tensor, ""]:
        rows = self._rows(step)
        tokens = self._tokens[rows]
        if self._of["loss"] == "ce":
            return ce_loss(self.context.anatomy, tokens)
        device = self.context.anatomy.embedding.weight.device
        states = torch.stack([self._targets[row] for row in rows]).to(device)
        return kl_loss(self.context.anatomy, tokens, self.context.anatomy, states)

    def _rows(self, step: int) -> list[int]:
        return [(step * BATCH + place) % len(self._tokens) for place in range(BATCH)]

    @torch.no_grad()
    def _look_at_dense(self) -> None:
        """Keep the dense model's states before the head, from which the teacher's logits follow."""
        anatomy = self.context.anatomy
        n_bytes = self._tokens.numel() * anatomy.width * 4
        check_memory(n_bytes, torch.device("cpu"), f"the teacher's states of {WHAT}", "Say `loss: ce`.")
        with in_fp32(anatomy.model):
            for row, window in enumerate(self._tokens):
                self._targets[row] = head_inputs(anatomy, window[None])[0].cpu()


def _within(weight: Tensor, mask: Tensor | None) -> Callable[[], Tensor]:
    return (lambda: weight * 1) if mask is None else lambda: weight * mask


def _windows(context: RecipeContext, calibration: Mapping[str, Any], n: int) -> Int[Tensor, "windows length"]:
    """At most so many windows: those of the calibration first."""
    n = max(n, calibration["samples"])
    found = most_samples(context.pools, calibration, n, context.seed)
    return choose(context.pools, {**calibration, "samples": found}, context.seed, context.anatomy.bos)


def schedule_size(anatomy: Anatomy, config: Mapping[str, Any]) -> TrainingSize:
    """Size of the training of a recipe's schedule: all phases, and all projections.

    Args:
        anatomy: of the model.
        config: complete plain form of the recipe.
    """
    length, tokens = int(config["calibration"]["length"]), trained_tokens(config)
    teacher = config["schedule"].get("loss", "ce") == "kl"
    size = _size(anatomy, list(anatomy.linears), length, teacher=teacher)
    states = tokens * anatomy.width if teacher else 0  # the teacher's
    return replace(size, n_steps=tokens // (BATCH * length), n_values=size.n_values + states)


def check_training(anatomy: Anatomy, length: int) -> None:
    """Raise a ValueError on too little memory for windows of so many tokens."""
    _check_memory(anatomy, list(anatomy.linears), length)


def _size(anatomy: Anatomy, linears: Sequence[Linear], length: int, *, teacher: bool = False) -> TrainingSize:
    """Size of a step of training these projections, in windows of so many tokens."""
    return TrainingSize(1, BATCH, length, 5 * sum(x.n_weights for x in linears), teacher=teacher)


def _check_memory(anatomy: Anatomy, linears: Sequence[Linear], length: int, *, teacher: bool = False) -> None:
    size = _size(anatomy, linears, length, teacher=teacher)
    size.check(anatomy, f"the training of {WHAT}", "Use shorter windows, or a schedule without training.")
