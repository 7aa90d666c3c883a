"""Experts of mixtures as modules of separate projections, in place of transformers' fused tensors, and back."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

PROBE_TOKENS = 8
PROBE_SCALES = (1.0, 16.0)
"""Sizes of a probe's inputs: large ones reach the limits of clamped activations."""

Activation = Callable[[Any, Tensor, Tensor], Tensor]
"""From the fused module, the gate's output and the up projection's to the input of the down projection."""


def _gated(fused: Any, gate: Tensor, up: Tensor) -> Tensor:
    product: Tensor = fused.act_fn(gate) * up
    return product


def _clamped(fused: Any, gate: Tensor, up: Tensor) -> Tensor:
    """Gate clamped from above, up from both sides."""
    limit = fused.swiglu_limit if hasattr(fused, "swiglu_limit") else fused.limit
    act = fused.act_fn if hasattr(fused, "act_fn") else nn.functional.silu
    inner: Tensor = act(gate.clamp(max=limit)) * up.clamp(-limit, limit)
    return inner


def _clamped_sigmoid(fused: Any, gate: Tensor, up: Tensor) -> Tensor:
    """Activation of gpt-oss (arXiv 2508.10925): clamped, with a scaled sigmoid and one added to up."""
    gate = gate.clamp(max=fused.limit)
    inner: Tensor = (up.clamp(-fused.limit, fused.limit) + 1) * gate * torch.sigmoid(gate * fused.alpha)
    return inner


ACTIVATIONS: tuple[Activation, ...] = (_gated, _clamped, _clamped_sigmoid)


@dataclass(frozen=True)
class FusedForm:
    """Form of the fused tensors of a mixture.

    Args:
        transposed: matrices are stored ``in out``.
        interleaved: rows of gate and up alternate; else all of gate's come first.
        activation: what stands between up and down; of experts without a gate the gate's output is empty.
    """

    transposed: bool
    interleaved: bool
    activation: Activation


FORMS = tuple(FusedForm(*parts) for parts in product((False, True), (False, True), ACTIVATIONS))


class Expert(nn.Module):
    """One expert: gate, up and down as linears that are views on the fused tensors.

    Attributes:
        tokens: numbers of the tokens that it runs on, while it runs in its mixture.
        routing: weights of these tokens; 0: not routed to it.
    """

    def __init__(self, fused: nn.Module, index: int, form: FusedForm) -> None:
        super().__init__()
        self._fused: tuple[Any, ...] = (fused,)  # in a tuple, so that it is no submodule
        self._form = form
        up, up_bias = _slice(fused, up_name(fused), index, form)
        if _gateless(fused):
            self.gate_proj = None
            self.up_proj = _linear(up, up_bias)
        else:
            self.gate_proj, self.up_proj = (
                _linear(_half(up, side, form), None if up_bias is None else _half(up_bias, side, form))
                for side in (0, 1)
            )
        self.down_proj = _linear(*_slice(fused, DOWN, index, form))
        self.tokens: Tensor | None = None
        self.routing: Tensor | None = None

    def forward(self, hidden: Float[Tensor, "tokens width"]) -> Float[Tensor, "tokens width"]:
        output: Tensor = self.down_proj(self.channels(hidden))
        return output

    def channels(self, hidden: Float[Tensor, "tokens width"]) -> Float[Tensor, "tokens channels"]:
        """Input of the down projection."""
        up, fused = self.up_proj(hidden), self._fused[0]
        if self.gate_proj is None:
            inner: Tensor = fused.act_fn(up)
            return inner
        return self._form.activation(fused, self.gate_proj(hidden), up)

    def run(
        self, hidden: Tensor, tokens: Int[Tensor, " tokens"], routing: Float[Tensor, " tokens"]
    ) -> Tensor:
        """Outputs for tokens with these numbers and weights, which hooks can see."""
        self.tokens, self.routing = tokens, routing
        try:
            output: Tensor = self(hidden)
            return output
        finally:
            self.tokens = self.routing = None


