"""Compresso: hard concrete gates of units, learned with low-rank updates of frozen weights under one budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from secateur.pruners.learned.hard_concrete import (
    BOUNDS,
    augmented_lagrangian,
    expected_kept,
    final_gates,
    sampled_gates,
)
from secateur.pruners.learned.low_rank import QUERIES_AND_VALUES, TunedSublayer, cut_sublayers, update_values
from secateur.pruners.learned.masked_weights import replaced_forwards
from secateur.pruners.learned.training import (
    MaskTrainer,
    named_generator,
    step_generator,
    step_rows,
    steps_over,
)
from secateur.pruners.learned.training_size import TrainingSize
from secateur.pruners.models.anatomy import Anatomy, Sublayer
from secateur.pruners.models.check_kept import check_parts
from secateur.pruners.models.find_layout import find_layouts
from secateur.pruners.models.layout import BlockLayout, SublayerLayout
from secateur.pruners.models.losses import ce_loss, head_inputs
from secateur.pruners.models.runner import in_fp32
from secateur.pruners.models.usable import check_windows
from secateur.pruners.recipes.allocation.filling import to_budget
from secateur.pruners.recipes.allocation.layers import Layer
from secateur.pruners.stores.saved_state import SavedState
from secateur.pruners.structure.knowledge import unit_layers
from secateur.pruners.structure.kprune import KeptNumbers

RANK, SCALE = 8, 1.0
"""Rank of the updates of queries and values, and their factor."""

STARTS: dict[Sublayer, float] = {"attention": 10.0, "mlp": math.log(99)}
"""Mean of the first locations of gates, which are within `BOUNDS` after a step."""

DEVIATION = 0.01
GATE_RATE, RATE = 0.1, 5e-5
"""Learning rates: of locations and multipliers, and of updates; both constant."""

TUNED, RISE = 1 / 8, 4 / 8
"""Shares of the steps in which the updates alone are tuned, and behind them in which the target sparsity rises."""

BATCH = 4
"""Windows a step; 1 there."""

PASSES, FEWEST_STEPS = 4, 200
"""Passes over the windows, and steps at least; 8 passes over 52,000 samples there."""

SEED = 0
WHAT = "the metric compresso"


def compresso(
    anatomy: Anatomy,
    layouts: Sequence[BlockLayout],
    tokens: Int[Tensor, "windows length"],
    sparsity: float,
    *,
    protected: Collection[str] = (),
    prompt: Sequence[int] = (),
    state: SavedState | None = None,
) -> tuple[tuple[KeptNumbers, ...], dict[str, Float[Tensor, "out _"]]]:
    """Kept units of each block, and weights of all projections; the live model is left dense.

    Compresso (Guo et al. 2023, arXiv 2310.05015): the cross-entropy is minimised over hard concrete gates of the units
    and over low-rank updates of queries and values; all other weights are frozen. With s the expected sparsity of the
    whole model and t its target, ``lambda_1 (s - t) + lambda_2 (s - t)^2`` is added, and lambda is ascended. In the
    first eighth of the steps there are no gates, then t rises for one half. At the end each sub-layer loses as many
    units as its gates expect, all numbers scaled by one factor to the budget; those with the lowest locations go, and
    the gates of the others are multiplied into the weights. How sub-layers share the loss is so learned, other than in
    `sheared`. First values, learning rates and schedules are the released script's.

    Differences from it: KV groups in place of heads, with all of their query heads; no gates of the residual stream's
    width; the numbers are scaled to the budget, which the expectation meets only nearly; small batches and few steps,
    see `FEWEST_STEPS`; windows of the calibration text in place of instructions. Tuning afterwards is the stage after
    it, ``recover``.

    With the collaborative prompt every window is read behind it, and the loss is of the window alone, as there of the
    response; its wording is ours. There it also stands before whatever the pruned model is given; here texts are
    measured without it, so put it there yourself (`prompts.COLLABORATIVE`). The recipe ``compresso`` is without.

    Args:
        anatomy: the dense model.
        layouts: of its blocks.
        tokens: calibration windows.
        sparsity: share of the blocks' parameters to remove.
        protected: full names of projections whose sub-layers are kept whole.
        prompt: token ids that stand before each window, behind the token that all windows begin with, if any.
        state: to continue from.

    Raises:
        BudgetError: if less may go.
        DivergedError: if the loss is not finite.
        ValueError: on too little memory, or a prompt and windows that are longer than the model's learned positions.
    """
    parts = [part for layout in layouts for part in layout.sublayers]
    layers = unit_layers(parts, protected)
    to_budget(layers, [1.0] * len(layers), sparsity)  # raises what the training could not mend
    length = len(prompt) + tokens.shape[1]
    training_size(anatomy, (len(tokens), length)).check(anatomy, f"the training of {WHAT}")
    if prompt:
        check_windows(anatomy.model, length, allow_long=True)
    with in_fp32(anatomy.model):
        gates = BudgetGates(anatomy, tokens, parts, layers, sparsity, prompt)
        gates.train(state)
        pairs = zip(gates.sublayers, gates.kept(), strict=True)
        found = [(one, kept, one.cut(kept, gates.values(one))) for one, kept in pairs]
    return cut_sublayers(anatomy, found)


def check(anatomy: Anatomy, *, prompt: str = "none") -> None:
    """Raise a ValueError on a family that can't be cut to units."""
    check_parts(find_layouts(anatomy, experts=True), WHAT, experts=True)


