"""Static Model Pruning: a score of every weight, learned by first-order information with the weights frozen."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from secateur.pruners.learned.masked_weights import masked_weights
from secateur.pruners.learned.training import MaskTrainer, step_rows, steps_over
from secateur.pruners.learned.training_size import TrainingSize
from secateur.pruners.masks import check_sparsity
from secateur.pruners.models.anatomy import Anatomy, Linear
from secateur.pruners.models.losses import ce_loss
from secateur.pruners.models.runner import in_fp32
from secateur.pruners.recipes.allocation.filling import to_budget
from secateur.pruners.recipes.allocation.layers import Layer, kind_of
from secateur.pruners.stores.saved_state import SavedState

RATE, CLIP = 2e-2, 1.0
"""Learning rate of the scores, which falls to 0 in a straight line, and largest norm of their gradient."""

NORM_WEIGHT = 400.0
"""Largest weight of the mean sigmoid of the scores, which rises from 0."""

RISE = 0.6
"""Share of the steps in which weights go; that of the released script on MNLI, where 12 passes are 73,632 steps."""

DENSE, SHARPER = 0.7, 4.0
"""Kept share from which scores are divided by a number before the shares of layers follow them, and that number."""

BATCH = 4
"""Windows a step; 64 sentences there."""

PASSES, FEWEST_STEPS = 4, 200
"""Passes over the windows, and steps at least."""

WHAT = "the metric smp"


def smp(
    anatomy: Anatomy,
    tokens: Int[Tensor, "windows length"],
    sparsity: float | Mapping[str, float],
    *,
    dampening: float = 0.0,  # unused
    protected: Collection[str] = (),
    state: SavedState | None = None,
) -> dict[str, Float[Tensor, "out in"]]:
    """Masked weights of the projections that lose some, which are otherwise as they were; the model is left dense.

    Static Model Pruning (Jiang et al. 2023, arXiv 2210.06210). Every weight has a score, at first 0. A step masks the
    weights of the lowest scores of each layer; the score's gradient is the mask's (straight-through), and the
    cross-entropy plus a growing weight times the mean sigmoid of the scores is minimised over the scores alone by
    Adam. The kept share falls from 1 along a cube. Of one sparsity this is SMP-S: among the layers of one role the kept
    share of each is in proportion to its mean sigmoid. Of given shares it is SMP-L, whose shares are alike there.
    Learning rate, schedules and factors are the released script's.

    Differences from it: a decoder and its next tokens in place of an encoder, a task and a frozen head of its labels;
    no teacher; at the end the shares meet the budget exactly; few steps, see `FEWEST_STEPS`.

    Args:
        anatomy: the dense model.
        tokens: calibration windows.
        sparsity: of all projections together, or of each by its full name; one without an entry stays dense.
        protected: full names of projections that stay dense.
        state: to continue from.

    Raises:
        BudgetError: if the others can't lose so many weights.
        DivergedError: if the loss is not finite.
        ValueError: on too little memory.
    """
    linears = [x for x in anatomy.linears if x.name not in protected]
    if isinstance(sparsity, Mapping):
        check_sparsity(anatomy, sparsity)
        linears = [x for x in linears if sparsity.get(x.name)]
    _size(linears, (len(tokens), tokens.shape[1])).check(anatomy, f"the training of {WHAT}")
    if not linears:
        return {}
    with in_fp32(anatomy.model):
        training = Scores(anatomy, tokens, linears, sparsity)
        training.train(state)
        masks = training.final(protected)
    return {x.name: x.weight * masks[x.name].to(x.weight.dtype) for x in linears}


def training_size(anatomy: Anatomy, windows: tuple[int, int]) -> TrainingSize:
    """Size of the training, see `MethodRow.training_path`; at most: all projections lose weights."""
    return _size(list(anatomy.linears), windows)


def _size(linears: Sequence[Linear], windows: tuple[int, int]) -> TrainingSize:
    """Size of the training of these projections' scores, with masks and masked weights beside them."""
    steps = steps_over(windows[0], BATCH, PASSES, FEWEST_STEPS)
    return TrainingSize(steps, min(BATCH, windows[0]), windows[1], 7 * sum(x.n_weights for x in linears))


