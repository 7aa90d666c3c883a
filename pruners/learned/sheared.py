"""Sheared LLaMA: units, blocks and hidden channels for a target shape, learned with the weights by gates."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from secateur.pruners.learned.domains import DomainLoader
from secateur.pruners.learned.gated_model import GatedModel, Values, trained_parts
from secateur.pruners.learned.target_shape import check_gates, uniform_shape, whole_shape
from secateur.pruners.learned.training import (
    MaskTrainer,
    step_generator,
    step_rows,
    steps_over,
    warmed_cosine_rate,
)
from secateur.pruners.learned.training_size import TrainingSize
from secateur.pruners.models.anatomy import Anatomy
from secateur.pruners.models.check_kept import check_parts
from secateur.pruners.models.find_layout import find_layouts
from secateur.pruners.models.layout import BlockLayout, SublayerLayout
from secateur.pruners.models.losses import ce_loss
from secateur.pruners.models.runner import in_fp32
from secateur.pruners.stores.saved_state import SavedState
from secateur.pruners.structure.chosen import ChosenUnits

GATE_RATE, WEIGHT_RATE = 1.0, 1e-4
"""Learning rates: of locations and multipliers, and of weights."""

RISE, WARMUP, LOWEST = 0.2, 0.1, 0.1
"""Shares of the steps in which the target sparsity and the learning rate rise, and the rate's share at the end."""

BATCH = 4
"""Windows a step; 32 there."""

PASSES, FEWEST_STEPS = 4, 200
"""Passes over the windows, and steps at least; 3,200 steps there."""

EVERY = 20
"""Steps between two updates of the weights of domains; 50 there."""

SEED = 0
WHAT = "the metric sheared"


def sheared(
    anatomy: Anatomy,
    layouts: Sequence[BlockLayout],
    tokens: Int[Tensor, "windows length"],
    sparsity: float,
    *,
    protected: Collection[str] = (),
    blocks: float = 0.0,
    hidden: float = 0.0,
    domains: Sequence[str] = (),
    state: SavedState | None = None,
) -> ChosenUnits:
    """Kept units of each block, kept hidden channels, and trained weights; the live model is left dense.

    Weights are those of the projections that lose some. Sheared LLaMA (Xia et al. 2024, arXiv 2310.06694): a target
    shape is fixed, here that of the rule uniform, or one of fewer blocks and hidden channels, too, see `whole_shape`:
    `hidden` 0.5 is the shape that it gives 2.7B parameters, `blocks` 1/6 and `hidden` 5/12 that of 1.3B. The
    cross-entropy is minimised over the weights and over hard concrete gates of the units, blocks and hidden channels;
    of each kind ``lambda_1 (s - t) + lambda_2 (s - t)^2`` is added, with s its expected sparsity and t its target,
    which rises from 0, and lambda is ascended. At the end what has the highest locations stays, and its gates are
    multiplied into the weights. Learning rates, gates and schedules are the released script's. Windows of several
    sources are loaded by their losses, see `DomainLoader`.

    Differences from it: KV groups in place of heads; multipliers of each sub-layer, not of a kind; the first block
    always stays; embeddings, norms and what loses nothing are not trained; references are the dense model's losses,
    where there a scaling law of the family foretells those of a model of the target's size; few steps, see
    `FEWEST_STEPS`. Further training is the stage after it, ``recover``.

    Args:
        anatomy: the dense model.
        layouts: of its blocks.
        tokens: calibration windows.
        sparsity: share of the blocks' parameters to remove.
        protected: full names of projections whose sub-layers are kept whole; none beside `blocks` or `hidden`.
        blocks: power of the kept share that blocks take, in [0, 1].
        hidden: likewise hidden channels; both sum to at most 1.
        domains: source of each window; one alone, or none: all are drawn alike.
        state: to continue from.

    Raises:
        BudgetError: if less may go.
        DivergedError: if the loss is not finite.
        ValueError: on too little memory, a shape that the model can't have, or too few windows of a source.
    """
    if blocks or hidden:
        shape = whole_shape(anatomy, layouts, sparsity, blocks=blocks, hidden=hidden)
    else:
        shape = uniform_shape(layouts, sparsity, protected)
    loader = DomainLoader(domains, SEED) if len(set(domains)) > 1 else None
    size = _size(trained_parts(layouts, shape), (len(tokens), tokens.shape[1]))
    size.check(anatomy, f"the training of {WHAT}")
    with in_fp32(anatomy.model):
        model = GatedModel(anatomy, layouts, shape, SEED)
        Shearing(anatomy, tokens, model, loader).train(state)
        found = model.chosen()
    dtypes = {linear.name: linear.weight.dtype for linear in anatomy.linears}
    return found._replace(weights={name: x.to(dtypes[name]) for name, x in found.weights.items()})