def behind_prompt(
    anatomy: Anatomy, rows: Int[Tensor, "batch length"], prompt: Int[Tensor, " prompt"]
) -> Float[Tensor, ""]:
    """Cross-entropy of windows that are read behind a prompt, over the positions of `ce_loss` without one."""
    begun = int(anatomy.bos is not None)
    whole = torch.cat([rows[:, :begun], prompt.expand(len(rows), -1), rows[:, begun:]], 1)
    return ce_loss(anatomy, rows, head_inputs(anatomy, whole)[:, len(prompt) :])


def training_size(anatomy: Anatomy, windows: tuple[int, int], **parameters: Any) -> TrainingSize:
    """Size of the training, see `MethodRow.training_path`; a prompt makes the windows longer, whose length is given."""
    parts = [part for layout in find_layouts(anatomy, experts=True) for part in layout.sublayers]
    n_values = update_values(parts, RANK, QUERIES_AND_VALUES) + 5 * sum(part.n_units for part in parts)
    steps = steps_over(windows[0], BATCH, PASSES, FEWEST_STEPS)
    return TrainingSize(steps, min(BATCH, windows[0]), windows[1], n_values)


def expected_sparsity(
    locations: Sequence[Float[Tensor, " _"]], sizes: Sequence[int], n_params: int
) -> Float[Tensor, ""]:
    """Share of the parameters that gates expect to remove.

    Args:
        locations: of the gates of each sub-layer.
        sizes: parameters of a unit of each.
        n_params: of all units, those without gates, too.
    """
    gone = [
        (1 - expected_kept(x)).sum() * (size / n_params) for x, size in zip(locations, sizes, strict=True)
    ]
    return torch.stack(gone).sum()


