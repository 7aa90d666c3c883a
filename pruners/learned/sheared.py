"""Sheared LLaMA: units to keep for a target shape, learned with the weights by hard concrete gates."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

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
from secateur.pruners.learned.low_rank import cut_weights
from secateur.pruners.learned.masked_weights import replaced_weights
from secateur.pruners.learned.memory import check_training_memory
from secateur.pruners.learned.training import (
    MaskTrainer,
    cosine_rate,
    named_generator,
    step_generator,
    step_rows,
)
from secateur.pruners.models.anatomy import Anatomy, Linear, Sublayer
from secateur.pruners.models.check_kept import check_parts
from secateur.pruners.models.find_layout import find_layouts
from secateur.pruners.models.layout import BlockLayout, SublayerLayout
from secateur.pruners.models.losses import ce_loss
from secateur.pruners.models.runner import in_fp32
from secateur.pruners.recipes.allocation.allocate import allocate
from secateur.pruners.recipes.allocation.layers import RuleEvidence
from secateur.pruners.stores.saved_state import SavedState
from secateur.pruners.structure.knowledge import unit_layer
from secateur.pruners.structure.kprune import KeptNumbers

START, DEVIATION = 5.0, 0.01
"""Mean and deviation of the first locations."""

GATE_RATE, WEIGHT_RATE = 1.0, 1e-4
"""Learning rates: of locations and multipliers, and of weights."""

RISE, WARMUP, LOWEST = 0.2, 0.1, 0.1
"""Shares of the steps in which the target sparsity and the learning rate rise, and the rate's share at the end."""

BATCH = 4
"""Windows a step; 32 there."""

PASSES, FEWEST_STEPS = 4, 200
"""Passes over the windows, and steps at least; 3,200 steps there."""

SEED = 0
WHAT = "the metric sheared"


def sheared(
    anatomy: Anatomy,
    layouts: Sequence[BlockLayout],
    tokens: Int[Tensor, "windows length"],
    sparsity: float,
    *,
    protected: Collection[str] = (),
    state: SavedState | None = None,
) -> tuple[tuple[KeptNumbers, ...], dict[str, Float[Tensor, "out _"]]]:
    """Kept units of each block, and trained weights of the projections that lose some; the live model is left dense.

    Sheared LLaMA (Xia et al. 2024, arXiv 2310.06694): a target shape is fixed, here that of the rule uniform. The
    cross-entropy is minimised over the weights and over hard concrete gates of the units; of each sub-layer
    ``lambda_1 (s - t) + lambda_2 (s - t)^2`` is added, with s its expected sparsity and t its target, which rises from
    0, and lambda is ascended. At the end the units with the highest locations stay, and their gates are multiplied
    into the weights. Learning rates, gates and schedules are the released script's.

    Differences from it: KV groups in place of heads; multipliers of each sub-layer, not of a kind; no gates of the
    residual stream's width and of whole layers, as the target shape has all of these; embeddings, norms and what loses
    nothing are not trained; windows are drawn alike from all sources; few steps, see `FEWEST_STEPS`. Further training
    is the stage after it, ``recover``.

    Args:
        anatomy: the dense model.
        layouts: of its blocks.
        tokens: calibration windows.
        sparsity: share of the blocks' parameters to remove.
        protected: full names of projections whose sub-layers are kept whole.
        state: to continue from.

    Raises:
        BudgetError: if less may go.
        DivergedError: if the loss is not finite.
        ValueError: on too little memory.
    """
    parts = [part for layout in layouts for part in layout.sublayers]
    layers = [unit_layer(part, torch.zeros(part.n_units), protected) for part in parts]
    gone = allocate("uniform", layers, RuleEvidence(), sparsity, "structure")
    _check_memory(anatomy, tokens, [part for part, n in zip(parts, gone, strict=True) if n])
    with in_fp32(anatomy.model):
        gated = {part.name: _Gates(part, part.n_units - n) for part, n in zip(parts, gone, strict=True) if n}
        _Shearing(anatomy, tokens, list(gated.values())).train(state)
        found: dict[str, Tensor] = {}
        numbers: list[dict[Sublayer, tuple[int, ...]]] = [{} for _ in layouts]
        for part in parts:
            kept = gated[part.name].kept if part.name in gated else tuple(range(part.n_units))
            numbers[part.output.block][part.kind] = kept
            if part.name in gated and kept:
                found |= gated[part.name].cut(kept)
    dtypes = {linear.name: linear.weight.dtype for linear in anatomy.linears}
    return tuple(numbers), {name: weight.to(dtypes[name]) for name, weight in found.items()}


def check(anatomy: Anatomy) -> None:
    """Raise a ValueError on a family that can't be cut to units."""
    check_parts(find_layouts(anatomy), WHAT)


