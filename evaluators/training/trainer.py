"""Training of a pruned model step by step, to be stopped and continued at any step; its zeros stay zeros."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from secateur.evaluators.training.methods import METHODS
from secateur.evaluators.training.reconstruct import Place, block_loss
from secateur.evaluators.training.settings import SCHEDULES, Training
from secateur.pruners.models.anatomy import Anatomy
from secateur.pruners.models.losses import ce_loss, head_inputs, kl_loss


class Trainer:
    """Trains the live model; its zeros stay zeros.

    Weights and optimizer are in float32 whatever the model's precision; on a GPU a model in half precision computes
    in bfloat16. A step is a function of settings, windows and the state before it: on a CPU a run that was stopped and
    continued gives the weights of an unbroken one, bit by bit.

    Args:
        anatomy: the pruned model, in evaluation mode (no dropout); in float32 from now on.
        training: settings.
        windows: token ids to train on.
        teacher: the dense model with weights of its own; needed for the losses ``kl`` and ``reconstruct``.
        teacher_states: `head_inputs` of the teacher by step, shared by trainings with the same settings and windows;
            None: computed in each step.
        beside_dropped: see `blocks_beside_dropped`, for the method ``merged``.

    Raises:
        ValueError: if the tokens are no whole number of batches, the teacher is missing, or there is nothing to train.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        training: Training,
        windows: Int[Tensor, "windows length"],
        teacher: Anatomy | None = None,
        teacher_states: dict[int, Tensor] | None = None,
        beside_dropped: Sequence[int] = (),
    ) -> None:
        if training.loss != "ce" and teacher is None:
            raise ValueError(
                f"Expected the dense model as `teacher` for the loss {training.loss}, got none. Give it."
            )
        self.n_steps = training.n_steps(windows.shape[1])
        if training.loss == "reconstruct" and self.n_steps < len(anatomy.blocks):
            raise ValueError(
                f"Expected a step for each of the {len(anatomy.blocks)} blocks for the loss reconstruct, got "
                f"{self.n_steps}. Raise `tokens`."
            )
        self.step = 0
        self.failure: str | None = None
        self._training = training
        self._anatomy = anatomy
        self._windows = windows
        self._teacher = teacher
        self._teacher_states = teacher_states
        self._device = anatomy.head.weight.device
        self._halved = anatomy.head.weight.dtype != torch.float32 and self._device.type == "cuda"
        # Copies: pruned weights may be views, or mapped from a file.
        for parameter in anatomy.model.parameters():
            parameter.data = parameter.data.to(
                torch.float32, copy=True, memory_format=torch.contiguous_format
            )
        anatomy.model.requires_grad_(False)
        self._learner = METHODS[training.method](anatomy, training, beside_dropped)
        named = anatomy.model.named_parameters()  # tied ones once
        self._trained = {name: parameter for name, parameter in named if parameter.requires_grad}
        weights: list[Any] = [linear.module.weight for linear in anatomy.linears]
        # For ``lora`` see `MaskedLora`; an adapter's own weight is not trained.
        own = [weight for weight in weights if isinstance(weight, nn.Parameter) and weight.requires_grad]
        self._zeros = [(weight, weight.detach() == 0) for weight in own]
        self._optimizer = torch.optim.AdamW(
            self._trained.values(), lr=training.learning_rate, weight_decay=training.weight_decay
        )

    @property
    def trained_tokens(self) -> int:
        """Tokens so far, repetitions counted."""
        return self.step * self._training.batch * self._windows.shape[1]

    @property
    def n_learning(self) -> int:
        """Number of trained values."""
        return sum(parameter.numel() for parameter in self._trained.values())

    def train(self, n_steps: int) -> float | None:
        """Take so many further steps, or those up to the end.

        Returns:
            Mean training loss in nats per token; None once training has failed, with the reason in `failure` and
            the weights as they were before the step that failed.
        """
        losses: list[float] = []
        while len(losses) < n_steps and self.step < self.n_steps and self.failure is None:
            losses.append(self._one_step())
        return None if self.failure is not None or not losses else math.fsum(losses) / len(losses)

    def _one_step(self) -> float:
        training = self._training
        of = self._place
        rate = SCHEDULES[training.schedule](of.step, of.n_steps, training.warmup)
        for group in self._optimizer.param_groups:
            group["lr"] = training.learning_rate * rate
        self._learner.before_step(self.step, self.n_steps)
        self._optimizer.zero_grad(set_to_none=True)
        loss = self._loss(step_windows(self._windows, training.batch, training.seed, self.step))
        if loss.requires_grad:  # or nothing of the block is trained
            loss.backward()
        self._drop_gradients()
        norm = torch.nn.utils.clip_grad_norm_(self._trained.values(), training.clip)
        if not (torch.isfinite(loss) and torch.isfinite(norm)):
            what = "loss" if not torch.isfinite(loss) else "gradient"
            self.failure = (
                f"training diverged at step {self.step} of {self.n_steps}: its {what} is not finite"
            )
            return 0.0
        self._optimizer.step()
        with torch.no_grad():
            for weight, zero in self._zeros:  # whatever the optimizer did
                weight.masked_fill_(zero, 0)
        self.step += 1
        return float(loss.detach())

    @property
    def _place(self) -> Place:
        """Place of the step in the schedule: of the whole run, or of the block that it trains."""
        if self._training.loss == "reconstruct":
            return Place.of(self.step, self.n_steps, len(self._anatomy.blocks))
        return Place(0, self.step, self.n_steps)

    def _drop_gradients(self) -> None:
        """Zero the gradients of pruned weights: they count neither in the norm nor in the optimizer's moments."""
        for weight, zero in self._zeros:
            if weight.grad is not None:
                weight.grad.masked_fill_(zero, 0)

    def _loss(self, tokens: Int[Tensor, "batch length"]) -> Float[Tensor, ""]:
        with torch.enable_grad(), torch.autocast(self._device.type, torch.bfloat16, enabled=self._halved):
            if self._training.loss == "ce":
                return ce_loss(self._anatomy, tokens)
            assert self._teacher is not None
            if self._training.loss == "reconstruct":
                return block_loss(self._anatomy, tokens, self._teacher, self._place.block)
            kept = self._teacher_states
            if kept is not None and self.step not in kept:
                with torch.no_grad():
                    kept[self.step] = head_inputs(self._teacher, tokens)
            return kl_loss(self._anatomy, tokens, self._teacher, None if kept is None else kept[self.step])

    def state_dict(self) -> dict[str, Any]:
        """State to continue from; the step gives the places in the schedule and in the data."""
        return {
            "recipe": self._training.text,
            "step": self.step,
            "failure": self.failure,
            "parameters": {name: parameter.detach().clone() for name, parameter in self._trained.items()},
            "optimizer": self._optimizer.state_dict(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state.

        Raises:
            ValueError: if it is of other settings or of another model.
        """
        if state["recipe"] != self._training.text or set(state["parameters"]) != set(self._trained):
            raise ValueError("Expected the state of this training, got one of another recipe or model.")
        for name, value in state["parameters"].items():
            self._trained[name].copy_(value)
        self._optimizer.load_state_dict(state["optimizer"])
        self.step, self.failure = state["step"], state["failure"]

    def finish(self) -> None:
        """Leave nothing but the trained weights in the model; the trainer can't be used afterwards."""
        self._learner.merge()
        self._anatomy.model.requires_grad_(False)


def step_windows(
    windows: Int[Tensor, "windows length"], batch: int, seed: int, step: int
) -> Int[Tensor, "batch length"]:
    """Windows of a step, a function of seed and step alone, so that no state is kept.

    Each epoch is all windows once, in an order of its own; a batch may reach over the end of an epoch.

    Args:
        windows: token ids.
        batch: windows a step.
        seed: of the orders.
        step: from 0.
    """
    n_windows = len(windows)
    first, last = step * batch, (step + 1) * batch
    epochs = range(first // n_windows, (last - 1) // n_windows + 1)
    order = np.concatenate([np.random.default_rng([seed, epoch]).permutation(n_windows) for epoch in epochs])
    start = first - epochs[0] * n_windows
    return windows[order[start : start + batch].tolist()]
