"""LoRAShear: crucial sub-layers kept, redundant units of the others faded out while low-rank updates are tuned."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from secateur.pruners.learned.low_rank import TunedSublayer, cut_sublayers, update_values
from secateur.pruners.learned.masked_weights import replaced_forwards
from secateur.pruners.learned.training import MaskTrainer, step_rows, steps_over
from secateur.pruners.learned.training_size import TrainingSize
from secateur.pruners.models.anatomy import Anatomy
from secateur.pruners.models.check_kept import check_parts
from secateur.pruners.models.find_layout import find_layouts
from secateur.pruners.models.layout import BlockLayout
from secateur.pruners.models.losses import ce_loss
from secateur.pruners.models.runner import in_fp32
from secateur.pruners.recipes.allocation.allocate import allocate
from secateur.pruners.recipes.allocation.layers import RuleEvidence
from secateur.pruners.stores.saved_state import SavedState
from secateur.pruners.structure.knowledge import unit_layers
from secateur.pruners.structure.kprune import KeptNumbers

RANK, RATE = 8, 1e-4
"""Rank of the updates, and their constant learning rate."""

CRUCIAL = 0.1
"""Share of the sub-layers that are kept whole."""

RATIOS = (0.25, 0.5)
"""Shares of a sub-layer's units without which its knowledge is measured."""

WARMUP, PERIODS = 0.1, 10
"""Share of the steps before the first period, and number of periods."""

BATCH = 4
"""Windows a step."""

PASSES, FEWEST_STEPS = 4, 200
"""Passes over the windows, and steps at least."""

EPSILON = 1e-8
SEED = 0
WHAT = "the metric lorashear"

IMPORTANT, REDUNDANT, GONE = 0.0, 1.0, 2.0
"""States of a unit."""


def lorashear(
    anatomy: Anatomy,
    layouts: Sequence[BlockLayout],
    tokens: Int[Tensor, "windows length"],
    sparsity: float,
    *,
    protected: Collection[str] = (),
    state: SavedState | None = None,
) -> tuple[tuple[KeptNumbers, ...], dict[str, Float[Tensor, "out _"]]]:
    """Kept units of each block, and tuned weights of all projections; the live model is left dense.

    LoRAShear (Chen et al. 2023, arXiv 2310.18356). First the rise of the cross-entropy is measured without a share of
    the units of one sub-layer at a time (algorithm 3); the sub-layers where it is largest are kept whole. Then
    low-rank updates of all projections are tuned, at first alone, then in periods (algorithm 4, LHSPG): at the
    beginning of each the least salient units of all sub-layers together become redundant, as many as bring the
    budget on by an equal part; over the period their rows of the weights, biases and updates fade to 0 along a line,
    while the updates of the others take over what they knew. The saliency is `saliency`, and the fading that of the
    released optimizer, which stands for the paper's penalty and half-space projection.

    [INFER] The paper leaves open: the share of crucial sub-layers, the shares and the order by magnitude that they are
    measured with, the rank's scale, the learning rate, the number of periods, and the equal weights of the saliency's
    parts. Differences: KV groups in place of heads; the budget is of parameters in place of units; a few steps, see
    `FEWEST_STEPS`. Its dynamic recovery is the stage after it, ``recover``.

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
    training_size(anatomy, (len(tokens), tokens.shape[1])).check(anatomy, f"the training of {WHAT}")
    layers = unit_layers(parts, protected)
    allocate("global", layers, RuleEvidence(), sparsity, "structure")  # raises what training could not mend
    with in_fp32(anatomy.model):
        sublayers = [TunedSublayer(part, RANK, SEED) for part in parts]
        free = [one for one, layer in zip(sublayers, layers, strict=True) if layer.n_free]
        crucial = crucial_sublayers(anatomy, tokens, free)
        whole = {*protected, *(name for one in crucial for name in one.updates)}
        fading = Fading(anatomy, tokens, sublayers, sparsity, whole)
        fading.train(state)
        kept = [(one, fading.kept(one)) for one in sublayers]
        found = [(one, units, one.cut(units)) for one, units in kept]
    return cut_sublayers(anatomy, found)


def check(anatomy: Anatomy) -> None:
    """Raise a ValueError on a family that can't be cut to units."""
    check_parts(find_layouts(anatomy, experts=True), WHAT, experts=True)


