"""APT: units pruned by outlier-aware salience while low-rank updates are tuned, whose ranks grow where it matters."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from secateur.pruners.learned.low_rank import (
    QUERIES_AND_VALUES,
    SCALE,
    GatedSublayers,
    cut_sublayers,
    grown_ranks,
    update_values,
)
from secateur.pruners.learned.masked_weights import replaced_forwards
from secateur.pruners.learned.outlier_salience import Seen, salience, watched
from secateur.pruners.learned.self_distillation import LowestLoss, Transformation, block_outputs, layer_loss
from secateur.pruners.learned.training import (
    MaskTrainer,
    named_generator,
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
from secateur.pruners.models.losses import ce_loss, head_inputs, kl_loss
from secateur.pruners.models.runner import in_fp32
from secateur.pruners.recipes.allocation.allocate import allocate
from secateur.pruners.recipes.allocation.layers import RuleEvidence
from secateur.pruners.stores.saved_state import SavedState
from secateur.pruners.structure.knowledge import unit_layers
from secateur.pruners.structure.kprune import KeptNumbers

RANK, MOST_RANK, EXPANSION = 8, 64, 4
"""First rank of the updates, their largest rank, and the numbers in all of them at the end over those at first."""

RATE, WARMUP = 1e-4, 0.03
"""Largest learning rate, and share of the steps in which it rises, before it falls along half a cosine."""

MEMORY = 0.85
"""Weight of the salience so far in its moving average, of units and of updates."""

PRUNING, DISTILLING = 1 / 3, 2 / 3
"""Shares of the steps, from the first one, in which units go, and in which the teacher counts."""

FADING = 0.1
"""Share of the pruning steps in which a unit's gate falls from 1 to 0; ours: 100 steps of 0.01 of many more there."""

ADJUSTMENTS = 16
"""Times that ranks grow while units go."""

PREDICTION, LAYERS = 1.0, 0.9
"""Weights in the teacher's loss: of the divergence of predictions, and of the distance of blocks' outputs."""

BATCH = 4
"""Windows a step; 32 there."""

PASSES, FEWEST_STEPS = 4, 200
"""Passes over the windows, and steps at least; 15 passes over 52,000 samples there."""

SEED = 0
WHAT = "the metric apt"


def apt(
    anatomy: Anatomy,
    layouts: Sequence[BlockLayout],
    tokens: Int[Tensor, "windows length"],
    sparsity: float,
    *,
    protected: Collection[str] = (),
    state: SavedState | None = None,
) -> tuple[tuple[KeptNumbers, ...], dict[str, Float[Tensor, "out _"]]]:
    """Kept units of each block, and tuned weights of queries and values; the live model is left dense.

    APT, Adaptive Pruning and Tuning (Zhao et al. 2024, arXiv 2401.12200), by its algorithm 1 and the released script
    for LLaMA 2. Low-rank updates of queries and values are tuned, all weights are frozen. In the first third of the
    steps the units of the lowest salience over their parameters are chosen in each step, of all sub-layers together,
    as many as a budget asks for that grows by a cubic schedule (see `salience`, averaged over the steps); gates of
    chosen units fall, those of the others rise, and at the end of the third they are 0 or 1 for good. Sixteen times
    meanwhile the more important half of the updates grows in rank (see `grown_ranks`), and the student as it is then
    becomes the teacher if its cross-entropy since the time before is the lowest so far. The loss is
    ``mu L_distill + (1 - mu) L_ce``; mu rises from 0 to 1 in the first third, stays so in the second, in the last
    there is no teacher. L_distill is the KL divergence from the teacher's predictions and `layer_loss` through one
    low-rank transformation, at first the identity. At the end updates are merged.

    Differences: KV groups in place of heads, and no hidden channels, so that all layers keep the stream's width; a
    group stays in the first attention. The budget is of parameters at every step. The KL divergence is a mean over
    positions, at a temperature of 1; the teacher is judged by the windows of the steps in place of an evaluation.
    Moments of the optimizer are kept when ranks grow, with 0 for what is new, where the code makes a new one; rows of
    updates that belong to units that are gone count as others do. No units go before the tuning. Few steps, see
    `FEWEST_STEPS` and `FADING`; windows of the calibration text in place of instructions.

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
    allocate("global", unit_layers(parts, protected), RuleEvidence(), sparsity, "structure")  # may refuse
    training_size(anatomy, (len(tokens), tokens.shape[1])).check(anatomy, f"the training of {WHAT}")
    with in_fp32(anatomy.model):
        tuning = AdaptiveTuning(anatomy, tokens, parts, sparsity, protected)
        tuning.train(state)
        kept = [(one, tuning.student.kept(one)) for one in tuning.student.sublayers]
        found = [(one, units, one.cut(units)) for one, units in kept]
    return cut_sublayers(anatomy, found)


def check(anatomy: Anatomy) -> None:
    """Raise a ValueError on a family that can't be cut to units."""
    check_parts(find_layouts(anatomy, experts=True), WHAT, experts=True)


