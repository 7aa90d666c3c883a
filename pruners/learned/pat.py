"""PAT: hidden channels chosen by one mask while sparsification modules and low-rank updates are tuned."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from secateur.pruners.learned.channel_mask import ChannelMask
from secateur.pruners.learned.low_rank import LowRank, first_right, update_values
from secateur.pruners.learned.masked_weights import replaced_forwards
from secateur.pruners.learned.target_shape import hidden_width
from secateur.pruners.learned.training import (
    MaskTrainer,
    named_generator,
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
from secateur.pruners.models.narrow import Narrow, changed_input, plain_norm
from secateur.pruners.models.runner import in_fp32
from secateur.pruners.models.stream_axes import stream_axes, stream_norms
from secateur.pruners.stores.saved_state import SavedState
from secateur.pruners.structure.chosen import ChosenUnits

RANK, SCALE = 20, 0.2
"""Rank of the updates of all projections, and their factor, 4 over 20."""

MODULE_RANK = 200 / 4096
"""Rank of a sparsification module's matrix, as a share of the hidden channels; 200 of LLaMA 2 7B's."""

RATE = 3e-3
"""Learning rate of updates and modules, chosen for `tiny`; 5e-5 there, over 30,000 steps."""

TRAVEL = 5e-5 * 30_000
"""Learning rate of the mask times the number of steps, as there."""

WARMUP = 100 / 30_000
"""Share of the steps in which the learning rates rise, before they fall along half a cosine."""

PRUNING = 1 / 3
"""Share of the steps in which the mask sharpens."""

BATCH = 4
"""Windows a step; 128 there."""

PASSES, FEWEST_STEPS = 4, 200
"""Passes over the windows, and steps at least."""

SEED = 0
WHAT = "the metric pat"


def pat(
    anatomy: Anatomy,
    layouts: Sequence[BlockLayout],
    tokens: Int[Tensor, "windows length"],
    sparsity: float,
    *,
    protected: Collection[str] = (),  # unused
    state: SavedState | None = None,
) -> ChosenUnits:
    """Kept hidden channels, and tuned weights of all projections with all of their units; the live model is left dense.

    Pruning-Aware Tuning (Liu et al. 2025, arXiv 2408.14721). Behind the embedding and behind each projection that
    writes into the stream stands a sparsification module, ``v * m * (x + B A x)``: a low-rank matrix and a scale of
    its own, and a mask m of the hidden channels that all share (see `Sparsifier`, `ChannelMask`). They are trained with
    low-rank updates of all projections by the cross-entropy, the distance of the number of kept channels from the one
    wanted, and the identity loss, the mean square of ``A A^T - I``. At the end the channels of the lowest values go,
    modules and updates are merged into the weights, and those of RMS norms make up for the number of channels.

    All of this is the released code's, with its weights, rank and schedule. Differences: exactly as many channels stay
    as come nearest to the sparsity; `v` is merged, too, which its merging script leaves out; a tied embedding has no
    module, as its head would get it; inputs of updates are not dropped out; the rank of modules follows the width; few
    steps with higher learning rates, see `FEWEST_STEPS`; windows of the calibration text in place of instructions.

    Args:
        anatomy: the dense model.
        layouts: of its blocks.
        tokens: calibration windows.
        sparsity: share of the blocks' parameters to remove.
        protected: none: hidden channels go through all layers; its row refuses some.
        state: to continue from.

    Raises:
        BudgetError: if no width comes near to the sparsity.
        DivergedError: if the loss is not finite.
        ValueError: on too little memory.
    """
    parts = [part for layout in layouts for part in layout.sublayers]
    width = hidden_width(anatomy, sparsity)
    training_size(anatomy, (len(tokens), tokens.shape[1])).check(anatomy, f"the training of {WHAT}")
    with in_fp32(anatomy.model):
        tuning = PruningAwareTuning(anatomy, tokens, parts, width)
        tuning.train(state)
        weights, narrow = tuning.merged(), tuning.narrow()
    dtypes = {linear.name: linear.weight.dtype for linear in anatomy.linears}
    return ChosenUnits(
        tuple({part.kind: tuple(range(part.n_units)) for part in layout.sublayers} for layout in layouts),
        {name: weight.to(dtypes[name]) for name, weight in weights.items()},
        narrow,
    )


def check(anatomy: Anatomy) -> None:
    """Raise a ValueError on a family that can't lose hidden channels, or that modules can't be merged into."""
    layouts = find_layouts(anatomy)
    check_parts(layouts, WHAT)
    stream_axes(anatomy)
    outputs = [part.output for layout in layouts for part in layout.sublayers]
    biased = next((x.name for x in outputs if x.bias is not None), None)
    if biased is not None:
        raise ValueError(
            f"Expected output projections without a bias for {WHAT}, got one at {biased}. Take another metric."
        )
    other = next(
        (name for name, norm in stream_norms(anatomy).items() if not _is_rms(plain_norm(norm))), None
    )
    if other is not None:
        raise ValueError(
            f"Expected RMS norms alone for {WHAT}, which masks channels before them, got another at {other}. Take "
            "another metric."
        )


def training_size(anatomy: Anatomy, windows: tuple[int, int]) -> TrainingSize:
    """Size of the training, see `MethodRow.training_path`."""
    parts = [part for layout in find_layouts(anatomy, experts=True) for part in layout.sublayers]
    of_modules = (len(parts) + 1) * anatomy.width * (2 * module_rank(anatomy.width) + 1)
    steps = steps_over(windows[0], BATCH, PASSES, FEWEST_STEPS)
    return TrainingSize(
        steps, min(BATCH, windows[0]), windows[1], update_values(parts, RANK) + 4 * of_modules
    )


@torch.no_grad()
def _is_rms(plain: torch.nn.Module) -> bool:
    width = next(plain.parameters()).numel()
    x = 1 + torch.arange(width, dtype=torch.float32) / width
    first = next(plain.parameters())
    found = plain(x.to(first.device, first.dtype)[None, None]).float().cpu()[0, 0]
    return torch.allclose(found, x / x.square().mean().sqrt(), rtol=1e-2)


def module_rank(width: int) -> int:
    """Rank of a sparsification module's matrix beside so many hidden channels."""
    return max(1, round(MODULE_RANK * width))


