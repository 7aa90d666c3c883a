"""Training of relaxed masks step by step, stopped and continued at any step."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from secateur.pruners.stores.saved_state import SavedState


class DivergedError(ValueError):
    """A training whose loss or gradient is no longer finite."""


class MaskTrainer:
    """Minimises a loss over the parameters of relaxed masks, and of weights that are trained along.

    A step is a function of its number and of the state before it: random numbers are drawn from generators that the
    caller seeds by the step (`step_generator`), so a run that was killed and continued ends as an unbroken one does.

    Args:
        trained: leaf tensors by name; those without a gradient, which `observe` and `settle` change, are kept and
            continued with the others.
        optimizer: over them.
        loss: of a step, from its number.
        n_steps: of the whole run.
        what: that is trained, for errors.
        rate: factor of all learning rates, from the number of a step.
        clip: largest norm of the gradient; None: any.
        observe: called before each step of the optimizer with the step's number and the gradients, clipped.
        settle: called after each step, without gradients: to keep parameters within their bounds.
        state: to continue from, and to write to every `SAVE_SECONDS`; None: neither.
    """

    SAVE_SECONDS = 60.0

    def __init__(
        self,
        trained: Mapping[str, Tensor],
        optimizer: torch.optim.Optimizer,
        loss: Callable[[int], Float[Tensor, ""]],
        n_steps: int,
        *,
        what: str,
        rate: Callable[[int], float] = lambda step: 1.0,
        clip: float | None = None,
        observe: Callable[[int], None] = lambda step: None,
        settle: Callable[[int], None] = lambda step: None,
        state: SavedState | None = None,
    ) -> None:
        self._trained, self._optimizer, self._loss = dict(trained), optimizer, loss
        self._rates = [group["lr"] for group in optimizer.param_groups]
        self._n_steps, self._what = n_steps, what
        self._rate, self._clip, self._observe, self._settle = rate, clip, observe, settle
        self._state = state
        self.step = 0

    def run(self) -> None:
        """Take all steps that are left.

        Raises:
            DivergedError: if a loss or a gradient is not finite.
            LevelStoreError: if the state can't be written.
        """
        saved = self._state.load() if self._state is not None else {}
        if saved:
            self.load(saved)
        since = time.monotonic()
        while self.step < self._n_steps:
            self.take_step()
            last = self.step == self._n_steps
            if self._state is not None and (last or time.monotonic() - since >= self.SAVE_SECONDS):
                self._state.save(self.tensors())
                since = time.monotonic()

    @torch.enable_grad()
    def take_step(self) -> None:
        """Take the next step."""
        factor = self._rate(self.step)
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        self._optimizer.zero_grad()
        loss = self._loss(self.step)
        loss.backward()
        gradients = [p.grad for p in self._trained.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if not (torch.isfinite(loss) and torch.isfinite(norm)):
            kind = "gradients" if torch.isfinite(loss) else "losses"
            raise DivergedError(
                f"Expected finite {kind} of {self._what}, got NaN or infinity at step {self.step} of {self._n_steps}. "
                "Check the calibration text, or take a method without training."
            )
        if self._clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self._trained.values(), self._clip, norm)
        with torch.no_grad():
            self._observe(self.step)
        self._optimizer.step()
        self.step += 1
        with torch.no_grad():
            self._settle(self.step)

    def tensors(self) -> dict[str, Tensor]:
        """The state as named tensors."""
        found = {f"trained {name}": p.detach() for name, p in self._trained.items()}
        whole = self._optimizer.state_dict()
        for index, values in whole["state"].items():
            found |= {f"optimizer {index} {name}": torch.as_tensor(x) for name, x in values.items()}
        for index, group in enumerate(whole["param_groups"]):
            numbers = {name: x for name, x in group.items() if type(x) is float}
            found |= {
                f"group {index} {name}": torch.tensor(x, dtype=torch.float64) for name, x in numbers.items()
            }
        return found | {"step": torch.tensor(self.step)}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from a state that `tensors` gave, after trained tensors were lengthened, too."""
        self.step = int(tensors["step"])
        whole = self._optimizer.state_dict()
        for name, value in tensors.items():
            kind, _, rest = name.partition(" ")
            if kind == "trained":
                if self._trained[rest].shape != value.shape:
                    self._trained[rest].data = self._trained[rest].new_empty(value.shape)
                self._trained[rest].copy_(value)
            elif kind == "optimizer":
                index, _, key = rest.partition(" ")
                whole["state"].setdefault(int(index), {})[key] = value.clone()
            elif kind == "group":
                index, _, key = rest.partition(" ")
                whole["param_groups"][int(index)][key] = float(value)
        self._optimizer.load_state_dict(whole)


def lengthen(optimizer: torch.optim.Optimizer, tensor: Tensor, more: Tensor, dim: int) -> None:
    """Append entries to a trained tensor in place, and zeros to what the optimizer holds for each of its entries.

    Between two steps alone: in `settle` of `MaskTrainer`, without gradients.
    """
    held = optimizer.state.get(tensor, {})
    for name, values in held.items():
        if values.shape == tensor.shape:
            held[name] = torch.cat([values, torch.zeros_like(more)], dim)
    tensor.grad = None
    tensor.data = torch.cat([tensor.detach(), more], dim)


def named_generator(seed: int, name: str) -> torch.Generator:
    """Generator on the CPU of the first values of what has this name, which depend on nothing else."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def step_generator(seed: int, step: int, device: torch.device) -> torch.Generator:
    """Generator of a step's random numbers, which depend on nothing else."""
    generator = torch.Generator(device=device)
    return generator.manual_seed(seed * 1_000_003 + step)


def step_rows(tokens: Int[Tensor, "windows length"], batch: int, step: int) -> Int[Tensor, "batch length"]:
    """Windows of a step: the next ones in their order, again from the first behind the last."""
    first = step * batch % len(tokens)
    return tokens[torch.arange(first, first + min(batch, len(tokens))) % len(tokens)]


def steps_over(n_windows: int, batch: int, passes: int, fewest: int) -> int:
    """Steps of so many passes over the windows, and at least the fewest."""
    return max(fewest, passes * math.ceil(n_windows / batch))


def warmed_cosine_rate(step: int, n_steps: int, warmup: float, lowest: float) -> float:
    """Factor of a learning rate that rises in a share of the steps, and falls along half a cosine to the lowest."""
    rising = warmup * n_steps
    if step < rising:
        return (step + 1) / (rising + 1)
    return cosine_rate(int(step - rising), max(1, int(n_steps - rising)), lowest)


def cosine_rate(step: int, n_steps: int, lowest: float = 0.0) -> float:
    """Factor of a learning rate that falls from 1 along half a cosine."""
    return lowest + (1 - lowest) * 0.5 * (1 + math.cos(math.pi * step / n_steps))
