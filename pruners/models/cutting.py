"""Live sub-layer, cut to its first units or removed by reference, and restored."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import Cache

from secateur.pruners.models.anatomy import Linear
from secateur.pruners.models.layout import Returns, SublayerLayout


@dataclass(frozen=True)
class Piece:
    """Weight and bias of a cut projection.

    Args:
        weight: ``out in``.
        bias: None if it has none.
    """

    weight: Float[Tensor, "out in"]
    bias: Float[Tensor, " out"] | None

    @property
    def nbytes(self) -> int:
        """Size of both."""
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def changed(self, weight: Float[Tensor, "out in"] | None, added: Float[Tensor, " out"] | None) -> Piece:
        """Copy with another weight, if one is given, and with something added to the bias, if anything."""
        bias = self.bias if added is None else added if self.bias is None else self.bias + added
        return Piece(self.weight if weight is None else weight, bias)


class LiveSublayer:
    """One sub-layer of a live model, dense when this object is made."""

    def __init__(self, layout: SublayerLayout) -> None:
        self._layout = layout
        modules = list(layout.modules)
        self._data = [(p, p.data) for module in modules for p in module.parameters(recurse=False)]
        self._output_bias = layout.output.module.bias
        self._attributes = _attributes(layout, layout.n_units) if layout.owner else {}
        self._dense = {name: getattr(layout.owner, name) for name in self._attributes}
        self._patched: list[nn.Module] = []

    def cut(self, n_kept: int, pieces: Mapping[str, Piece], queries: int = 0) -> None:
        """Use these weights from now on, by reference.

        Args:
            n_kept: units, > 0.
            pieces: by the projection's full name.
            queries: query heads of each kept KV group; 0: all.
        """
        self.restore()
        for placement in self._layout.placements:
            linear, piece = placement.linear, pieces[placement.linear.name]
            linear.point_to(piece.weight)
            set_bias(linear.module, piece.bias)
            _tell_size(linear)
        for vector in (placement.linear for placement in self._layout.vectors):
            vector.point_to(pieces[vector.name].weight)
        self._set(_attributes(self._layout, n_kept, queries) if self._layout.owner else {})

    def remove(self) -> None:
        """Make the sub-layer a zero: empty parameters, norms that do nothing."""
        self.restore()
        for norm in self._layout.norms:
            self._patch(norm, unchanged)
        if self._layout.owner is not None:
            recurrent = self._layout.output.sublayer == "recurrent"
            layer = None if recurrent else getattr(self._layout.owner, "layer_idx", None)
            self._patch(self._layout.owner, partial(_no_attention, layer, self._layout.returns))
            for module, returns in self._layout.parallel:
                self._patch(module, partial(_no_attention, None, returns))
        else:  # some families have no module for their MLP
            for placement in self._layout.placements:
                width = placement.linear.out_features if placement.axis else 0
                self._patch(placement.linear.module, partial(_zeros, width))
        for parameter, data in self._data:
            parameter.data = data.new_empty((0,) * data.ndim)
        for placement in self._layout.placements:
            _tell_size(placement.linear)

    def restore(self) -> None:
        """Put the same tensors back into the same parameters."""
        for parameter, data in self._data:
            parameter.data = data
        self._layout.output.module.bias = self._output_bias
        for placement in self._layout.placements:
            _tell_size(placement.linear)
        self._set(self._dense)
        for module in self._patched:
            del module.forward
        self._patched.clear()

    def _set(self, attributes: Mapping[str, Any]) -> None:
        for name, value in attributes.items():
            setattr(self._layout.owner, name, value)

    def _patch(self, module: nn.Module, forward: Any) -> None:
        module.forward = forward
        self._patched.append(module)


def _attributes(layout: SublayerLayout, n_groups: int, queries: int = 0) -> dict[str, Any]:
    """Attributes that attentions of the families read about their heads, as far as this one has them."""
    assert layout.owner is not None
    counts = head_counts(n_groups, queries or layout.heads_per_group, layout.head_dim)
    found: dict[str, Any] = {name: value for name, value in counts.items() if hasattr(layout.owner, name)}
    config = getattr(layout.owner, "config", None)
    if config is not None:  # Phi3 counts its query heads there; the model's own config is not changed
        config = copy.copy(config)
        for name in ("num_attention_heads", "num_key_value_heads"):
            if hasattr(config, name):
                setattr(config, name, counts[name])
        found["config"] = config
    return found


def head_counts(n_groups: int, heads_per_group: int, head_dim: int) -> dict[str, int]:
    """Numbers of so many KV groups, by the names that attentions of the families have for them."""
    heads = n_groups * heads_per_group
    return {
        "num_heads": heads,  # OPT, GPT-2
        "num_attention_heads": heads,
        "num_key_value_heads": n_groups,  # Phi3
        "num_kv_heads": n_groups,  # Falcon
        "num_key_value_groups": heads_per_group,  # query heads of each
        "split_size": heads * head_dim,  # GPT-2: the width of q, of k and of v
    }


def _tell_size(linear: Linear) -> None:
    """Update the module's record of its weight's size, which a Conv1D reads when it runs."""
    outputs, inputs = ("nf", "nx") if linear.transposed else ("out_features", "in_features")
    setattr(linear.module, outputs, linear.weight.shape[0])
    setattr(linear.module, inputs, linear.weight.shape[1])


def set_bias(module: nn.Module, bias: Tensor | None) -> None:
    """Point the module's bias to this tensor; a new parameter where it had none."""
    if bias is None:
        return
    parameter, weight = module._parameters["bias"], module._parameters["weight"]
    if parameter is None:
        assert weight is not None
        module.bias = nn.Parameter(bias, requires_grad=weight.requires_grad)
    else:
        parameter.data = bias


def unchanged(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Forward pass of a module that does nothing."""
    return hidden


def _zeros(width: int, hidden: Tensor) -> Tensor:
    return hidden.new_zeros(*hidden.shape[:-1], width)


def pass_through(block: nn.Module) -> RemovableHandle:
    """Make a block give the hidden states that it gets, until the handle is removed; what else it gives stays."""

    def give_back(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    return block.register_forward_hook(give_back, with_kwargs=True)


@contextmanager
def no_output(module: nn.Module, returns: Returns) -> Iterator[None]:
    """Context in which a module gives nothing for hidden states, as one that an export leaves out."""
    module.forward = returns.nothing
    try:
        yield
    finally:
        del module.forward


def _no_attention(layer: int | None, returns: Returns, *args: Any, **kwargs: Any) -> Any:
    """Nothing in place of the output of an attention, or of a recurrent mixer (`layer` is None).

    The cache gets one zero a token of an attention.

    So every layer of the cache knows how many tokens there were: the length that masks are made from is that of
    the first full and the first sliding layer, which may be this one.
    """
    hidden: Tensor = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    cache = next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)
    if cache is not None and layer is not None:
        nothing = hidden.new_zeros(hidden.shape[0], 1, hidden.shape[1], 1)
        cache.update(nothing, nothing, layer)
    return returns.nothing(*args, **kwargs)
