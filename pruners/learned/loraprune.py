"""LoRAPrune: units pruned in steps while low-rank updates are tuned, by the updates' values and gradients alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from secateur.pruners.learned.low_rank import LowRank, TunedSublayer, cut_sublayers, update_values
from secateur.pruners.learned.masked_weights import replaced_forwards
from secateur.pruners.learned.training import MaskTrainer, step_rows, steps_over
from secateur.pruners.learned.training_size import TrainingSize
from secateur.pruners.models.anatomy import Anatomy
from secateur.pruners.models.check_kept import check_parts
from secateur.pruners.models.find_layout import find_layouts
from secateur.pruners.models.layout import BlockLayout, SublayerLayout
from secateur.pruners.models.losses import ce_loss
from secateur.pruners.models.placement import Placement
from secateur.pruners.models.runner import in_fp32
from secateur.pruners.recipes.allocation.allocate import allocate
from secateur.pruners.recipes.allocation.layers import RuleEvidence
from secateur.pruners.stores.saved_state import SavedState
from secateur.pruners.structure.knowledge import unit_layers
from secateur.pruners.structure.kprune import KeptNumbers

RANK, RATE = 8, 1e-4
"""Rank of the updates, and their largest learning rate, which decays linearly to 0."""

MEMORY = 0.9
"""Weight of the importance so far in its moving average."""

EVERY = 10
"""Steps from one pruning to the next."""

FLAT = 0.1
"""Share of the steps before the first pruning, and of those behind the last one."""

WHOLE_FIRST, WHOLE_LAST = 0.1, 1
"""Share of the blocks at the start, rounded down, and number of those at the end, that stay whole."""

BATCH = 4
"""Windows a step; 128 there."""

PASSES, FEWEST_STEPS = 4, 200
"""Passes over the windows, and steps at least; two passes over 2.5 million samples there."""

EPSILON = 1e-8
SEED = 0
WHAT = "the metric loraprune"


def loraprune(
    anatomy: Anatomy,
    layouts: Sequence[BlockLayout],
    tokens: Int[Tensor, "windows length"],
    sparsity: float,
    *,
    protected: Collection[str] = (),
    state: SavedState | None = None,
) -> tuple[tuple[KeptNumbers, ...], dict[str, Float[Tensor, "out _"]]]:
    """Kept units of each block, and tuned weights of all projections; the live model is left dense.

    LoRAPrune (Zhang et al. 2024, arXiv 2305.18403): low-rank updates of all projections are tuned by the
    cross-entropy, the weights are frozen. In each step the importance of every weight is ``|G (W + 2 B A)|`` with G
    from the updates alone, `LowRank.gradient`; it is summed over a unit in each projection, divided by the norm over
    the units, added up over the sub-layer's projections, and averaged over the steps (see `unit_importance`). Every
    tenth step the units of least importance of each sub-layer go for good, as many as a cubic schedule asks for, which
    is flat in the first and the last tenth of the steps. All sub-layers lose the same share, but those of the first
    tenth of the blocks and of the last block, which stay whole. At the end the updates are merged.

    All of this is the released code's; the paper squares the importance, and does not divide it by a norm. Differences
    from the code: KV groups in place of heads, each with all of its query heads; inputs of updates are not dropped out;
    the full number of units goes, where the code stops short of it; small batches and few steps, see `FEWEST_STEPS`.

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
    n_blocks = len(layouts)
    ends = {"skip_first": int(WHOLE_FIRST * n_blocks) / n_blocks, "skip_last": WHOLE_LAST / n_blocks}
    gone = allocate("uniform", layers, RuleEvidence(), sparsity, "structure", **ends)
    with in_fp32(anatomy.model):
        tuning = Tuning(anatomy, tokens, parts, gone)
        tuning.train(state)
        kept = [(one, tuning.kept(one)) for one in tuning.sublayers]
        found = [(one, units, one.cut(units)) for one, units in kept]
    return cut_sublayers(anatomy, found)


def check(anatomy: Anatomy) -> None:
    """Raise a ValueError on a family that can't be cut to units, or a model of one block, which stays whole."""
    check_parts(find_layouts(anatomy, experts=True), WHAT, experts=True)
    if len(anatomy.blocks) <= WHOLE_LAST:
        raise ValueError(
            f"Expected a model of more than {WHOLE_LAST} block for {WHAT}, which keeps the last one whole, got "
            f"{len(anatomy.blocks)}. Take another metric (`secateur list methods`)."
        )


