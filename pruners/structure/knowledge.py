"""K-prune: choice and reconstruction of sub-layers from the first up, by the knowledge that each unit carries."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from secateur.pruners.calibration.backward import CHUNK_TOKENS, backward_blocks, head_gradient
from secateur.pruners.calibration.stream import Walk
from secateur.pruners.models.anatomy import Anatomy, Linear, Sublayer
from secateur.pruners.models.cutting import LiveSublayer
from secateur.pruners.models.find_layout import find_layouts
from secateur.pruners.models.layout import BlockLayout, SublayerLayout
from secateur.pruners.models.runner import BlockInputs, BlockRunner
from secateur.pruners.recipes.allocation.layers import Layer, RuleEvidence, kind_of
from secateur.pruners.recipes.allocation.threshold import one_threshold
from secateur.pruners.structure.kprune import KeptNumbers, check_stream, dense_targets, fit_sublayer, rows

TEMPERATURE, PREDICTIVE, REPRESENTATIONAL, HEADS = 2.0, 1.0, 2.5e-4, 64.0
"""Defaults of the released script: T, lambda_pred, lambda_rep and mu."""


@torch.no_grad()
def kprune(
    anatomy: Anatomy,
    layouts: Sequence[BlockLayout],
    tokens: Int[Tensor, "windows length"],
    sparsity: float,
    *,
    protected: Collection[str] = (),
) -> tuple[tuple[KeptNumbers, ...], dict[str, Float[Tensor, "out _"]]]:
    """Kept units of each block, and new weights of the output projections; the live model is left dense.

    K-prune (Park et al. 2024, arXiv 2308.03449). From the first sub-layer up: the knowledge of all units from there on
    is measured in the model that is pruned so far (see `knowledge`), the threshold that meets the rest of the budget
    is set over all of them, the sub-layer alone is cut there, and its output projection is fitted to the dense
    model's stream (see `kprune.reconstructed`).

    Differences from the paper: decoders in place of encoders; the budget is of parameters, and the knowledge is
    divided by them, in place of FLOPs; whole KV groups, whose score is mu times the sum of their heads'. Routed experts
    and what has no units stay. [INFER] The
    divergence is the mean over a window's tokens where there a sample has one label.

    Args:
        anatomy: the dense model, of a family that adds the outputs of its projections to the stream as they are.
        layouts: of its blocks.
        tokens: calibration windows.
        sparsity: share of the blocks' parameters to remove.
        protected: full names of projections whose sub-layers are kept whole.

    Raises:
        BudgetError: if less may go.
        ValueError: as `kprune.reconstructed`, or if a gradient is not finite.
    """
    teacher = Teacher(anatomy, tokens)
    dense, pruned = Walk(anatomy, tokens), Walk(anatomy, tokens)
    left = [part for layout in layouts for part in layout.sublayers]
    missing = sparsity * sum(_n_params(part) for part in left)
    chosen: list[dict[Sublayer, tuple[int, ...]]] = [{} for _ in layouts]
    found: dict[str, Tensor] = {}
    live: list[LiveSublayer] = []
    try:
        for layout, numbers in zip(layouts, chosen, strict=True):
            wanted = dense_targets(dense, layout)
            stream = rows(pruned.hidden)
            for part in layout.sublayers:
                scores = knowledge(teacher, left)
                kept, removed = _cut_here(left, scores, missing, protected)
                numbers[part.kind], missing, left = kept, missing - removed, left[1:]
                live.append(LiveSublayer(part))
                weight, stream = fit_sublayer(pruned, layout, live[-1], part, kept, wanted[part.kind], stream)
                if weight is not None:
                    found[part.output.name] = weight
            pruned.hidden = pruned.through(layout.block)
    finally:
        for one in live:
            one.restore()
    return tuple(chosen), found


def check(anatomy: Anatomy) -> None:
    """Raise a ValueError on a family that can't be cut, or adds to the stream in another way."""
    check_stream(anatomy, find_layouts(anatomy, experts=True))