class BudgetGates:
    """Gates and updates of a model, and their training.

    Args:
        anatomy: the model, in float32.
        tokens: windows.
        parts: all sub-layers.
        layers: of them; one that may lose nothing has no gates.
        sparsity: target.
        prompt: token ids that stand before each window.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        tokens: Int[Tensor, "windows length"],
        parts: Sequence[SublayerLayout],
        layers: Sequence[Layer],
        sparsity: float,
        prompt: Sequence[int] = (),
    ) -> None:
        self._anatomy, self._tokens, self._layers, self.sparsity = anatomy, tokens, layers, sparsity
        self._prompt = torch.tensor(prompt, dtype=tokens.dtype)
        self._n_steps = steps_over(len(tokens), BATCH, PASSES, FEWEST_STEPS)
        self._device = anatomy.embedding.weight.device
        self.sublayers = [
            TunedSublayer(part, RANK, SEED, scale=SCALE, roles=QUERIES_AND_VALUES) for part in parts
        ]
        self.gated = [part for part, layer in zip(parts, layers, strict=True) if layer.n_free]
        self.locations = {part.name: self.first(part) for part in self.gated}
        self._multipliers = torch.zeros(2, device=self._device, requires_grad=True)
        self.n_params = sum(part.n_units * part.unit_params for part in parts)

    def first(self, part: SublayerLayout) -> Float[Tensor, " units"]:
        """First locations of a sub-layer's gates."""
        noise = DEVIATION * torch.randn(part.n_units, generator=named_generator(SEED, part.name))
        return (STARTS[part.kind] + noise).to(self._device).requires_grad_()

    def train(self, state: SavedState | None) -> None:
        """Take all steps that are left."""
        updates = {name: factor for one in self.sublayers for name, factor in one.trained}
        gates = {f"gates {name}": x for name, x in self.locations.items()}
        groups = [
            {"params": list(updates.values()), "lr": RATE},
            {"params": list(gates.values()), "lr": GATE_RATE},
            {"params": [self._multipliers], "lr": GATE_RATE, "maximize": True},
        ]
        MaskTrainer(
            updates | gates | {"multipliers": self._multipliers},
            torch.optim.AdamW(groups, weight_decay=0.0),
            self._loss,
            self._n_steps,
            what=f"the gates of {WHAT}",
            clip=1.0,
            settle=self._settle,
            state=state,
        ).run()

    def kept(self) -> list[tuple[int, ...]]:
        """Numbers of the units that stay, of each sub-layer."""
        shares = [self._expected_share(one) for one in self.sublayers]
        gone = to_budget(self._layers, np.clip(shares, 0.0, 1.0), self.sparsity).tolist()
        return [
            self._highest(one.part, one.part.n_units - n) for one, n in zip(self.sublayers, gone, strict=True)
        ]

    def values(self, one: TunedSublayer) -> Float[Tensor, " units"] | None:
        """Values of the gates that stay; None: it has none."""
        locations = self.locations.get(one.part.name)
        return None if locations is None else final_gates(locations.detach())

    def _expected_share(self, one: TunedSublayer) -> float:
        locations = self.locations.get(one.part.name)
        return 0.0 if locations is None else float(1 - expected_kept(locations.detach()).mean())

    def _highest(self, part: SublayerLayout, n_kept: int) -> tuple[int, ...]:
        if n_kept == part.n_units:
            return tuple(range(n_kept))
        order = self.locations[part.name].detach().argsort(descending=True, stable=True)
        return tuple(sorted(order[:n_kept].tolist()))

    def _settle(self, step: int) -> None:
        for locations in self.locations.values():
            locations.clamp_(*BOUNDS)

    def _loss(self, step: int) -> Float[Tensor, ""]:
        gating = step - TUNED * self._n_steps
        generator = step_generator(SEED, step, self._device)
        outputs: dict[str, Callable[[Tensor], Tensor]] = {}
        for one in self.sublayers:
            locations = self.locations.get(one.part.name)
            gates = torch.ones(one.part.n_units, device=self._device)
            if locations is not None and gating >= 0:
                gates = sampled_gates(locations, generator)
            outputs |= one.outputs(gates)
        with replaced_forwards(list(self._anatomy.linears), outputs):
            loss = behind_prompt(self._anatomy, step_rows(self._tokens, BATCH, step), self._prompt)
        return loss + self.penalty(gating / (RISE * self._n_steps)) if gating >= 0 else loss

    def penalty(self, part: float) -> Float[Tensor, ""]:
        """The Lagrangian term when such a part of the steps in which the target rises is over."""
        locations = [self.locations[x.name] for x in self.gated]
        found = expected_sparsity(locations, [x.unit_params for x in self.gated], self.n_params)
        return augmented_lagrangian(found - min(1.0, part) * self.sparsity, self._multipliers)