class Sparsifier:
    """Hybrid sparsification module: ``v * gates * (x + B A x)``, at first x.

    Args:
        name: of what it stands behind; the first values of A depend on it.
        width: of the stream.
        device: of the tensors.
    """

    def __init__(self, name: str, width: int, device: torch.device) -> None:
        rank = module_rank(width)
        right = first_right(rank, width, named_generator(SEED, f"module of {name}"))
        self.right = right.to(device).requires_grad_()
        self.left = torch.zeros(width, rank, device=device, requires_grad=True)
        self.scale = torch.ones(width, device=device, requires_grad=True)

    def outputs(
        self, x: Float[Tensor, "*tokens width"], gates: Float[Tensor, " width"]
    ) -> Float[Tensor, "*tokens width"]:
        """Outputs with these gates on the channels."""
        return self.scale * gates * (x + F.linear(F.linear(x, self.right), self.left))

    @property
    def identity_loss(self) -> Float[Tensor, ""]:
        """Mean square of ``A A^T - I``."""
        product = self.right @ self.right.T
        return (product - torch.eye(len(product), device=product.device)).square().mean()

    def merged(self, weight: Float[Tensor, "width in"]) -> Float[Tensor, "width in"]:
        """A weight with the module behind it, without gates."""
        mixed = weight + self.left.detach() @ (self.right.detach() @ weight)
        return self.scale.detach()[:, None] * mixed

    @property
    def trained(self) -> Iterator[tuple[str, Tensor]]:
        """Trained tensors, by name."""
        yield from (("left", self.left), ("right", self.right), ("scale", self.scale))