class Teacher:
    """The dense model's last hidden states, and windows to run others on.

    Args:
        anatomy: of the live model, dense now.
        tokens: calibration windows.
    """

    def __init__(self, anatomy: Anatomy, tokens: Int[Tensor, "windows length"]) -> None:
        runner = BlockRunner(anatomy)
        self.anatomy = anatomy
        self.batches: list[BlockInputs] = [runner.start(window[None]) for window in tokens]
        self._states = [runner.run(batch).flatten(0, 1).split(CHUNK_TOKENS) for batch in self.batches]

    def gradient(
        self, number: int, hidden: Float[Tensor, "batch length width"]
    ) -> Float[Tensor, "batch length width"]:
        """Gradient of ``T^2 KL(dense || live)`` in the last states: temperature T, a mean over the window's tokens."""

        def of_logits(chunk: int, logits: Float[Tensor, "tokens vocab"]) -> Float[Tensor, "tokens vocab"]:
            dense = self.anatomy.logits(self.anatomy.tail(self._states[number][chunk])).float()
            apart = (logits / TEMPERATURE).softmax(-1) - (dense / TEMPERATURE).softmax(-1)
            return TEMPERATURE * apart / hidden.shape[1]

        return head_gradient(self.anatomy, hidden, of_logits)


@dataclass
class _Sums:
    """Sums over windows for the columns of an output projection."""

    representational: Float[Tensor, " in"]
    predictive: Float[Tensor, " in"]


def knowledge(teacher: Teacher, parts: Sequence[SublayerLayout]) -> list[Float[Tensor, " units"]]:
    """Knowledge of the units of sub-layers that the live model has whole, for each parameter.

    Of a column of the output projection (eq. 4 and 5 of the paper): the representational is ``E x_j^2 mean_i W_ij^2``,
    the predictive ``(d KL / d m_j)^2 / 2`` with m a mask on it, meant over windows. A unit's is the mean over its
    columns.

    Args:
        teacher: the dense model.
        parts: some of the last sub-layers, in order.
    """
    sums: dict[str, _Sums] = {}

    def add(linear: Linear, inputs: Float[Tensor, "tokens in"], upper: Float[Tensor, "tokens out"]) -> None:
        inputs, weight = inputs.float(), linear.weight.float()
        effect = (inputs * (upper.float() @ weight)).sum(0)
        here = sums.setdefault(linear.name, _Sums(*torch.zeros(2, len(effect), device=effect.device)))
        here.representational += inputs.square().mean(0) * weight.square().mean(0)
        here.predictive += effect.square() / 2

    names = {part.output.name for part in parts}
    for block in backward_blocks(teacher.anatomy, teacher.batches, teacher.gradient, add, watched=names):
        if block.index == parts[0].output.block:
            break
    found = []
    for part in parts:
        of = sums[part.output.name]
        total = REPRESENTATIONAL * of.representational + PREDICTIVE * of.predictive
        factor = HEADS * part.heads_per_group if part.kind == "attention" else 1.0
        each = total.reshape(part.n_units, -1).mean(1) / len(teacher.batches)
        found.append(factor * each / part.unit_params)
    return found


def _cut_here(
    left: Sequence[SublayerLayout], scores: Sequence[Tensor], missing: float, protected: Collection[str]
) -> tuple[tuple[int, ...], int]:
    """Kept units of the first of these sub-layers, and the parameters that it loses, under one threshold for all."""
    layers = unit_layers(left, protected, {x.name: score for x, score in zip(left, scores, strict=True)})
    share = max(0.0, missing) / sum(layer.n_weights for layer in layers)
    gone = int(one_threshold(layers, RuleEvidence(), share, normalise="none", cost=0.0)[0])
    order = scores[0].argsort(stable=True).tolist()
    return tuple(sorted(order[gone:])), layers[0].removed(gone)


def unit_layers(
    parts: Sequence[SublayerLayout], protected: Collection[str], scores: Mapping[str, Tensor] | None = None
) -> list[Layer]:
    """Layers of sub-layers, see `unit_layer`.

    Args:
        scores: by the sub-layer's name; where there are none all units score 0.
    """
    known = scores or {}
    return [unit_layer(x, known.get(x.name, torch.zeros(x.n_units)), protected) for x in parts]


def unit_layer(part: SublayerLayout, score: Tensor, protected: Collection[str]) -> Layer:
    """Layer of a sub-layer's units for allocation rules: whole if protected, with a group in the first attention."""
    names = {placement.linear.name for placement in part.placements}
    whole = part.rigid or not names.isdisjoint(protected)
    first = part.output.block == 0 and part.kind == "attention"  # caches read their length from it
    least = first or part.output.sublayer == "experts"  # shared ones keep a channel
    return Layer(
        part.output.block,
        kind_of(part.kind),
        size=part.unit_params,
        n_units=part.n_units,
        scores=score.double().cpu().numpy(),
        keep=part.n_units if whole else int(least),
        rest=part.fixed_params,
    )


def _n_params(part: SublayerLayout) -> int:
    return part.n_units * part.unit_params + part.fixed_params