def training_size(anatomy: Anatomy, windows: tuple[int, int]) -> TrainingSize:
    """Size of the training, see `MethodRow.training_path`."""
    parts = [part for layout in find_layouts(anatomy, experts=True) for part in layout.sublayers]
    steps = steps_over(windows[0], BATCH, PASSES, FEWEST_STEPS)
    return TrainingSize(steps, min(BATCH, windows[0]), windows[1], update_values(parts, RANK))


@torch.no_grad()
def crucial_sublayers(
    anatomy: Anatomy, tokens: Int[Tensor, "windows length"], sublayers: Sequence[TunedSublayer]
) -> list[TunedSublayer]:
    """Sub-layers without whose smallest units the loss is highest, a tenth of all, rounded to the nearest number."""

    def loss(outputs: Mapping[str, Callable[[Tensor], Tensor]]) -> float:
        with replaced_forwards(list(anatomy.linears), outputs):
            return sum(float(ce_loss(anatomy, rows)) * len(rows) for rows in tokens.split(BATCH)) / len(
                tokens
            )

    def without(one: TunedSublayer, ratio: float) -> float:
        gates = torch.ones(one.part.n_units, device=anatomy.embedding.weight.device)
        smallest = proxies(one)["magnitude"].argsort(stable=True)[: int(ratio * one.part.n_units)]
        gates[smallest] = 0
        return loss(one.outputs(gates))

    n_crucial = round(CRUCIAL * len(sublayers))
    losses = [math.fsum(without(one, ratio) for ratio in RATIOS) if n_crucial else 0.0 for one in sublayers]
    order = sorted(range(len(sublayers)), key=lambda index: (-losses[index], index))
    return [sublayers[index] for index in order[:n_crucial]]


def proxies(
    one: TunedSublayer, factors: Float[Tensor, " units"] | None = None
) -> dict[str, Float[Tensor, " units"]]:
    """Measures of the units' saliency, over their rows W of the weights and B A of the updates.

    ``magnitude``: ``||W||``; ``cosine``: one plus the cosine of W and B A; ``taylor_1``: ``|<W, B A>|``, as the update
    is a step against the gradient; ``taylor_2``: half of its square. As in the released code, columns of the output
    projection do not count.

    Args:
        factors: of the rows of W; None: 1.
    """
    n_units = one.part.n_units
    sums = []
    for placement in one.part.placements:
        if placement.axis == 0:
            update = one.updates[placement.linear.name]
            rows, change = placement.linear.weight, update.left.detach() @ update.right.detach()
            if factors is not None:
                rows = rows * placement.per_entry(factors)[:, None]
            entries = (rows.square().sum(1), change.square().sum(1), (rows * change).sum(1))
            sums.append(torch.stack([placement.per_unit(x, n_units) for x in entries]))
    weights, updates, products = torch.stack(sums).sum(0)
    cosine = products / (weights.sqrt() + EPSILON) / (updates.sqrt() + EPSILON) + 1
    return {
        "magnitude": weights.sqrt(),
        "cosine": cosine,
        "taylor_1": products.abs(),
        "taylor_2": products.square() / 2,
    }


def saliency(found: Sequence[Mapping[str, Float[Tensor, " _"]]]) -> list[Float[Tensor, " _"]]:
    """Saliency of the units of each sub-layer: each proxy over its norm over all sub-layers, a mean of these."""
    names = list(found[0])
    norms = {name: torch.cat([one[name] for one in found]).square().sum().sqrt() + EPSILON for name in names}
    return [torch.stack([one[name] / norms[name] for name in names]).mean(0) for one in found]