class PruningAwareTuning:
    """Tuning of a model's updates, modules and mask.

    Args:
        anatomy: the model, in float32.
        tokens: windows.
        parts: all sub-layers.
        width: hidden channels that are to stay.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        tokens: Int[Tensor, "windows length"],
        parts: Sequence[SublayerLayout],
        width: int,
    ) -> None:
        self._anatomy, self._tokens, self._width = anatomy, tokens, width
        self._n_steps = steps_over(len(tokens), BATCH, PASSES, FEWEST_STEPS)
        device = anatomy.embedding.weight.device
        linears = [x.linear for part in parts for x in part.placements]
        self.updates = {linear.name: LowRank(linear, RANK, SEED, SCALE) for linear in linears}
        self.modules = {x.name: Sparsifier(x.name, anatomy.width, device) for x in (y.output for y in parts)}
        is_tied = anatomy.head.weight is anatomy.embedding.weight
        self.first = None if is_tied else Sparsifier("embedding", anatomy.width, device)
        self.mask = ChannelMask(anatomy.width, width, max(2, int(PRUNING * self._n_steps)), device)

    @property
    def _modules(self) -> dict[str, Sparsifier]:
        return self.modules | ({} if self.first is None else {"embedding": self.first})

    def train(self, state: SavedState | None) -> None:
        """Take all steps that are left."""
        tuned = {f"left {name}": one.left for name, one in self.updates.items()}
        tuned |= {f"right {name}": one.right for name, one in self.updates.items()}
        for name, module in self._modules.items():
            tuned |= {f"module {name} {own}": x for own, x in module.trained}
        groups = [
            {"params": list(tuned.values()), "lr": RATE},
            {"params": [self.mask.values], "lr": TRAVEL / self._n_steps},
        ]
        MaskTrainer(
            tuned | {"mask": self.mask.values},
            torch.optim.AdamW(groups, weight_decay=0.0),
            self.loss,
            self._n_steps,
            what=f"the modules of {WHAT}",
            rate=lambda step: warmed_cosine_rate(step, self._n_steps, WARMUP, 0.0),
            clip=0.3,
            state=state,
        ).run()

    def loss(self, step: int) -> Float[Tensor, ""]:
        """Cross-entropy at a step with the gates that the mask has then, and the penalties of mask and modules."""
        gates = self.mask.gates(step)
        identity = torch.stack([one.identity_loss for one in self._modules.values()]).sum()
        outputs: dict[str, Callable[[Tensor], Tensor]] = {x: one.outputs for x, one in self.updates.items()}
        for name, module in self.modules.items():
            outputs[name] = partial(_behind, self.updates[name], module, gates)
        handle = self._anatomy.blocks[0].module.register_forward_pre_hook(
            partial(changed_input, partial(self._begun, gates)), with_kwargs=True
        )
        try:
            with replaced_forwards(list(self._anatomy.linears), outputs):
                loss = ce_loss(self._anatomy, step_rows(self._tokens, BATCH, step))
        finally:
            handle.remove()
        return loss + self.mask.penalty + identity

    def _begun(self, gates: Float[Tensor, " width"], hidden: Tensor) -> Tensor:
        """Inputs of the first block."""
        return hidden * gates if self.first is None else self.first.outputs(hidden, gates)

    def merged(self) -> dict[str, Float[Tensor, "out in"]]:
        """Weights of all projections, with updates and modules."""
        found = {name: one.weight for name, one in self.updates.items()}
        return found | {name: module.merged(found[name]) for name, module in self.modules.items()}

    def narrow(self) -> Narrow:
        """Channels that stay; norms make up for their number, and the first module goes into the embedding."""
        kept, n_channels = self.mask.kept, self._anatomy.width
        transform = None
        if self.first is not None:
            whole = self.first.merged(torch.eye(n_channels, device=self.first.scale.device))
            transform = whole[list(kept)]
        return Narrow(
            kept,
            dict.fromkeys(stream_norms(self._anatomy), math.sqrt(n_channels / len(kept))),
            None,
            transform,
        )


def _behind(update: LowRank, module: Sparsifier, gates: Float[Tensor, " width"], x: Tensor) -> Tensor:
    return module.outputs(update.outputs(x), gates)
