"""Live model with fewer hidden channels: those of the residual stream, which embedding, norms and head read and write.

The live tensors stay whole. Norms see the kept channels alone, and removed ones are zero between blocks, so that the
model computes what one of narrower matrices would; `narrowed` gives its matrices.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from secateur.pruners.models.anatomy import Anatomy
from secateur.pruners.models.probe import evaluating, probe_tokens
from secateur.pruners.models.runner import BlockRunner
from secateur.pruners.models.stream_axes import stream_axes, stream_norms

LOGIT_WIDTHS = ("dim_model_base",)
"""Names in configs of a hidden width by whose ratio to theirs classes multiply logits (MiniCPM3)."""


@dataclass(frozen=True)
class Narrow:
    """Hidden channels that stay, and how norms over them are scaled.

    A norm over fewer channels divides by the size of the kept ones alone, so that its outputs have another scale than
    the dense norm's. Its weight is multiplied by a factor that makes up for it, see `structure.hidden`.

    Args:
        channels: numbers of the kept channels, ascending.
        factors: of the weights of norms, by their full names.
        gates: learned factors of the kept channels, of the first block's inputs and of the outputs of norms; None: 1.
        transform: learned linear transform of the dense model's embeddings into the first block's inputs, to be merged
            into an embedding that is not tied to the head; None: the identity.
    """

    channels: tuple[int, ...]
    factors: Mapping[str, float]
    gates: Float[Tensor, " kept"] | None = None
    transform: Float[Tensor, "kept width"] | None = None


class LiveStream:
    """Residual stream of a live model, whole when this object is made; narrowed part by part."""

    def __init__(self, anatomy: Anatomy) -> None:
        self._anatomy = anatomy
        self._norms = stream_norms(anatomy)
        self._handles: dict[int, list[RemovableHandle]] = {}

    def narrow_block(self, block: int, narrow: Narrow) -> None:
        """Narrow one block, until `restore_part`; the number behind the last block is the final norm."""
        self.restore_part(block)
        device = self._anatomy.embedding.weight.device
        channels, ones = (
            torch.tensor(narrow.channels, device=device),
            torch.ones(len(narrow.channels), device=device),
        )
        gates = None if narrow.gates is None else narrow.gates.to(device)
        kept = gates if gates is not None and block == 0 else ones
        mask = torch.zeros(self._anatomy.width, device=device).index_copy(0, channels, kept)
        transform = narrow.transform if block == 0 else None
        if transform is None:
            change = partial(_masked, mask)
        else:
            rows = torch.zeros(self._anatomy.width, self._anatomy.width, device=device)
            change = partial(_transformed, rows.index_copy(0, channels, transform.to(device)))
        handles = []
        if block < len(self._anatomy.blocks):
            of = self._anatomy.blocks[block]
            handles.append(
                of.module.register_forward_pre_hook(partial(changed_input, change), with_kwargs=True)
            )
            names = [name for name in of.norms if name in self._norms]
        else:
            names = [self._anatomy.final_norm]
        for name in names:
            if "forward" in vars(self._norms[name]):  # removed
                continue
            small = narrow_norm(self._norms[name], narrow.channels, narrow.factors.get(name, 1.0))
            handles.append(
                self._norms[name].register_forward_hook(partial(_narrowed, small, channels, gates))
            )
        self._handles[block] = handles

    def restore_part(self, block: int) -> None:
        """Make one block, or the final norm, whole again."""
        for handle in self._handles.pop(block, ()):
            handle.remove()

    def restore(self) -> None:
        for block in list(self._handles):
            self.restore_part(block)


def _masked(mask: Tensor, hidden: Tensor) -> Tensor:
    return hidden * mask.to(hidden.dtype)


def _transformed(rows: Tensor, hidden: Tensor) -> Tensor:
    return hidden @ rows.to(hidden.dtype).T


def changed_input(
    change: Callable[[Tensor], Tensor], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of a block with changed hidden states, for a hook before it."""
    if "forward" in vars(module):  # not computed, but asked for its inputs, see `BlockRunner.start`
        return args, kwargs
    if args:
        return (change(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}


def _narrowed(
    small: nn.Module,
    channels: Tensor,
    gates: Tensor | None,
    module: nn.Module,
    args: tuple[Any, ...],
    output: Tensor,
) -> Tensor:
    """Outputs of the norm over the kept channels, zeros elsewhere; a norm that was removed does nothing."""
    if "forward" in vars(module):
        return output
    own = small(args[0][..., channels])
    own = (own if gates is None else own * gates).to(output.dtype)
    return torch.zeros_like(output).index_copy(-1, channels, own)


def narrow_norm(norm: nn.Module, channels: Sequence[int], factor: float | Tensor = 1.0) -> nn.Module:
    """The norm over some of its channels, its weight times a factor; a weight of ``1 + w`` too.

    Args:
        factor: one, or one of each kept channel, of the bias too.
    """
    small: Any = copy.deepcopy(norm)
    index = torch.tensor(channels)
    for name, parameter in list(small.named_parameters()):
        value = parameter.data[index.to(parameter.device)]
        if name == "weight":
            shift = offset(norm)
            value = (value + shift) * factor - shift
        elif isinstance(factor, Tensor):
            value = value * factor
        setattr(small, name, nn.Parameter(value, requires_grad=False))
    if hasattr(small, "normalized_shape"):
        small.normalized_shape = (len(index),)
    made: nn.Module = small.eval()
    return made


def offset(norm: nn.Module) -> float:
    """1 for a norm that multiplies by ``1 + weight`` (Gemma), else 0."""
    probe: Any = copy.deepcopy(norm)
    for parameter in probe.parameters():
        parameter.data.zero_()
    weight: Any = norm.weight
    with torch.no_grad():
        ones = torch.arange(1.0, weight.numel() + 1, device=weight.device, dtype=weight.dtype)
        return float(bool(probe.forward(ones[None, None]).abs().max() > 0))  # without hooks


def plain_norm(norm: nn.Module) -> nn.Module:
    """The norm with a weight of one and without a bias."""
    plain: Any = copy.deepcopy(norm)
    for name, parameter in plain.named_parameters():
        parameter.data.fill_(1.0 - offset(norm) if name == "weight" else 0.0)
    made: nn.Module = plain.eval()
    return made


@contextmanager
def narrowed(anatomy: Anatomy, narrow: Narrow, *, planned: bool = False) -> Iterator[None]:
    """Context in which the live parameters are those of the narrow model.

    Where the class multiplies embeddings by the root of their width, theirs makes up for the smaller one, and the final
    norm for that in a tied head, and for a factor of the logits that follows the width.

    Args:
        anatomy: of the model.
        narrow: the channels that stay.
        planned: the shapes alone count, and no memory is used: the parameters are the first channels of the dense ones.
    """
    axes, parameters = stream_axes(anatomy), dict(anatomy.model.named_parameters())
    dense = {name: parameters[name].data for name in axes}
    values = (
        _first_channels(dense, axes, len(narrow.channels))
        if planned
        else _values(anatomy, dense, axes, narrow)
    )
    try:
        for name, value in values.items():
            parameters[name].data = value
        yield
    finally:
        for name, value in dense.items():
            parameters[name].data = value


def _first_channels(dense: Mapping[str, Tensor], axes: Mapping[str, int], width: int) -> dict[str, Tensor]:
    return {name: x.narrow(axes[name], 0, width) for name, x in dense.items() if x.numel()}


def _values(
    anatomy: Anatomy, dense: Mapping[str, Tensor], axes: Mapping[str, int], narrow: Narrow
) -> dict[str, Tensor]:
    channels, norms = torch.tensor(narrow.channels), stream_norms(anatomy)
    scale = _embedding_scale(anatomy, channels)
    names = {module: name for name, module in anatomy.model.named_modules()}
    embeddings = {name for module, name in names.items() if isinstance(module, nn.Embedding)}
    is_tied = anatomy.head.weight is anatomy.embedding.weight
    found = {}
    for name, value in dense.items():
        owner, _, own = name.rpartition(".")
        if not value.numel():
            continue
        gates = None if narrow.gates is None else narrow.gates.to(value.device)
        if owner in norms:
            last = owner == anatomy.final_norm
            of_head = _factor_of_head(anatomy, len(channels), scale) if last else 1.0
            factor: Any = narrow.factors.get(owner, 1.0) * of_head
            if gates is not None and not (last and is_tied):  # a tied head has those of the embedding
                factor = factor * gates
            small: Any = narrow_norm(norms[owner], narrow.channels, factor)
            if own == "bias" and not isinstance(factor, Tensor):
                small.bias.data *= of_head
            found[name] = getattr(small, own).data
        else:
            found[name] = value.index_select(axes[name], channels.to(value.device))
            if owner == names[anatomy.embedding]:
                if narrow.transform is not None:
                    found[name] = (value.float() @ narrow.transform.to(value.device).T).to(value.dtype)
                found[name] = found[name] * scale
            if gates is not None and owner in embeddings:
                found[name] = (found[name] * gates).to(value.dtype)
    return found


def _factor_of_head(anatomy: Anatomy, width: int, scale: float) -> float:
    """Factor of the final norm by which the logits of the narrow class are those of the live model.

    Args:
        anatomy: of the model.
        width: number of kept channels.
        scale: factor of the embedding's weight, which a tied head has, too.
    """
    content = anatomy.model.config.to_dict()  # type: ignore[union-attr, operator]  # a transformers config
    divided = any(content.get(name) for name in LOGIT_WIDTHS)
    tied = anatomy.head.weight is anatomy.embedding.weight
    return (width / anatomy.width if divided else 1.0) / (scale if tied else 1.0)


def _embedding_scale(anatomy: Anatomy, channels: Int[Tensor, " kept"]) -> float:
    """Factor of the embedding's weight, if the class multiplies it by the root of the number of hidden channels."""
    tokens = probe_tokens(anatomy.model)
    with evaluating(anatomy.model):
        hidden = BlockRunner(anatomy).start(tokens).hidden.double()[..., channels]
    plain = anatomy.embedding.weight[tokens].double()[..., channels]
    ratio = float((hidden * plain).sum() / plain.square().sum())
    is_root = abs(ratio**2 / anatomy.width - 1) < 0.02
    return (anatomy.width / len(channels)) ** 0.5 if is_root else 1.0