def training_size(anatomy: Anatomy, windows: tuple[int, int]) -> TrainingSize:
    """Size of the training, see `MethodRow.training_path`."""
    parts = [part for layout in find_layouts(anatomy, experts=True) for part in layout.sublayers]
    n_values = update_values(parts, (EXPANSION + 1) * RANK, QUERIES_AND_VALUES)  # the teacher's, too
    n_values += 2 * len(anatomy.blocks) * BATCH * windows[1] * anatomy.width  # outputs of blocks, both states
    steps = steps_over(windows[0], BATCH, PASSES, FEWEST_STEPS)
    return TrainingSize(steps, min(BATCH, windows[0]), windows[1], n_values, teacher=True)


def share_gone(part: float) -> float:
    """Share of the units to remove that is chosen in a part of the pruning steps: a cubic."""
    return 1 - (1 - min(1.0, part)) ** 3


class AdaptiveTuning:
    """Tuning of a model's updates, while units go and ranks grow.

    Args:
        anatomy: the model, in float32.
        tokens: windows.
        parts: all sub-layers.
        sparsity: target.
        protected: names of projections whose sub-layers lose nothing.

    Attributes:
        student: updates and gates as they are.
        teacher: those of the student that counts as the teacher.
        salience: of the units of each sub-layer, averaged over the steps.
        course: cross-entropies since the last adjustment.
        transformation: of the student's states where they are compared with the teacher's.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        tokens: Int[Tensor, "windows length"],
        parts: Sequence[SublayerLayout],
        sparsity: float,
        protected: Collection[str],
    ) -> None:
        self._anatomy, self._tokens, self._parts = anatomy, tokens, parts
        self._sparsity, self._protected = sparsity, protected
        self._n_steps = steps_over(len(tokens), BATCH, PASSES, FEWEST_STEPS)
        self._n_pruning = max(1, int(PRUNING * self._n_steps))
        device = anatomy.embedding.weight.device
        self.student, self.teacher = self._gated(device), self._gated(device)
        self._n_values = sum(update.n_values for update in self.student.updates.values())
        self.salience = {part.name: torch.zeros(part.n_units, device=device) for part in parts}
        self._importance = {name: torch.zeros((), device=device) for name in self.student.updates}
        self.course = LowestLoss(device)
        start = named_generator(SEED, "transformation")
        self.transformation = Transformation(anatomy.width, RANK, SCALE, start, device)
        self._seen: dict[str, Seen] = {}
        trained = [*self.student.trained.values(), self.transformation.left, self.transformation.right]
        self._optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)

    def _gated(self, device: torch.device) -> GatedSublayers:
        return GatedSublayers(self._parts, RANK, SEED, device, roles=QUERIES_AND_VALUES)

    def train(self, state: SavedState | None) -> None:
        """Take all steps that are left."""
        held = dict(self.student.trained)
        held |= {
            "transformation left": self.transformation.left,
            "transformation right": self.transformation.right,
        }
        held |= {f"teacher {name}": x.requires_grad_(False) for name, x in self.teacher.trained.items()}
        named = {"gates": self.student.gates, "teacher gates": self.teacher.gates}
        named |= {"salience": self.salience, "importance": self._importance}
        held |= {f"{kind} {name}": x for kind, tensors in named.items() for name, x in tensors.items()}
        MaskTrainer(
            held | {"course": self.course.values},
            self._optimizer,
            self.loss,
            self._n_steps,
            what=f"the updates of {WHAT}",
            rate=lambda step: warmed_cosine_rate(step, self._n_steps, WARMUP, 0.0),
            clip=1.0,
            observe=self._observe,
            settle=self.adjust,
            state=state,
        ).run()

    def mu(self, step: int) -> float:
        """Weight of the teacher's loss in a step."""
        if step >= int(DISTILLING * self._n_steps):
            return 0.0
        return min(1.0, step / self._n_pruning)

    def loss(self, step: int) -> Float[Tensor, ""]:
        """Loss of a step; in pruning steps its backward pass notes what the salience takes."""
        rows, mu, linears = step_rows(self._tokens, BATCH, step), self.mu(step), list(self._anatomy.linears)
        outputs = self.student.outputs()
        if step < self._n_pruning:
            for name in (part.output.name for part in self._parts):
                outputs[name] = watched(outputs[name], partial(self._seen.__setitem__, name))
        with replaced_forwards(linears, outputs):
            if not mu:
                return self.course.note(ce_loss(self._anatomy, rows))
            with block_outputs(self._anatomy) as student:
                states = head_inputs(self._anatomy, rows)
        with (
            torch.no_grad(),
            replaced_forwards(linears, self.teacher.outputs()),
            block_outputs(self._anatomy) as teacher,
        ):
            wanted = head_inputs(self._anatomy, rows)
        generator = step_generator(SEED, step, torch.device("cpu"))
        predictions = kl_loss(self._anatomy, rows, self._anatomy, wanted, states)
        layers = layer_loss(student, teacher, self._blocks_left(), self.transformation.outputs, generator)
        loss = mu * (PREDICTION * predictions + LAYERS * layers)
        if mu < 1:
            loss = loss + (1 - mu) * self.course.note(ce_loss(self._anatomy, rows, states))
        return loss

    def _blocks_left(self) -> list[bool]:
        found = [True] * len(self._anatomy.blocks)
        for part in self._parts:
            found[part.output.block] &= bool(self.student.gates[part.name].any())
        return found

    def _observe(self, step: int) -> None:
        """Average the salience of this step, and move the gates."""
        if step >= self._n_pruning:
            return
        for name, update in self.student.updates.items():
            assert update.left.grad is not None, "after a backward pass"
            self._importance[name].lerp_((update.left * update.left.grad).abs().sum(), 1 - MEMORY)
        for part in self._parts:
            seen, gates = self._seen[part.output.name], self.student.gates[part.name]
            gated = seen._replace(means=seen.means * gates.repeat_interleave(part.unit_width))
            self.salience[part.name].lerp_(salience(gated, part.output.weight, part.n_units), 1 - MEMORY)
        self.choose((step + 1) / self._n_pruning)

    def choose(self, part: float) -> None:
        """Move the gates towards the units that stay by now, at this part of the pruning steps; at 1 to the end."""
        layers = unit_layers(self._parts, self._protected, self.salience)
        share = self._sparsity * share_gone(part)
        gone = allocate("global", layers, RuleEvidence(), share, "structure", cost=-1.0)
        fall = min(1.0, 1 / (FADING * self._n_pruning)) if part < 1 else 1.0
        for x, n_gone in zip(self._parts, gone, strict=True):
            change = torch.full_like(self.student.gates[x.name], fall)
            change[self.salience[x.name].argsort(stable=True)[:n_gone]] = -fall
            self.student.gates[x.name].add_(change).clamp_(0, 1)

    def adjust(self, step: int) -> None:
        """Renew the teacher and raise ranks, where another of the adjustments is due after so many steps."""
        due, before = (ADJUSTMENTS * x // self._n_pruning for x in (step, step - 1))
        if step > self._n_pruning or due == before:
            return
        if self.course.look():
            self.teacher.become(self.student)
        n_values = self._n_values * (1 + (EXPANSION - 1) * due / ADJUSTMENTS)
        importance = {name: float(x) for name, x in self._importance.items()}
        for name, rank in grown_ranks(self.student.updates, importance, n_values, MOST_RANK).items():
            self.student.updates[name].grow(rank, self._optimizer)
        for x in self._importance.values():
            x.zero_()