def kept_mask(scores: Float[Tensor, "out in"], n_kept: int) -> Float[Tensor, "out in"]:
    """1 for so many weights with the highest scores; of equal ones any."""
    mask = torch.zeros_like(scores)
    mask.view(-1)[scores.detach().flatten().topk(n_kept).indices] = 1.0
    return mask


def kept_share(final: float, part: float) -> float:
    """Kept share once so much of the rise is over: ``f + (1 - f) (1 - part)^3``."""
    return final + (1 - final) * (1 - min(1.0, part)) ** 3


def layer_shares(
    linears: Sequence[Linear], scores: Mapping[str, Float[Tensor, "out in"]], kept: float, divisor: float
) -> dict[str, float]:
    """Kept share of each layer: of those of one role in proportion to the mean sigmoid of its scores, at most 1."""
    means = {x.name: float((scores[x.name].detach() / divisor).sigmoid().mean()) for x in linears}
    found = {}
    for x in linears:
        same = [means[other.name] for other in linears if other.role == x.role]
        found[x.name] = min(1.0, kept * means[x.name] * len(same) / sum(same))
    return found


class Scores:
    """Scores of the weights of some projections, to be learned."""

    def __init__(
        self,
        anatomy: Anatomy,
        tokens: Int[Tensor, "windows length"],
        linears: Sequence[Linear],
        sparsity: float | Mapping[str, float],
    ) -> None:
        self._anatomy, self._tokens, self._linears, self._sparsity = anatomy, tokens, linears, sparsity
        self._n_steps = steps_over(len(tokens), BATCH, PASSES, FEWEST_STEPS)
        self.scores = {
            x.name: torch.zeros(x.weight.shape, device=x.weight.device, requires_grad=True) for x in linears
        }

    def train(self, state: SavedState | None) -> None:
        """Take all steps that are left."""
        MaskTrainer(
            self.scores,
            torch.optim.Adam(self.scores.values(), lr=RATE),
            self._loss,
            self._n_steps,
            what=f"the scores of {WHAT}",
            rate=lambda step: 1 - step / self._n_steps,
            clip=CLIP,
            state=state,
        ).run()

    def _loss(self, step: int) -> Float[Tensor, ""]:
        shares = self._shares(step / (RISE * self._n_steps))
        masks = {x.name: partial(self.mask, x, shares[x.name]) for x in self._linears}
        rising = NORM_WEIGHT * (1 - (1 - step / self._n_steps) ** 3)
        norm = torch.stack([x.sigmoid().mean() for x in self.scores.values()]).mean()
        with masked_weights(self._linears, masks):
            return ce_loss(self._anatomy, step_rows(self._tokens, BATCH, step)) + rising * norm

    def mask(self, linear: Linear, share: float) -> Float[Tensor, "out in"]:
        """The mask, with the gradient of a mask that equals the scores."""
        scores = self.scores[linear.name]
        return kept_mask(scores, int(share * linear.n_weights)) + scores - scores.detach()

    def _shares(self, part: float) -> dict[str, float]:
        """Kept share of each layer when so much of the rise is over."""
        of = self._sparsity
        if isinstance(of, Mapping):
            return {x.name: kept_share(1 - of[x.name], part) for x in self._linears}
        divisor = SHARPER if 1 - of >= DENSE else 1.0
        return layer_shares(self._linears, self.scores, kept_share(1 - of, part), divisor)

    def final(self, protected: Collection[str]) -> dict[str, Float[Tensor, "out in"]]:
        """Masks that meet the budget."""
        shares = self._shares(1.0)
        if isinstance(self._sparsity, Mapping):
            gone = {x.name: round(self._sparsity[x.name] * x.n_weights) for x in self._linears}
        else:
            every = list(self._anatomy.linears)
            counts = to_budget(
                [_layer(x, x.name in protected) for x in every],
                np.array([1 - shares.get(x.name, 1.0) for x in every]),
                self._sparsity,
            )
            gone = {x.name: int(n) for x, n in zip(every, counts, strict=True)}
        return {
            x.name: kept_mask(self.scores[x.name], x.n_weights - gone[x.name]).detach() for x in self._linears
        }


def _layer(linear: Linear, whole: bool) -> Layer:
    return Layer(
        linear.block,
        kind_of(linear.sublayer),
        size=1,
        n_units=linear.n_weights,
        scores=np.zeros(0),
        keep=linear.n_weights if whole else 0,
        name=linear.name,
    )
