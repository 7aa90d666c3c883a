"""BESA: the share that each projection loses, learned by gradients block by block."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from secateur.pruners.learned.masked_weights import masked_weights
from secateur.pruners.learned.prodigy import Prodigy
from secateur.pruners.learned.sorted_share import SortedShare
from secateur.pruners.learned.training import MaskTrainer, steps_over
from secateur.pruners.learned.training_size import TrainingSize
from secateur.pruners.models.anatomy import Anatomy, Block, Linear
from secateur.pruners.models.runner import BlockInputs, BlockRunner, in_fp32
from secateur.pruners.recipes.allocation.filling import to_budget
from secateur.pruners.recipes.allocation.layers import Ints, Layer, RuleEvidence
from secateur.pruners.recipes.context import Sample

BATCH = 16
"""Windows a step."""

FEWEST_STEPS = 32
"""Least number of training steps of a block: Prodigy's step size grows from next to nothing in the first ones."""


class Penalty(NamedTuple):
    """Settings of a block's training.

    Args:
        sparsity: that the block is drawn to.
        beta: weight of the squared relative distance from it.
        d_coef: factor of Prodigy's step size.
        n_passes: over the windows.
        smooth: see `SortedShare`.
    """

    sparsity: float
    beta: float
    d_coef: float
    n_passes: int
    smooth: bool


def besa(
    layers: Sequence[Layer],
    evidence: RuleEvidence,
    sparsity: float,
    *,
    besa_beta: float,
    besa_d_coef: float,
    besa_passes: float,
    besa_softmax: str,
) -> Ints:
    """Learned shares, all scaled by one factor where they miss the budget.

    Args:
        evidence: with `learned_shares`, whose parameters these are.
    """
    return to_budget(layers, np.clip(evidence.measured, 0.0, 1.0), sparsity)


def learned_shares(
    anatomy: Anatomy,
    sample: Sample,
    *,
    sparsity: float,
    besa_beta: float,
    besa_d_coef: float,
    besa_passes: float,
    besa_softmax: str,
) -> tuple[float, ...]:
    """Share of each projection that BESA learns, from the first block up.

    BESA (Xu et al. 2024, arXiv 2402.16880). Of each block `relative_error` of its masked output, plus
    ``beta ((s - sparsity) / sparsity)^2`` with s the removed share of the block, is minimised over the logits of its
    projections' shares by Prodigy, on batches of 16 windows. Ranks are Wanda's in the block's
    input in the model pruned below; the target is the dense block's output in the dense model. This is the released
    code's layer-wise setting, with its beta: all rows of a projection lose the same share, where the paper's main
    tables have a share a row. Shares of finished blocks are kept in the cache, and a killed run goes on behind them.

    Args:
        sparsity: that every block is drawn to.
        besa_beta: weight of the penalty.
        besa_d_coef: factor of Prodigy's step size; there chosen for each model from 0.05 to 50, here for `tiny`.
        besa_passes: over the windows, and `FEWEST_STEPS` at least; there one over 128, which is 8 steps.
        besa_softmax: ``plain``, the paper's; or of ``sigmoid``, the released code's, which reaches shares from about
            0.38 to 0.62 alone.

    Returns:
        A share a projection, in the order of `Anatomy.linears`.

    Raises:
        DivergedError: if a loss is not finite.
        ValueError: on too little memory.
    """
    windows = len(sample.tokens), sample.tokens.shape[1]
    size = training_size(anatomy, windows, besa_passes=besa_passes)
    what = "the shares of a block, learned by the rule besa"
    size.check(anatomy, what, "Use fewer or shorter windows, or another rule (`secateur list methods`).")
    penalty = Penalty(sparsity, besa_beta, besa_d_coef, int(besa_passes), besa_softmax == "sigmoid")
    state = sample.statistics.state("besa-" + "-".join(f"{x:g}" for x in penalty))
    known = state.load().get("shares", torch.zeros(0)).tolist()
    shares: list[float] = []
    with in_fp32(anatomy.model):
        runner = BlockRunner(anatomy)
        batches = [runner.start(rows) for rows in sample.tokens.split(BATCH)]
        dense = pruned = [batch.hidden for batch in batches]
        for block in anatomy.blocks:
            learner = BlockShares(runner, block, batches, pruned, smooth=penalty.smooth)
            targets = [runner.block(block.index, x, it) for x, it in zip(dense, batches, strict=True)]
            found = known[len(shares) :][: len(block.linears)]
            if not found:
                found = learner.train(targets, penalty)
                state.save({"shares": torch.tensor([*shares, *found], dtype=torch.float64)})
            shares += found
            dense, pruned = targets, learner.outputs(found)
    return tuple(shares)


