"""MaskLLM: 2 of 4 weights of each group, learned end to end by a Gumbel choice."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from secateur.pruners.calibration.gradient_kinds import Kind
from secateur.pruners.calibration.statistics import InputStatistics
from secateur.pruners.calibration.stream import stream_blocks
from secateur.pruners.learned.gumbel_choice import chosen_scores, pattern_masks, sampled_mask
from secateur.pruners.learned.masked_weights import masked_weights
from secateur.pruners.learned.training import (
    MaskTrainer,
    cosine_rate,
    named_generator,
    step_generator,
    step_rows,
    steps_over,
)
from secateur.pruners.learned.training_size import TrainingSize
from secateur.pruners.models.anatomy import Anatomy, Linear
from secateur.pruners.models.losses import ce_loss
from secateur.pruners.models.runner import in_fp32
from secateur.pruners.stores.saved_state import SavedState
from secateur.pruners.weights.method import LayerProblem
from secateur.pruners.weights.sparsegpt import sparsegpt

N_KEEP, GROUP = 2, 4

BATCH = 4
"""Windows a step; 256 there."""

PASSES, FEWEST_STEPS = 4, 100
"""Passes over the windows, and steps at least."""

SEED = 0


class MaskLLM(NamedTuple):
    """Settings of the released script for LLaMA-2 7B (``--mask-only``).

    Args:
        rate: largest learning rate of the logits: 5e-5 times the multiplier 10.
        lowest: share of it at the end of a cosine.
        decay: of the logits, decoupled.
        deviation: of the first logits.
        prior: strength of the prior mask, in their deviations.
        scales: factor of the logits at the start and at the end.
        temperatures: of the choice, likewise.
        norm_weight: of the squared norm of the kept weights, which falls to 0.
    """

    rate: float = 5e-4
    lowest: float = 0.1
    decay: float = 0.1
    deviation: float = 0.01
    prior: float = 3.0
    scales: tuple[float, float] = (1e2, 5e2)
    temperatures: tuple[float, float] = (4.0, 0.05)
    norm_weight: float = 1e-5


PUBLISHED = MaskLLM()


def maskllm(
    weight: Float[Tensor, "out in"],
    inputs: InputStatistics | None,
    generator: torch.Generator,
    *,
    gradients: Mapping[Kind, Float[Tensor, "out in"]] | None = None,
    windows: tuple[int, int] = (0, 0),  # unused
    dampening: float = 0.0,  # unused
) -> Float[Tensor, "out in"]:
    """The learned mask as scores, for ``group_size: 4`` and half of each group; see `learned_masks`.

    At other shares of a group, or without groups at another sparsity than one half, the order of the chances decides,
    which was not learned for that.

    Args:
        gradients: with the kind ``maskllm``.
    """
    assert gradients is not None, "collected where the table says that the metric needs them"
    return gradients["maskllm"].to(weight.device)


def learned_masks(
    anatomy: Anatomy, tokens: Int[Tensor, "windows length"], *, state: SavedState | None = None
) -> dict[str, Float[Tensor, "out in"]]:
    """Scores of all weights: above 1 for those that the learned 2:4 mask keeps.

    MaskLLM (Fang et al. 2024, arXiv 2409.17481): each group of four neighbouring inputs of a row has a logit for each
    of the six masks; ``L_CE(W * M) - lambda sum ||W * M||^2`` is minimised over the logits of all projections, with
    M a Gumbel-softmax mean of the masks whose temperature falls and whose logits' factor grows; the weights are
    frozen. The logits begin as noise, plus the overlap of each mask with SparseGPT's. The mask is the likeliest one.

    All of `MaskLLM` is as in the released script, which takes 2,000 steps of 256 windows of 4,096 tokens. Here there
    are 4 passes over the calibration windows by fours, and 100 steps at least: on `tiny` more of them, or larger ones,
    learn the windows by heart.

    Args:
        anatomy: the dense model; left as it was.
        tokens: calibration windows.
        state: to continue from.

    Raises:
        DivergedError: if the loss is not finite.
        ValueError: on inputs that are no multiple of 4.
    """
    check(anatomy)
    with in_fp32(anatomy.model):
        return _Choices(anatomy, tokens).train(state)


def check(anatomy: Anatomy) -> None:
    """Raise a ValueError on inputs that 4 does not divide."""
    for linear in anatomy.linears:
        if linear.in_features % GROUP:
            raise ValueError(
                f"Expected inputs in groups of {GROUP} for the metric maskllm, got {linear.in_features} at "
                f"{linear.name}. Take another metric."
            )


class _Choices:
    """Logits of all groups of a model."""

    def __init__(self, anatomy: Anatomy, tokens: Int[Tensor, "windows length"]) -> None:
        self._anatomy, self._tokens = anatomy, tokens
        self._linears = list(anatomy.linears)
        self._masks = pattern_masks(N_KEEP, GROUP).to(anatomy.embedding.weight.device)
        self._logits: dict[str, Tensor] = {}
        self._n_steps = steps_over(len(tokens), BATCH, PASSES, FEWEST_STEPS)
        with torch.no_grad():
            for part in stream_blocks(anatomy, tokens, inputs="gram"):
                for linear in part.block.linears:
                    self._logits[linear.name] = self._start(linear, part.inputs[linear.name])

    def _start(self, linear: Linear, inputs: InputStatistics) -> Tensor:
        """Noise, plus the overlap of each mask with SparseGPT's."""
        of = PUBLISHED
        kept = (
            sparsegpt(LayerProblem(linear.weight, inputs, group_size=GROUP, name=linear.name), [0.5])[0] != 0
        )
        generator = named_generator(SEED, linear.name)
        noise = of.deviation * torch.randn(linear.n_weights // GROUP, len(self._masks), generator=generator)
        logits = noise.to(linear.weight.device)
        overlap = kept.reshape(-1, GROUP).float() @ self._masks.T
        logits += (overlap - 1) * logits.std() * of.prior
        return logits.requires_grad_()

    def train(self, state: SavedState | None) -> dict[str, Tensor]:
        """Scores of the weights, from the trained logits."""
        of = PUBLISHED
        optimizer = torch.optim.AdamW(
            self._logits.values(),
            lr=of.rate,
            betas=(0.9, 0.95),
            eps=1e-5,
            weight_decay=of.decay,
        )
        MaskTrainer(
            self._logits,
            optimizer,
            self._loss,
            self._n_steps,
            what="the masks of the metric maskllm",
            rate=lambda step: cosine_rate(step, self._n_steps, of.lowest),
            clip=1.0,
            state=state,
        ).run()
        return {x.name: self._scores(x) for x in self._linears}

    def _scores(self, linear: Linear) -> Float[Tensor, "out in"]:
        logits = self._logits[linear.name].detach() * PUBLISHED.scales[1]
        return chosen_scores(logits, self._masks).reshape(linear.weight.shape)

    def _loss(self, step: int) -> Float[Tensor, ""]:
        of, part = PUBLISHED, step / self._n_steps
        scale = of.scales[0] + (of.scales[1] - of.scales[0]) * part
        temperature = of.temperatures[0] + (of.temperatures[1] - of.temperatures[0]) * part
        generator = step_generator(SEED, step, self._masks.device)
        masks = {
            x.name: sampled_mask(self._logits[x.name] * scale, self._masks, temperature, generator).reshape(
                x.weight.shape
            )
            for x in self._linears
        }
        norm = torch.stack([(x.weight * masks[x.name]).square().sum() for x in self._linears]).sum()
        with masked_weights(self._linears, {name: partial(_same, mask) for name, mask in masks.items()}):
            loss = ce_loss(self._anatomy, step_rows(self._tokens, BATCH, step))
        return loss - of.norm_weight * (1 - part) * norm


def _same(mask: Tensor) -> Tensor:
    return mask


def training_size(anatomy: Anatomy, windows: tuple[int, int]) -> TrainingSize:
    """Size of the training, see `MethodRow.training_path`."""
    linears = list(anatomy.linears)
    n_weights = sum(x.n_weights for x in linears)
    logits = n_weights // GROUP * 6
    gram = max(x.in_features for x in linears) ** 2
    # logits, gradients and two moments; noise and choices of a step; masks and masked weights
    n_values = 7 * logits + 3 * n_weights + gram
    steps = steps_over(windows[0], BATCH, PASSES, FEWEST_STEPS)
    return TrainingSize(steps, min(BATCH, windows[0]), windows[1], n_values)


def training_bytes(anatomy: Anatomy, length: int) -> int:
    """About the memory of `learned_masks` beyond the model, for windows of so many tokens."""
    return training_size(anatomy, (BATCH, length)).n_bytes(anatomy)