class Fading:
    """Tuning of the updates of a model, while redundant units fade.

    Args:
        anatomy: the model, in float32.
        tokens: windows.
        sublayers: all.
        sparsity: target.
        whole: names of projections whose sub-layers lose nothing.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        tokens: Int[Tensor, "windows length"],
        sublayers: Sequence[TunedSublayer],
        sparsity: float,
        whole: Collection[str],
    ) -> None:
        self._anatomy, self._tokens, self._sublayers = anatomy, tokens, sublayers
        self._sparsity, self._whole = sparsity, whole
        self._n_steps = steps_over(len(tokens), BATCH, PASSES, FEWEST_STEPS)
        self._start = round(WARMUP * self._n_steps)
        self._period = (self._n_steps - self._start) // PERIODS
        device = anatomy.embedding.weight.device
        self.factors = {x.part.name: torch.ones(x.part.n_units, device=device) for x in sublayers}
        self._states = {x.part.name: torch.full_like(self.factors[x.part.name], IMPORTANT) for x in sublayers}
        layers = unit_layers([x.part for x in sublayers], whole)
        allocate("global", layers, RuleEvidence(), sparsity, "structure")
        self.free = [one for one, layer in zip(sublayers, layers, strict=True) if layer.n_free]

    def train(self, state: SavedState | None) -> None:
        """Take all steps that are left."""
        updates = {name: factor for one in self._sublayers for name, factor in one.trained}
        kept = {f"factors {name}": x for name, x in self.factors.items()}
        kept |= {f"states {name}": x for name, x in self._states.items()}
        MaskTrainer(
            updates | kept,
            torch.optim.AdamW(updates.values(), lr=RATE, weight_decay=0.0),
            self._loss,
            self._n_steps,
            what=f"the updates of {WHAT}",
            clip=1.0,
            observe=self._observe,
            settle=self.settle,
            state=state,
        ).run()

    def kept(self, one: TunedSublayer) -> tuple[int, ...]:
        """Numbers of the units that stay."""
        return tuple((self._states[one.part.name] == IMPORTANT).nonzero().flatten().tolist())

    def _loss(self, step: int) -> Float[Tensor, ""]:
        outputs: dict[str, Callable[[Tensor], Tensor]] = {}
        for one in self._sublayers:
            for placement in one.part.placements:
                update = one.updates[placement.linear.name]
                factors = None if placement.axis else placement.per_entry(self.factors[one.part.name])
                outputs[placement.linear.name] = partial(update.outputs, factors=factors)
        with replaced_forwards(list(self._anatomy.linears), outputs):
            return ce_loss(self._anatomy, step_rows(self._tokens, BATCH, step))

    def _observe(self, step: int) -> None:
        """Choose redundant units where a period begins."""
        period, place = divmod(step - self._start, self._period)
        if 0 <= period < PERIODS and place == 0:
            self._choose(self._sparsity * (period + 1) / PERIODS)

    def _choose(self, share: float) -> None:
        found = saliency([proxies(one, self.factors[one.part.name]) for one in self.free])
        scores = {one.part.name: score for one, score in zip(self.free, found, strict=True)}
        for name, score in scores.items():
            self._states[name][self._states[name] == REDUNDANT] = GONE
            scores[name] = torch.where(self._states[name] == GONE, -1.0, score)  # no saliency is below 0
        layers = unit_layers([x.part for x in self._sublayers], self._whole, scores)
        gone = allocate("global", layers, RuleEvidence(), share, "structure")
        for one, n_gone in zip(self._sublayers, gone, strict=True):
            if n_gone:
                state = self._states[one.part.name]
                lowest = scores[one.part.name].argsort(stable=True)[:n_gone]
                state[lowest] = torch.where(state[lowest] == GONE, GONE, REDUNDANT)

    def settle(self, step: int) -> None:
        """Fade the redundant units by the step before, and hold what is gone at 0."""
        period, place = divmod(step - 1 - self._start, self._period)
        left = self._period - place
        fade = (left - 1) / left if period < PERIODS else 0.0
        for one in self.free:
            state, factors = self._states[one.part.name], self.factors[one.part.name]
            by = torch.where(state == REDUNDANT, fade, 1.0).masked_fill(state == GONE, 0.0)
            factors.mul_(by)
            for placement in one.part.placements:
                if placement.axis == 0:
                    one.updates[placement.linear.name].left.mul_(placement.per_entry(by)[:, None])
