"""K-prune's tuning: reconstruction of each cut sub-layer against the dense model's stream."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from secateur.pruners.calibration.statistics import ROLES, Hook, InputRecorder
from secateur.pruners.calibration.stream import Walk
from secateur.pruners.linalg import input_factor, least_squares
from secateur.pruners.models.anatomy import Anatomy, Linear, Sublayer
from secateur.pruners.models.cutting import LiveSublayer, set_bias
from secateur.pruners.models.layout import BlockLayout, MixtureLayout, SublayerLayout
from secateur.pruners.models.live_experts import LiveExperts
from secateur.pruners.structure.reorder import cut_pieces

KeptNumbers = Mapping[Sublayer, tuple[int, ...]]
"""Numbers of the kept units of a block."""


@torch.no_grad()
def reconstructed(
    anatomy: Anatomy,
    layouts: Sequence[BlockLayout],
    stays: Sequence[KeptNumbers],
    tokens: Int[Tensor, "windows length"],
) -> dict[str, Float[Tensor, "out _"]]:
    """New weights of the output projections of all sub-layers that are cut; the live model is left dense.

    K-prune (Park et al. 2024, arXiv 2308.03449), its knowledge-preserving weight tuning: from the first block up
    ``W' = argmin ||F W^T - (x_dense + y_dense - x)||^2`` with F the outputs of the kept units in the model pruned so
    far, x its residual stream before the sub-layer, and x_dense + y_dense the dense model's stream behind it. So later
    sub-layers compensate for the errors of earlier ones, unlike `refit.least_squares`. Undampened but for rounding.

    Differences from the paper: decoders in place of encoders; what is cut is given, where `knowledge.kprune` chooses
    it on the way; sub-layers that are kept whole are not fitted anew.

    Args:
        anatomy: the dense model, of a family that adds the outputs of its projections to the stream as they are.
        layouts: of its blocks.
        stays: kept units of each block, in the order of the new columns.
        tokens: calibration windows.

    Returns:
        By the projection's full name, in the dtype of the model.

    Raises:
        ValueError: on another family, fewer tokens than columns, or inputs that are not finite.
    """
    dense, pruned = Walk(anatomy, tokens), Walk(anatomy, tokens)
    found: dict[str, Tensor] = {}
    for layout, kept in zip(layouts, stays, strict=True):
        wanted = dense_targets(dense, layout)
        mixture = layout.mlp if isinstance(layout.mlp, MixtureLayout) else None
        live = [LiveSublayer(part) for part in layout.sublayers]
        gone = [LiveExperts(mixture)] if mixture is not None and kept.get("experts") == () else []
        try:
            found |= _fit_block(pruned, layout, live, kept, wanted)
            for experts in gone:
                experts.remove()
            pruned.hidden = pruned.through(layout.block)
        finally:
            for experts in gone:
                experts.restore()
            for one in live:
                one.restore()
    return found


@torch.no_grad()
def check_stream(anatomy: Anatomy, layouts: Sequence[BlockLayout]) -> None:
    """Raise a ValueError unless the family adds the outputs of its projections to the stream as they are.

    Looked at in the first block, and in the first one with a mixture of experts.
    """
    walk = Walk(anatomy, torch.arange(16)[None] % anatomy.vocab_size)
    mixed = [layout.block.index for layout in layouts if isinstance(layout.mlp, MixtureLayout)]
    for layout in layouts[: 1 + (mixed or [0])[0]]:
        dense_targets(walk, layout)


def dense_targets(dense: Walk, layout: BlockLayout) -> dict[Sublayer, Float[Tensor, "tokens width"]]:
    """The dense stream behind each sub-layer of a block; afterwards the walk is behind the block."""
    seen, parts = InputRecorder(*ROLES), layout.sublayers
    given = _MixtureOutputs(layout)
    with given.watching():
        outputs = dense.through(layout.block, [partial(_of_parts, parts, seen)])
    before, behind = rows(dense.hidden), rows(outputs)
    found: dict[Sublayer, Tensor] = {}
    stream = before
    for part in parts:
        if part.output.sublayer != "experts":
            stream = stream + _given(part, seen)
            found[part.kind] = stream
    tolerance = 16 * torch.finfo(outputs[0].dtype).eps * float(behind.abs().max())
    same = torch.allclose(stream + given.summed, behind, rtol=0.0, atol=tolerance)
    shared = layout.mlp.shared if isinstance(layout.mlp, MixtureLayout) else None
    if same and shared is not None:
        with _silent(shared):
            without = rows(dense.through(layout.block))
        same = torch.allclose(without + _given(shared, seen), behind, rtol=0.0, atol=tolerance)
    if not same:
        raise ValueError(
            "Expected a family that adds the outputs of its projections to the stream as they are for the repair "
            f"kprune, got another sum at {layout.block.name}. Use the repair refit."
        )
    dense.hidden = outputs
    return found | {"mlp": behind} if "mlp" in found or shared is not None else found


def _of_parts(parts: Sequence[SublayerLayout], seen: InputRecorder, linear: Linear) -> Hook | None:
    """Hook of the output projections of these sub-layers alone, not of routed experts."""
    return seen.hook(linear) if any(part.output is linear for part in parts) else None


class _MixtureOutputs:
    """What the mixture of a block gives in one pass; nothing in a block without."""

    def __init__(self, layout: BlockLayout) -> None:
        mixture = layout.mlp if isinstance(layout.mlp, MixtureLayout) else None
        self._modules = () if mixture is None else (mixture.owner, *mixture.beside)
        self._given: list[list[Tensor]] = [[] for _ in self._modules]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Context in which it is recorded."""

        def record(to: list[Tensor], module: nn.Module, args: Any, output: Any) -> None:
            first: Tensor = output[0] if isinstance(output, tuple) else output
            to.append(first.reshape(-1, first.shape[-1]).float())

        with ExitStack() as hooks:
            for module, to in zip(self._modules, self._given, strict=True):
                hooks.callback(module.register_forward_hook(partial(record, to)).remove)
            yield

    @property
    def summed(self) -> Tensor | float:
        """Sum of all of its modules, a row a token; 0 without."""
        return sum((torch.cat(given) for given in self._given), start=0.0)