def check(anatomy: Anatomy, *, blocks: float = 0.0, hidden: float = 0.0) -> None:
    """Raise a ValueError on a family that can't be cut to units, or have the gates of blocks and hidden channels."""
    experts = not (blocks or hidden)  # routed ones have no gates
    layouts = find_layouts(anatomy, experts=experts)
    check_parts(layouts, WHAT, experts=experts)
    if blocks or hidden:
        check_gates(anatomy, layouts, hidden=hidden > 0)


def training_size(anatomy: Anatomy, windows: tuple[int, int], **parameters: Any) -> TrainingSize:
    """Size of the training, see `MethodRow.training_path`; at most: all sub-layers lose something."""
    return _size(
        [part for layout in find_layouts(anatomy, experts=True) for part in layout.sublayers], windows
    )


def _size(parts: Sequence[SublayerLayout], windows: tuple[int, int]) -> TrainingSize:
    """Size of the training of these sub-layers' weights."""
    trained = sum(x.linear.n_weights for part in parts for x in part.placements)
    steps = steps_over(windows[0], BATCH, PASSES, FEWEST_STEPS)
    return TrainingSize(steps, min(BATCH, windows[0]), windows[1], 5 * trained)


class Shearing:
    """Training of the gates and weights of a model."""

    def __init__(
        self,
        anatomy: Anatomy,
        tokens: Int[Tensor, "windows length"],
        model: GatedModel,
        loader: DomainLoader | None,
    ) -> None:
        self._anatomy, self._tokens, self._model, self._loader = anatomy, tokens, model, loader
        self._n_steps = steps_over(len(tokens), BATCH, PASSES, FEWEST_STEPS)

    def train(self, state: SavedState | None) -> None:
        """Take all steps that are left."""
        if not self._model.gates:
            return
        gates = {f"gates {name}": one.log_alpha for name, one in self._model.gates.items()}
        multipliers = {f"multipliers {name}": one.multipliers for name, one in self._model.gates.items()}
        weights = self._model.weights
        groups = [
            {"params": list(weights.values()), "lr": WEIGHT_RATE},
            {"params": list(gates.values()), "lr": GATE_RATE},
            {"params": list(multipliers.values()), "lr": GATE_RATE, "maximize": True},
        ]
        loading = {} if self._loader is None else self._loader.tensors
        if self._loader is not None:
            _ = self._references  # before anything is trained
        MaskTrainer(
            gates | multipliers | weights | loading,
            torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0),
            self.loss,
            self._n_steps,
            what=f"the gates of {WHAT}",
            rate=lambda step: warmed_cosine_rate(step, self._n_steps, WARMUP, LOWEST),
            clip=1.0,
            settle=self._settle,
            state=state,
        ).run()

    def _settle(self, step: int) -> None:
        for one in self._model.gates.values():
            one.settle()

    def loss(self, step: int) -> Float[Tensor, ""]:
        """Cross-entropy of a step, with the penalties of all kinds of gates."""
        windows = self._windows(step)
        generator = step_generator(SEED, step, self._anatomy.embedding.weight.device)
        values = self._model.sampled(generator)
        rise = min(1.0, step / (RISE * self._n_steps))
        penalties = torch.stack([one.penalty(rise) for one in self._model.gates.values()])
        with self._model.computing(values):
            return ce_loss(self._anatomy, windows) + penalties.sum()

    def _windows(self, step: int) -> Int[Tensor, "batch length"]:
        """Windows of a step."""
        if self._loader is None:
            return step_rows(self._tokens, BATCH, step)
        if step and step % EVERY == 0:
            self._loader.update(self._held_out(self._model.present), self._references)
        return self._tokens[self._loader.rows(step, BATCH)]

    @cached_property
    def _references(self) -> Float[Tensor, " domains"]:
        """Losses of the dense model, on the windows of each domain that are held out."""
        return self._held_out(None)

    @torch.no_grad()
    def _held_out(self, values: Values | None) -> Float[Tensor, " domains"]:
        """Losses of the model with these gates; None: of the dense model."""
        assert self._loader is not None, "asked for where there are several domains"
        with nullcontext() if values is None else self._model.computing(values):
            return torch.stack([self._mean_loss(rows) for rows in self._loader.held_out])

    def _mean_loss(self, rows: Int[Tensor, " windows"]) -> Float[Tensor, ""]:
        losses = [ce_loss(self._anatomy, self._tokens[x]).cpu() * len(x) for x in rows.split(BATCH)]
        return torch.stack(losses).sum() / len(rows)