def training_size(
    anatomy: Anatomy, windows: tuple[int, int], *, besa_passes: float | int, **parameters: Any
) -> TrainingSize:
    """Size of the training, see `MethodRow.training_path`."""
    n_windows, length = windows
    n_weights = max(sum(x.n_weights for x in block.linears) for block in anatomy.blocks)
    order = 2 * n_weights  # places of the weights, in 8 bytes each
    states = 4 * n_windows * length * anatomy.width  # in and out, dense and pruned
    return TrainingSize(
        steps_over(n_windows, BATCH, int(besa_passes), FEWEST_STEPS),
        min(BATCH, n_windows),
        length,
        order + 4 * n_weights + states,
        n_blocks=len(anatomy.blocks),
    )


class BlockShares:
    """Shares of a block's projections, to be learned.

    Args:
        runner: of the dense model.
        block: the block.
        batches: further arguments of the blocks.
        hidden: the block's input in the model that is pruned below, by batch.
        smooth: see `SortedShare`.
    """

    def __init__(
        self,
        runner: BlockRunner,
        block: Block,
        batches: Sequence[BlockInputs],
        hidden: Sequence[Float[Tensor, "batch length width"]],
        *,
        smooth: bool,
    ) -> None:
        self._runner, self._block, self._batches, self._hidden = runner, block, batches, hidden
        norms = self._input_norms()
        self.of = {
            x.name: SortedShare(x.weight.float().abs() * norms[x.name], smooth=smooth) for x in block.linears
        }

    def _input_norms(self) -> dict[str, Float[Tensor, " in"]]:
        squares: dict[str, Tensor] = {}

        def watch(linear: Linear) -> RemovableHandle:
            def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                total = args[0].detach().square().flatten(0, -2).sum(0)
                squares[linear.name] = squares.get(linear.name, torch.zeros_like(total)) + total

            return linear.module.register_forward_pre_hook(add)

        with ExitStack() as hooks:
            for linear in self._block.linears:
                hooks.callback(watch(linear).remove)
            for x, batch in zip(self._hidden, self._batches, strict=True):
                self._runner.block(self._block.index, x, batch)
        unseen = {
            x.name: x.weight.new_zeros(x.in_features).float() for x in self._block.linears
        }  # of idle experts
        return unseen | {name: total.sqrt() for name, total in squares.items()}

    def train(self, targets: Sequence[Float[Tensor, "batch length width"]], penalty: Penalty) -> list[float]:
        """Learned share of each projection, whose masked outputs are near the targets."""
        total = sum(x.n_weights for x in self._block.linears)

        def loss(step: int) -> Float[Tensor, ""]:
            number = step % len(self._batches)
            with masked_weights(self._block.linears, {name: one.mask for name, one in self.of.items()}):
                output = self._runner.graph(self._block.index, self._hidden[number], self._batches[number])
            parts = [self.of[x.name].share * (x.n_weights / total) for x in self._block.linears]
            missing = (torch.stack(parts).sum() - penalty.sparsity) / penalty.sparsity
            return relative_error(output, targets[number]) + penalty.beta * missing.square()

        trained = {name: one.logits for name, one in self.of.items()}
        MaskTrainer(
            trained,
            Prodigy(trained.values(), penalty.d_coef),
            loss,
            steps_over(len(self._batches), 1, penalty.n_passes, FEWEST_STEPS),
            what=f"the shares of {self._block.name}",
        ).run()
        return [float(self.of[x.name].share.detach()) for x in self._block.linears]

    def outputs(self, shares: Sequence[float]) -> list[Float[Tensor, "batch length width"]]:
        """The block's outputs with masks of these shares, by batch."""
        masks = {
            x.name: partial(self.of[x.name].hard, share)
            for x, share in zip(self._block.linears, shares, strict=True)
        }
        with masked_weights(self._block.linears, masks):
            return [
                self._runner.block(self._block.index, x, batch)
                for x, batch in zip(self._hidden, self._batches, strict=True)
            ]


def relative_error(
    output: Float[Tensor, "batch length width"], target: Float[Tensor, "batch length width"]
) -> Float[Tensor, ""]:
    """Squared error of each feature over the feature's squared norm in the target, a mean over the features."""
    error, size = (x.square().sum((0, 1)) for x in (target - output, target))
    return (error / size).mean()