@contextmanager
def _silent(part: SublayerLayout) -> Iterator[None]:
    """Context in which a sub-layer gives zeros."""
    weight, bias = part.output.weight, part.output.bias
    part.output.point_to(torch.zeros_like(weight))
    set_bias(part.output.module, None if bias is None else torch.zeros_like(bias))
    try:
        yield
    finally:
        part.output.point_to(weight)
        set_bias(part.output.module, bias)


def _fit_block(
    pruned: Walk,
    layout: BlockLayout,
    live: Sequence[LiveSublayer],
    kept: KeptNumbers,
    wanted: Mapping[Sublayer, Float[Tensor, "tokens width"]],
) -> dict[str, Tensor]:
    """Cut the live block, and fit its output projections one after the other."""
    found = {}
    stream = rows(pruned.hidden)
    for part, one in zip(layout.sublayers, live, strict=True):
        if part.kind not in kept:  # shared experts where whole mixtures stay or go
            continue
        weight, stream = fit_sublayer(pruned, layout, one, part, kept[part.kind], wanted[part.kind], stream)
        if weight is not None:
            found[part.output.name] = weight
    return found


def fit_sublayer(
    pruned: Walk,
    layout: BlockLayout,
    one: LiveSublayer,
    part: SublayerLayout,
    kept: tuple[int, ...],
    wanted: Float[Tensor, "tokens width"],
    stream: Float[Tensor, "tokens width"],
) -> tuple[Float[Tensor, "out _"] | None, Float[Tensor, "tokens width"]]:
    """Cut a live sub-layer to these units, and fit its output projection.

    Args:
        pruned: before the block, which is pruned as far as below the sub-layer.
        wanted: the dense stream behind the sub-layer.
        stream: the pruned one before it; of shared experts it is found here, with what routed ones add.

    Returns:
        The weight, None where it is kept whole or removed; and the stream behind the sub-layer.
    """
    if not kept:
        one.remove()
        return None, stream
    weight = None
    if len(kept) < part.n_units:
        one.cut(len(kept), cut_pieces(part, kept))
    seen = InputRecorder(*ROLES)
    behind = pruned.through(layout.block, [partial(_of_parts, (part,), seen)])
    if part.output.sublayer == "experts":  # beside routed experts, which stay
        stream = rows(behind) - _given(part, seen)
    if len(kept) < part.n_units:
        weight = _fitted(part.output, seen.of(part.output.role), wanted - stream)
        part.output.point_to(weight)
    return weight, stream + _given(part, seen)


def rows(stream: Sequence[Float[Tensor, "batch length width"]]) -> Float[Tensor, "tokens width"]:
    """Batches of states as one matrix, in fp32."""
    return torch.cat([states.flatten(0, 1) for states in stream]).float()


def _given(layout: SublayerLayout, seen: InputRecorder) -> Float[Tensor, "tokens width"]:
    """Output of the output projection, as it is now, on the recorded inputs."""
    given = seen.of(layout.output.role) @ layout.output.weight.float().T
    return given if layout.output.bias is None else given + layout.output.bias.float()


def _fitted(
    output: Linear, inputs: Float[Tensor, "tokens in"], wanted: Float[Tensor, "tokens width"]
) -> Float[Tensor, "width in"]:
    """Weight of the least squares; the bias is unchanged."""
    n_tokens, n_columns = inputs.shape
    if n_tokens < n_columns:
        raise ValueError(
            f"Expected at least as many calibration tokens as inputs for the repair kprune, got {n_tokens} for "
            f"{n_columns} at {output.name}. Use more tokens, or the repair refit."
        )
    target = wanted if output.bias is None else wanted - output.bias.float()
    return least_squares(inputs, target, input_factor(inputs, output.name)).to(output.weight.dtype)