def training_size(anatomy: Anatomy, windows: tuple[int, int]) -> TrainingSize:
    """Size of the training, see `MethodRow.training_path`."""
    parts = [part for layout in find_layouts(anatomy, experts=True) for part in layout.sublayers]
    steps = steps_over(windows[0], BATCH, PASSES, FEWEST_STEPS)
    return TrainingSize(steps, min(BATCH, windows[0]), windows[1], update_values(parts, RANK))


def unit_importance(one: TunedSublayer) -> Float[Tensor, " units"]:
    """Importance of each unit: sums of its weights' in each projection, over the norm of all units' sums, added up."""
    parts = [_in_projection(x, one.updates[x.linear.name], one.part.n_units) for x in one.part.placements]
    return torch.stack(parts).sum(0)


def _in_projection(placement: Placement, update: LowRank, n_units: int) -> Float[Tensor, " units"]:
    weights = (update.gradient * update.weight).abs()
    sums = placement.per_unit(weights.sum(1 - placement.axis), n_units)
    norm: Tensor = torch.linalg.vector_norm(sums)
    return sums / (norm + EPSILON)


def share_gone(step: int, n_steps: int) -> float:
    """Share of the units to remove that is gone in a step: a cubic between two flat ends (arXiv 1710.01878)."""
    part = (step - FLAT * n_steps) / (n_steps - 2 * FLAT * n_steps)
    return 1 - (1 - min(1.0, max(0.0, part))) ** 3


class Tuning:
    """Tuning of the updates of a model, and pruning meanwhile.

    Args:
        anatomy: the model, in float32.
        tokens: windows.
        parts: all sub-layers.
        gone: units that each loses in the end.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        tokens: Int[Tensor, "windows length"],
        parts: Sequence[SublayerLayout],
        gone: Sequence[int],
    ) -> None:
        self._anatomy, self._tokens = anatomy, tokens
        self._n_steps = steps_over(len(tokens), BATCH, PASSES, FEWEST_STEPS)
        self.sublayers = [TunedSublayer(part, RANK, SEED) for part in parts]
        self._gone = {part.name: n for part, n in zip(parts, gone, strict=True)}
        device = anatomy.embedding.weight.device
        self._importance = {part.name: torch.zeros(part.n_units, device=device) for part in parts}
        self.gates = {part.name: torch.ones(part.n_units, device=device) for part in parts}

    def train(self, state: SavedState | None) -> None:
        """Take all steps that are left."""
        updates = {name: factor for one in self.sublayers for name, factor in one.trained}
        kept = {f"importance {name}": x for name, x in self._importance.items()}
        kept |= {f"gates {name}": x for name, x in self.gates.items()}
        MaskTrainer(
            updates | kept,
            torch.optim.AdamW(updates.values(), lr=RATE, weight_decay=0.0),
            self._loss,
            self._n_steps,
            what=f"the updates of {WHAT}",
            rate=lambda step: 1 - step / self._n_steps,
            clip=1.0,
            observe=self._observe,
            state=state,
        ).run()

    def kept(self, one: TunedSublayer) -> tuple[int, ...]:
        """Numbers of the units that stay."""
        return tuple(self.gates[one.part.name].nonzero().flatten().tolist())

    def _loss(self, step: int) -> Float[Tensor, ""]:
        outputs: dict[str, Callable[[Tensor], Tensor]] = {}
        for one in self.sublayers:
            outputs |= one.outputs(self.gates[one.part.name])
        with replaced_forwards(list(self._anatomy.linears), outputs):
            return ce_loss(self._anatomy, step_rows(self._tokens, BATCH, step))

    def _observe(self, step: int) -> None:
        share = share_gone(step, self._n_steps)
        for one in self.sublayers:
            name = one.part.name
            if not self._gone[name]:
                continue
            importance = self._importance[name]
            importance.mul_(MEMORY).add_(unit_importance(one), alpha=1 - MEMORY)
            if step % EVERY == 0 or share == 1:
                self.prune(name, math.floor(self._gone[name] * share))

    def prune(self, name: str, n_gone: int) -> None:
        """Remove the least important units until so many are gone; those that are gone stay so."""
        gates = self.gates[name]
        order = torch.where(gates > 0, self._importance[name], -torch.inf).argsort(stable=True)
        gates[order[:n_gone]] = 0
