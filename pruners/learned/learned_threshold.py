"""Learned thresholds: one for the scores of each sub-layer's units, trained by the loss under one budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from secateur.pruners.learned.hard_concrete import augmented_lagrangian
from secateur.pruners.learned.low_rank import TunedSublayer
from secateur.pruners.learned.masked_weights import replaced_forwards
from secateur.pruners.learned.training import MaskTrainer, step_rows, steps_over
from secateur.pruners.learned.training_size import TrainingSize
from secateur.pruners.models.anatomy import Anatomy
from secateur.pruners.models.find_layout import find_layouts
from secateur.pruners.models.losses import ce_loss
from secateur.pruners.models.runner import in_fp32
from secateur.pruners.recipes.allocation.filling import to_budget
from secateur.pruners.recipes.allocation.layers import Ints, Layer, RuleEvidence, layers_sha256
from secateur.pruners.recipes.context import Sample
from secateur.pruners.stores.saved_state import SavedState

TEMPERATURE = 0.1
"""Width of the sigmoid that a mask's gradient is of, in shares of the units."""

RATE, MULTIPLIER_RATE = 0.01, 0.1
"""Learning rates of thresholds and multipliers."""

RISE = 0.5
"""Share of the steps in which the target sparsity rises from 0."""

BATCH = 4
"""Windows a step."""

PASSES, FEWEST_STEPS = 4, 200
"""Passes over the windows, and steps at least."""

WHAT = "the rule learned_threshold"


def learned_threshold(layers: Sequence[Layer], evidence: RuleEvidence, sparsity: float) -> Ints:
    """Shares below the learned thresholds, all scaled by one factor where they miss the budget.

    Args:
        evidence: with `shares_below`.
    """
    return to_budget(layers, np.clip(evidence.measured, 0.0, 1.0), sparsity)


def shares_below(
    anatomy: Anatomy, sample: Sample, *, sparsity: float, layers: Sequence[Layer]
) -> tuple[float, ...]:
    """Share of each sub-layer's units whose score is below its learned threshold.

    The idea of LAPP (Zhai et al. 2023, arXiv 2309.14157), a learnable threshold for each layer that the loss and a
    budget train, and no more of it: the weights are those of the dense model, and stay, where there a CNN is trained
    from scratch with a bypass beside each layer. [INFER] The formulas are ours, as its abstract gives none. The scores
    stay the same, so that a threshold for their ranks removes the same units: a unit of rank k of n, from the lowest,
    goes if ``(k + 1/2) / n < t``; the mask's gradient is that of ``sigmoid(((k + 1/2) / n - t) / TEMPERATURE)``. With s
    the mean of the thresholds by parameters and s* a target that rises from 0, ``lambda_1 (s - s*) + lambda_2
    (s - s*)^2`` is added to the cross-entropy, and lambda is ascended.

    Args:
        sparsity: target share of the layers' parameters.
        layers: sub-layers, with scores of their units.

    Returns:
        A share a layer, at most what it may lose.

    Raises:
        DivergedError: if the loss is not finite.
        ValueError: on too little memory.
    """
    size = training_size(anatomy, (len(sample.tokens), sample.tokens.shape[1]))
    size.check(anatomy, f"the training of {WHAT}")
    state = sample.statistics.state(f"learned_threshold-{sparsity:g}-{layers_sha256(layers)}")
    with in_fp32(anatomy.model):
        training = Thresholds(anatomy, sample.tokens, layers, sparsity)
        training.train(state)
    return tuple(float(one.value.detach()) for one in training.thresholds)


def training_size(anatomy: Anatomy, windows: tuple[int, int]) -> TrainingSize:
    """Size of the training, see `MethodRow.training_path`; thresholds are a number a layer."""
    steps = steps_over(windows[0], BATCH, PASSES, FEWEST_STEPS)
    return TrainingSize(steps, min(BATCH, windows[0]), windows[1], 0)


class Threshold:
    """Threshold of a layer, at first 0, in shares of its units by the ranks of their scores.

    Args:
        layer: with scores.
        device: of the tensors.
    """

    def __init__(self, layer: Layer, device: torch.device) -> None:
        ranks = layer.scores.argsort(kind="stable").argsort()
        self.places = torch.tensor((ranks + 0.5) / layer.n_units, dtype=torch.float32, device=device)
        self.value = torch.zeros((), device=device, requires_grad=True)
        self.most = layer.n_free / layer.n_units
        self.n_weights = layer.n_weights

    def mask(self) -> Float[Tensor, " units"]:
        """1 for the units above the threshold, with the gradient of the sigmoid."""
        soft = ((self.places - self.value) / TEMPERATURE).sigmoid()
        return (self.places >= self.value).float() - soft.detach() + soft


class Thresholds:
    """Thresholds of all layers, and their training.

    Args:
        anatomy: the model, in float32.
        tokens: windows.
        layers: sub-layers with scores; one that may lose nothing has no masks.
        sparsity: target.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        tokens: Int[Tensor, "windows length"],
        layers: Sequence[Layer],
        sparsity: float,
    ) -> None:
        self._anatomy, self._tokens, self._sparsity = anatomy, tokens, sparsity
        self._n_steps = steps_over(len(tokens), BATCH, PASSES, FEWEST_STEPS)
        device = anatomy.embedding.weight.device
        self.thresholds = [Threshold(layer, device) for layer in layers]
        self._multipliers = torch.zeros(2, device=device, requires_grad=True)
        layouts = find_layouts(anatomy, experts=True)
        parts = {part.output.name: part for layout in layouts for part in layout.sublayers}
        self._masked = [
            (one, TunedSublayer(parts[layer.linears[-1]], 0, 0, roles=()))
            for one, layer in zip(self.thresholds, layers, strict=True)
            if layer.n_free
        ]

    def train(self, state: SavedState | None) -> None:
        """Take all steps that are left."""
        values = {f"threshold {index}": one.value for index, (one, _) in enumerate(self._masked)}
        groups = [
            {"params": list(values.values()), "lr": RATE},
            {"params": [self._multipliers], "lr": MULTIPLIER_RATE, "maximize": True},
        ]
        MaskTrainer(
            values | {"multipliers": self._multipliers},
            torch.optim.AdamW(groups, weight_decay=0.0),
            self._loss,
            self._n_steps,
            what=f"the thresholds of {WHAT}",
            settle=self._settle,
            state=state,
        ).run()

    def _settle(self, step: int) -> None:
        for one, _ in self._masked:
            one.value.clamp_(0.0, one.most)

    def _loss(self, step: int) -> Float[Tensor, ""]:
        outputs: dict[str, Callable[[Tensor], Tensor]] = {}
        for one, sublayer in self._masked:
            outputs |= sublayer.outputs(one.mask())
        with replaced_forwards(list(self._anatomy.linears), outputs):
            loss = ce_loss(self._anatomy, step_rows(self._tokens, BATCH, step))
        target = self._sparsity * min(1.0, step / (RISE * self._n_steps))
        return loss + augmented_lagrangian(mean_threshold(self.thresholds) - target, self._multipliers)


def mean_threshold(thresholds: Sequence[Threshold]) -> Float[Tensor, ""]:
    """Mean of thresholds, weighted by the parameters of their layers."""
    total = sum(one.n_weights for one in thresholds)
    return torch.stack([one.value * (one.n_weights / total) for one in thresholds]).sum()
