"""Live model with fewer hidden channels: those of the residual stream, which embedding, norms and head read and write.

The live tensors stay whole. Norms see the kept channels alone, and removed ones are zero between blocks, so that the
model computes what one of narrower matrices would; `narrow_weights` are its matrices.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
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


@dataclass(frozen=True)
class Narrow:
    """Hidden channels that stay, and how norms over them are scaled.

    A norm over fewer channels divides by the size of the kept ones alone, so that its outputs have another scale than
    the dense norm's. Its weight is multiplied by a factor that makes up for it, see `structure.hidden`.

    Args:
        channels: numbers of the kept channels, ascending.
        factors: of the weights of norms, by their full names.
        gates: learned factors of the kept channels, of the first block's inputs and of the outputs of norms; None: 1.
    """

    channels: tuple[int, ...]
    factors: Mapping[str, float]
    gates: Float[Tensor, " kept"] | None = None


def stream_norms(anatomy: Anatomy) -> dict[str, nn.Module]:
    """Norms of the residual stream by their full names, the final one last.

    Raises:
        ValueError: if fewer hidden channels are not possible in this model, in one line.
    """
    _check(anatomy)
    modules = dict(anatomy.model.named_modules())
    inside = [x.name.rpartition(".")[0] for x in anatomy.linears if x.sublayer == "attention"]
    names = [name for block in anatomy.blocks for name in block.norms]
    found = [name for name in names if not any(name.startswith(f"{owner}.") for owner in inside)]
    return {name: modules[name] for name in (*found, anatomy.final_norm)}


def _check(anatomy: Anatomy) -> None:
    kinds = {mixer.kind for block in anatomy.blocks for mixer in block.mixers}
    reason = ""
    if kinds != {"attention", "mlp"}:
        reason = f"mixers that are {', '.join(sorted(kinds))}"
    elif not all(block.heads.n_kv and not block.heads.kv_rows for block in anatomy.blocks):
        reason = "an attention of other projections than q, k, v and o"
    elif not anatomy.final_norm:
        reason = "no norm behind the last block"
    elif isinstance(anatomy.tail, nn.Sequential) and len(anatomy.tail) > 1:
        reason = "more than a norm between blocks and head"
    elif anatomy.embedding.embedding_dim != anatomy.width or any(block.unknown for block in anatomy.blocks):
        reason = "an embedding of another width, or matrices that are not understood"
    elif anatomy.model.config.get_text_config() is not anatomy.model.config:  # type: ignore[union-attr, operator]
        reason = "a language tower that is a part of it"
    if reason:
        raise ValueError(
            f"Expected blocks of attention and MLP between an embedding and a norm for fewer hidden channels, got a "
            f"model ({anatomy.family}) with {reason}."
        )


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
        handles = []
        if block < len(self._anatomy.blocks):
            of = self._anatomy.blocks[block]
            handles.append(of.module.register_forward_pre_hook(partial(_mask_input, mask), with_kwargs=True))
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


def _mask_input(
    mask: Tensor, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if "forward" in vars(module):  # not computed, but asked for its inputs, see `BlockRunner.start`
        return args, kwargs
    if args:
        return (args[0] * mask.to(args[0].dtype), *args[1:]), kwargs
    hidden = kwargs["hidden_states"]
    return args, {**kwargs, "hidden_states": hidden * mask.to(hidden.dtype)}


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


def stream_axes(anatomy: Anatomy) -> dict[str, int]:
    """Axis of the residual stream in each parameter that has one, by the parameter's name.

    Raises:
        ValueError: if the model has parameters that are not understood, see also `stream_norms`.
    """
    names = {module: name for name, module in anatomy.model.named_modules()}
    axes = {f"{name}.{own}": 0 for name in stream_norms(anatomy) for own in ("weight", "bias")}
    for linear in anatomy.linears:
        axes[f"{linear.name}.weight"] = int(not linear.is_output) ^ int(linear.transposed)
        if linear.is_output:
            axes[f"{linear.name}.bias"] = 0
    axes[f"{names[anatomy.head]}.weight"] = 1
    inside = set(anatomy.container.modules())
    for module, name in names.items():
        if isinstance(module, nn.Embedding) and module not in inside:
            axes[f"{name}.weight"] = 1
    found = {}
    known = dict(anatomy.model.named_parameters())
    for name, parameter in known.items():
        if name in axes and parameter.shape[axes[name]] == anatomy.width:
            found[name] = axes[name]
        elif (
            name not in axes
            and parameter.numel() > 1
            and name.rpartition(".")[0] not in _kept_inside(anatomy)
        ):
            raise ValueError(
                f"Expected parameters that are understood for fewer hidden channels, got {name} in a model of "
                f"{anatomy.family}."
            )
    return found


def _kept_inside(anatomy: Anatomy) -> set[str]:
    """Modules whose parameters have no axis of the stream: norms inside attentions, and biases of rows."""
    norms = {name for block in anatomy.blocks for name in block.norms}
    return (
        norms
        | {linear.name for linear in anatomy.linears}
        | {name for name, module in anatomy.model.named_modules() if module is anatomy.head}
    )


def narrow_weights(
    anatomy: Anatomy, weights: Mapping[str, Tensor], narrow: Narrow, *, planned: bool = False
) -> dict[str, Tensor]:
    """Tensors of the narrow model from those of the live one, by the same names.

    Where the class multiplies embeddings by the root of their width, theirs makes up for the smaller one, and the final
    norm for that in a tied head.

    Args:
        weights: by live names.
        planned: the tensors are without memory, and so will the result be.
    """
    channels = torch.tensor(narrow.channels)
    axes, norms = stream_axes(anatomy), stream_norms(anatomy)
    scale = 1.0 if planned else _embedding_scale(anatomy, channels)
    names = {module: name for name, module in anatomy.model.named_modules()}
    embeddings = {name for module, name in names.items() if isinstance(module, nn.Embedding)}
    found = dict(weights)
    for name, axis in axes.items():
        if name not in found or not found[name].numel():
            continue
        value = found[name]
        owner, _, own = name.rpartition(".")
        gates = None if narrow.gates is None or planned else narrow.gates.to(value.device)
        if planned:
            found[name] = value.narrow(axis, 0, len(channels))
        elif owner in norms:
            tied = owner == anatomy.final_norm and anatomy.head.weight is anatomy.embedding.weight
            factor: Any = narrow.factors.get(owner, 1.0) / (scale if tied else 1.0)
            factor = (
                factor if gates is None or tied else factor * gates
            )  # a tied head has those of the embedding
            small: Any = narrow_norm(norms[owner], narrow.channels, factor)
            if own == "bias" and tied and scale != 1:
                small.bias.data /= scale
            found[name] = getattr(small, own).data
        else:
            found[name] = value.index_select(axis, channels.to(value.device))
            if owner == names[anatomy.embedding]:
                found[name] = found[name] * scale
            if gates is not None and owner in embeddings:
                found[name] = (found[name] * gates).to(value.dtype)
    return found


def _embedding_scale(anatomy: Anatomy, channels: Int[Tensor, " kept"]) -> float:
    """Factor of the embedding's weight, if the class multiplies it by the root of the number of hidden channels."""
    tokens = probe_tokens(anatomy.model)
    with evaluating(anatomy.model):
        hidden = BlockRunner(anatomy).start(tokens).hidden.double()[..., channels]
    plain = anatomy.embedding.weight[tokens].double()[..., channels]
    ratio = float((hidden * plain).sum() / plain.square().sum())
    is_root = abs(ratio**2 / anatomy.width - 1) < 0.02
    return (anatomy.width / len(channels)) ** 0.5 if is_root else 1.0


def count_narrow(anatomy: Anatomy, width: int) -> int:
    """Parameters of the whole model with so many hidden channels."""
    axes = stream_axes(anatomy)
    return sum(
        parameter.numel() * width // anatomy.width if name in axes else parameter.numel()
        for name, parameter in anatomy.model.named_parameters()
    )