class Experts(nn.ModuleList):
    """The experts of a mixture in order; called as the fused module that it stands for.

    Attributes:
        kept: numbers of the experts that the router knows, in its order.
        transposed: the fused matrices are stored ``in out``.
        n_channels: channels of each expert, whole.
        every_token: run each expert on all tokens, not only on those that are routed to it, so that hooks on its
            projections see them; the output stays the same.
    """

    def __init__(self, fused: nn.Module, form: FusedForm) -> None:
        n_experts = getattr(fused, DOWN).shape[0]
        super().__init__(Expert(fused, index, form) for index in range(n_experts))
        self._fused: tuple[Any, ...] = (fused,)
        self._form = form
        self.transposed = form.transposed
        self.n_channels: int = getattr(fused, DOWN).shape[1 if form.transposed else 2]
        self._stacked = len(inspect.signature(fused.forward).parameters) == 1
        self.kept: Sequence[int] = range(n_experts)
        self.every_token = False

    def forward(self, hidden_states: Tensor, *routing: Tensor, **named: Tensor) -> Tensor:
        """Weighted sum of the experts' outputs.

        Args:
            hidden_states: ``tokens width``; of the families that scale inputs and not outputs a copy for each
                expert, one after the other, zero where the token isn't routed to it.
            routing: ``tokens k`` numbers of experts and their weights; none with inputs that are scaled.
        """
        output, weighted = torch.zeros_like(hidden_states), (*routing, *named.values())
        for place, (rows, weights) in enumerate(self.routed(hidden_states, *weighted)):
            expert: Any = self[self.kept[place]]
            inputs, first = self._inputs(hidden_states, place)
            if self.every_token:
                every = torch.arange(len(inputs), device=rows.device)
                result = expert.run(
                    inputs, every, weights.new_zeros(len(inputs)).index_copy(0, rows, weights)
                )[rows]
            elif len(rows):
                result = expert.run(inputs[rows], rows, weights)
            else:
                continue
            output.index_add_(0, rows + first, (result * weights[:, None]).to(output.dtype))
        return output

    def routed(
        self, hidden_states: Tensor, *routing: Tensor
    ) -> Iterator[tuple[Int[Tensor, " routed"], Float[Tensor, " routed"]]]:
        """For each kept expert the tokens that are routed to it, and their weights."""
        for place in range(len(self.kept)):
            if self._stacked:
                rows = self._inputs(hidden_states, place)[0].any(-1).nonzero()[:, 0]
                yield rows, hidden_states.new_ones(len(rows))
            else:
                index, weights = routing
                rows, rank = torch.where(index == place)
                yield rows, weights[rows, rank]

    def summed(self, output: Float[Tensor, "rows width"]) -> Float[Tensor, "tokens width"]:
        """Sum over the experts of what this module gave."""
        return output.view(len(self.kept), -1, output.shape[-1]).sum(0) if self._stacked else output

    def _inputs(self, hidden_states: Tensor, place: int) -> tuple[Tensor, int]:
        """All that an expert could get, a row a token, and the place of the first row."""
        if not self._stacked:
            return hidden_states, 0
        of_experts = hidden_states.view(len(self.kept), -1, hidden_states.shape[-1])
        return of_experts[place], place * of_experts.shape[1]

    def fused(self) -> nn.Module:
        """The module that this one stands for, with the present weights of the kept experts."""
        fused: nn.Module = copy.copy(self._fused[0])
        fused._parameters = dict(fused._parameters)
        experts: list[Any] = [self[index] for index in self.kept]
        fused.num_experts = len(experts)  # type: ignore[assignment]  # a plain attribute
        ups = [_joined(expert, self._form) for expert in experts]
        downs = [(expert.down_proj.weight, expert.down_proj.bias) for expert in experts]
        for own, pieces in ((up_name(fused), ups), (DOWN, downs)):
            weight = torch.stack([weight.data for weight, _ in pieces])
            _set(fused, own, weight.mT.contiguous() if self._form.transposed else weight)
            if pieces[0][1] is not None:
                _set(fused, f"{own}_bias", torch.stack([bias.data for _, bias in pieces if bias is not None]))
        return fused


UP, DOWN = ("gate_up_proj", "up_proj"), "down_proj"
"""Names of fused tensors."""


def split_experts(model: nn.Module) -> None:
    """Replace the fused experts of a model by modules that compute the same, see `Experts`; no tensor is copied.

    How a family stacks its tensors, and what its activation is, is found by comparing a few random tokens. Modules
    that already are split stay.

    Raises:
        ValueError: if fused experts compute something else.
    """
    forms = list(FORMS)
    for name, module in list(model.named_modules()):
        if is_fused(module):
            parent = model.get_submodule(name.rpartition(".")[0])
            form = next((form for form in forms if equals(module, form)), None)
            if form is None:
                raise ValueError(
                    f"Expected fused experts with gate, up and down projections, got {type(module).__name__}, which "
                    f"computes something else [at {name}]. This mixture can't be pruned."
                )
            setattr(parent, name.rpartition(".")[2], Experts(module, form))
            for parameter in module.parameters(recurse=False):  # the experts' views keep what is still used
                parameter.data = parameter.data.new_empty(0)
            forms.sort(key=lambda other: other is not form)  # tried first at the next one