@dataclass
class _Gates:
    """Gates of a sub-layer's units, and its weights.

    Args:
        part: the sub-layer.
        n_kept: target number of units.
    """

    part: SublayerLayout
    n_kept: int

    def __post_init__(self) -> None:
        device = self.part.output.weight.device
        noise = DEVIATION * torch.randn(self.part.n_units, generator=named_generator(SEED, self.part.name))
        self.log_alpha = (START + noise).to(device).requires_grad_()
        self.multipliers = torch.zeros(2, device=device, requires_grad=True)
        self.weights = {x.name: x.weight.detach().float().clone().requires_grad_() for x in self.linears}

    @property
    def linears(self) -> list[Linear]:
        return [placement.linear for placement in self.part.placements]

    @property
    def target(self) -> float:
        """Target sparsity."""
        return 1 - self.n_kept / self.part.n_units

    def penalty(self, rise: float) -> Float[Tensor, ""]:
        """The Lagrangian term when so much of the target is asked for."""
        return lagrangian(self.log_alpha, rise * self.target, self.multipliers)

    def functions(self, gates: Float[Tensor, " units"]) -> dict[str, Callable[[], Tensor]]:
        """Weights of the projections with these gates on the output projection's columns."""
        found: dict[str, Callable[[], Tensor]] = {}
        for linear in self.linears:
            found[linear.name] = self._gated(gates) if linear is self.part.output else self._plain(linear)
        return found

    def _gated(self, gates: Float[Tensor, " units"]) -> Callable[[], Tensor]:
        columns = gates.repeat_interleave(self.part.unit_width)
        return lambda: self.weights[self.part.output.name] * columns

    def _plain(self, linear: Linear) -> Callable[[], Tensor]:
        return lambda: self.weights[linear.name]

    @property
    def kept(self) -> tuple[int, ...]:
        """The units with the highest locations, ascending."""
        order = self.log_alpha.detach().argsort(descending=True, stable=True)
        return tuple(sorted(order[: self.n_kept].tolist()))

    def cut(self, kept: tuple[int, ...]) -> dict[str, Tensor]:
        """Trained weights of these units, with their gates."""
        weights = {name: weight.detach() for name, weight in self.weights.items()}
        weights[self.part.output.name] = self._gated(final_gates(self.log_alpha.detach()))().detach()
        return cut_weights(self.part, kept, weights)


def lagrangian(
    log_alpha: Float[Tensor, " units"], target: float, multipliers: Float[Tensor, "2"]
) -> Float[Tensor, ""]:
    """``lambda_1 (s - t) + lambda_2 (s - t)^2`` with s the expected sparsity of the gates."""
    return augmented_lagrangian(1 - expected_kept(log_alpha).mean() - target, multipliers)


class _Shearing:
    """Training of the gates and weights of some sub-layers."""

    def __init__(
        self, anatomy: Anatomy, tokens: Int[Tensor, "windows length"], gated: Sequence[_Gates]
    ) -> None:
        self._anatomy, self._tokens, self._gated = anatomy, tokens, gated
        self._n_steps = max(FEWEST_STEPS, PASSES * math.ceil(len(tokens) / BATCH))
        self._linears = [linear for one in gated for linear in one.linears]

    def train(self, state: SavedState | None) -> None:
        """Take all steps that are left."""
        if not self._gated:
            return
        gates = {f"gates {one.part.name}": one.log_alpha for one in self._gated}
        multipliers = {f"multipliers {one.part.name}": one.multipliers for one in self._gated}
        weights = {name: weight for one in self._gated for name, weight in one.weights.items()}
        groups = [
            {"params": list(weights.values()), "lr": WEIGHT_RATE},
            {"params": list(gates.values()), "lr": GATE_RATE},
            {"params": list(multipliers.values()), "lr": GATE_RATE, "maximize": True},
        ]
        MaskTrainer(
            gates | multipliers | weights,
            torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0),
            self._loss,
            self._n_steps,
            what=f"the gates of {WHAT}",
            rate=self._rate,
            clip=1.0,
            settle=self._settle,
            state=state,
        ).run()

    def _rate(self, step: int) -> float:
        rising = WARMUP * self._n_steps
        if step < rising:
            return (step + 1) / (rising + 1)
        return cosine_rate(int(step - rising), int(self._n_steps - rising), LOWEST)

    def _settle(self, step: int) -> None:
        for one in self._gated:
            one.log_alpha.clamp_(*BOUNDS)

    def _loss(self, step: int) -> Float[Tensor, ""]:
        generator = step_generator(SEED, step, self._anatomy.embedding.weight.device)
        weights: dict[str, Callable[[], Tensor]] = {}
        for one in self._gated:
            weights |= one.functions(sampled_gates(one.log_alpha, generator))
        rise = min(1.0, step / (RISE * self._n_steps))
        penalties = torch.stack([one.penalty(rise) for one in self._gated])
        with replaced_weights(self._linears, weights):
            return ce_loss(self._anatomy, step_rows(self._tokens, BATCH, step)) + penalties.sum()


def _check_memory(
    anatomy: Anatomy, tokens: Int[Tensor, "windows length"], parts: Sequence[SublayerLayout]
) -> None:
    trained = sum(x.linear.n_weights for part in parts for x in part.placements)
    check_training_memory(anatomy, BATCH, tokens.shape[1], 5 * trained, WHAT)
