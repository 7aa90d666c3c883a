"""Training of a pruned model, step by step, to be stopped and continued at any step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from secateur.evaluators.training.batches import Batches
from secateur.evaluators.training.learners import let_learn
from secateur.evaluators.training.losses import ce_loss, head_inputs, kl_loss
from secateur.evaluators.training.recipe import Recipe
from secateur.evaluators.training.schedule import SCHEDULES
from secateur.evaluators.training.zeros import Zeros
from secateur.pruners.models.anatomy import Anatomy


class Trainer:
    """Trains the live model; its zeros stay zeros.

    Weights and optimizer are in float32 whatever the model's precision; on a GPU a model in half precision computes
    in bfloat16. A step is a function of recipe, windows and the state before it: on a CPU a run that
    was stopped and continued gives the weights of an unbroken one, bit by bit.

    Args:
        anatomy: the pruned model, in evaluation mode (nothing is dropped out); in float32 from now on.
        recipe: how.
        windows: token ids to train on.
        teacher: the dense model with weights of its own; needed for the loss ``kl``.
        seen: what the teacher makes of each step's windows, kept here for other trainings by the same recipe on the
            same windows; None: computed in each step.

    Raises:
        ValueError: if the recipe's tokens are no whole number of batches, or the teacher is missing.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        recipe: Recipe,
        windows: Int[Tensor, "windows length"],
        teacher: Anatomy | None = None,
        seen: dict[int, Tensor] | None = None,
    ) -> None:
        if recipe.loss == "kl" and teacher is None:
            raise ValueError("Expected the dense model as `teacher` for the loss kl, got none. Give it.")
        self.recipe = recipe
        self.n_steps = recipe.n_steps(windows.shape[1])
        self._rate = SCHEDULES[recipe.schedule]
        self.step = 0
        self.failure: str | None = None
        self._anatomy = anatomy
        self._teacher = teacher
        self._seen = seen
        self._device = anatomy.head.weight.device
        self._halved = anatomy.head.weight.dtype != torch.float32 and self._device.type == "cuda"
        self._tokens_a_step = recipe.batch * windows.shape[1]
        for (
            parameter
        ) in anatomy.model.parameters():  # copies: pruned weights may be views, or mapped from a file
            parameter.data = parameter.data.to(
                torch.float32, copy=True, memory_format=torch.contiguous_format
            )
        self._batches = Batches(windows, recipe.batch, recipe.seed)
        self._learning, self._finish = let_learn(anatomy, recipe)
        self._zeros = Zeros(anatomy)
        self._optimizer = torch.optim.AdamW(
            self._learning.values(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
        )

    @property
    def trained_tokens(self) -> int:
        """So far, repetitions counted."""
        return self.step * self._tokens_a_step

    @property
    def n_learning(self) -> int:
        """How many numbers learn."""
        return sum(parameter.numel() for parameter in self._learning.values())

    def train(self, n_steps: int) -> float | None:
        """Go on for so many steps, or to the end.

        Returns:
            Mean training loss in nats per token; None once training has failed, with the reason in `failure` and
            the weights as they were before the step that failed.
        """
        losses: list[float] = []
        while len(losses) < n_steps and self.step < self.n_steps and self.failure is None:
            losses.append(self._one_step())
        return None if self.failure is not None or not losses else math.fsum(losses) / len(losses)

    def _one_step(self) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = self.recipe.learning_rate * self._rate(self.step, self.n_steps, self.recipe.warmup)
        self._optimizer.zero_grad(set_to_none=True)
        loss = self._loss(self._batches[self.step])
        loss.backward()
        self._zeros.drop_gradients()
        norm = torch.nn.utils.clip_grad_norm_(self._learning.values(), self.recipe.clip)
        if not (torch.isfinite(loss) and torch.isfinite(norm)):
            what = "loss" if not torch.isfinite(loss) else "gradient"
            self.failure = (
                f"training diverged at step {self.step} of {self.n_steps}: its {what} is not finite"
            )
            return 0.0
        self._optimizer.step()
        self._zeros.restore()
        self.step += 1
        return float(loss.detach())

    def _loss(self, tokens: Int[Tensor, "batch length"]) -> Float[Tensor, ""]:
        with torch.enable_grad(), torch.autocast(self._device.type, torch.bfloat16, enabled=self._halved):
            if self.recipe.loss == "ce":
                return ce_loss(self._anatomy, tokens)
            assert self._teacher is not None
            return kl_loss(self._anatomy, tokens, self._teacher, self._wanted(self._teacher, tokens))

    def _wanted(self, teacher: Anatomy, tokens: Int[Tensor, "batch length"]) -> Tensor | None:
        """What the teacher makes of this step's windows, where that is kept."""
        if self._seen is None:
            return None
        if self.step not in self._seen:
            with torch.no_grad():
                self._seen[self.step] = head_inputs(teacher, tokens)
        return self._seen[self.step]

    def state_dict(self) -> dict[str, Any]:
        """What a run is continued from; the step stands for the places in the schedule and in the data."""
        return {
            "recipe": self.recipe.text,
            "step": self.step,
            "failure": self.failure,
            "parameters": {name: parameter.detach().clone() for name, parameter in self._learning.items()},
            "optimizer": self._optimizer.state_dict(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from there.

        Raises:
            ValueError: if the state is that of another recipe or model.
        """
        if state["recipe"] != self.recipe.text or set(state["parameters"]) != set(self._learning):
            raise ValueError("Expected the state of this training, got one of another recipe or model.")
        for name, value in state["parameters"].items():
            self._learning[name].copy_(value)
        self._optimizer.load_state_dict(state["optimizer"])
        self.step, self.failure = state["step"], state["failure"]

    def finish(self) -> None:
        """Leave the trained weights in the model, and nothing else; the trainer is of no use afterwards."""
        self._finish()
        self._anatomy.model.requires_grad_(False)