@contextmanager
def joined_experts(model: nn.Module) -> Iterator[None]:
    """Context in which split experts are replaced by the fused modules that they stand for, with their weights."""
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, Experts)]
    places = [(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name, _ in found]
    try:
        for (parent, own), (_, module) in zip(places, found, strict=True):
            setattr(parent, own, module.fused())
        yield
    finally:
        for (parent, own), (_, module) in zip(places, found, strict=True):
            setattr(parent, own, module)


def is_fused(module: nn.Module) -> bool:
    """True for a module whose parameters are stacks of experts' matrices."""
    own = {name: p for name, p in module.named_parameters(recurse=False) if not name.endswith("_bias")}
    known = own.keys() in ({UP[0], DOWN}, {UP[1], DOWN})
    return known and all(parameter.ndim == 3 for parameter in own.values())


def _gateless(fused: nn.Module) -> bool:
    return not hasattr(fused, UP[0])


def up_name(fused: nn.Module) -> str:
    """Name of the stack of gate and up, or of up alone."""
    return UP[1] if _gateless(fused) else UP[0]


def _slice(fused: nn.Module, name: str, index: int, form: FusedForm) -> tuple[Tensor, Tensor | None]:
    """Weight ``out in`` and bias of one expert, as views."""
    weight, bias = getattr(fused, name).data[index], getattr(fused, f"{name}_bias", None)
    return weight.mT if form.transposed else weight, None if bias is None else bias.data[index]


def _half(tensor: Tensor, side: int, form: FusedForm) -> Tensor:
    """Rows of gate (0) or up (1)."""
    return tensor[side::2] if form.interleaved else tensor.chunk(2)[side]


def _joined(expert: Any, form: FusedForm) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of gate and up together."""
    gate, up = expert.gate_proj, expert.up_proj
    if gate is None:
        return up.weight, up.bias

    def join(first: Tensor, second: Tensor) -> Tensor:
        return (
            torch.stack([first, second], 1).flatten(0, 1) if form.interleaved else torch.cat([first, second])
        )

    return join(gate.weight, up.weight), None if up.bias is None else join(gate.bias, up.bias)


def _linear(weight: Float[Tensor, "out in"], bias: Float[Tensor, " out"] | None) -> nn.Linear:
    """A linear of these very tensors."""
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


def _set(fused: nn.Module, name: str, tensor: Tensor) -> None:
    setattr(fused, name, nn.Parameter(tensor, requires_grad=False))


def _fits(fused: nn.Module, form: FusedForm) -> bool:
    """True if the sizes of the projections fit each other."""
    (up, up_bias), (down, down_bias) = (_slice(fused, name, 0, form) for name in (up_name(fused), DOWN))
    width, inner = down.shape
    rows = inner if _gateless(fused) else 2 * inner
    biases = ((up_bias, rows), (down_bias, width))
    return up.shape == (rows, width) and all(bias is None or len(bias) == n for bias, n in biases)


@torch.no_grad()
def equals(fused: nn.Module, form: FusedForm) -> bool:
    """True if experts of this form compute what the fused module does."""
    if not _fits(fused, form):
        return False
    down: Tensor = getattr(fused, DOWN)
    n_experts, width = down.shape[0], down.shape[2 if form.transposed else 1]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(n_experts, PROBE_TOKENS, width, generator=generator)
    with suppress(AttributeError):  # of the activation, that the module hasn't
        split = Experts(fused, form)
        for scale in PROBE_SCALES:
            hidden = (noise * scale).to(down)
            inputs: tuple[Tensor, ...] = (hidden.flatten(0, 1),)
            if not split._stacked:
                index = torch.arange(PROBE_TOKENS, device=down.device)[:, None] % n_experts
                inputs = (hidden[0], index, torch.full_like(index, 2).to(down))
            wanted, got = fused(*inputs), split(*inputs)
            tolerance = 64 * torch.finfo(wanted.dtype).eps * float(wanted.abs().max())
            if not torch.allclose(got, wanted, rtol=0.0, atol=tolerance):
                return False
        return True
    return False
