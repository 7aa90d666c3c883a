"""Running statistics of the inputs of projections over the calibration tokens, and of the whole model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from secateur.pruners.calibration.gradient_kinds import Kind
from secateur.pruners.models.anatomy import Block, Linear, Role

ROLES: tuple[Role, ...] = ("o", "down")
"""The output projections of attention and MLP."""

Hook = Callable[[nn.Module, tuple[Tensor, ...]], None]
"""Called before each forward pass of a projection."""

HookOf = Callable[[Linear], Hook | None]
"""The hook of a projection; None: it is not watched."""


@dataclass
class InputStatistics:
    """Running moments of a projection's inputs, accumulated in fp32.

    Args:
        n_tokens: calibration tokens seen.
        sum_squares: sum over tokens of the squared input, per feature.
        gram: sum over tokens of the outer product of the input with itself, or None if not collected.
        total: sum over tokens of the input, or None if not collected.
        routed_squares: of an expert, sum over tokens of the squared product of the input with the weight with which the
            token is routed to the expert; else None.
    """

    n_tokens: int
    sum_squares: Float[Tensor, " in"]
    gram: Float[Tensor, "in in"] | None
    total: Float[Tensor, " in"] | None = None
    routed_squares: Float[Tensor, " in"] | None = None
    roles: ClassVar[Sequence[str]] = get_args(Role)

    @classmethod
    def empty(cls, n_features: int, *, gram: bool, device: torch.device) -> InputStatistics:
        """Statistics of no tokens."""
        matrix = torch.zeros(n_features, n_features, device=device) if gram else None
        squares, total = torch.zeros(2, n_features, device=device)
        return cls(0, squares, matrix, total)

    def add(self, inputs: Float[Tensor, "... in"], routing: Float[Tensor, " tokens"] | None = None) -> None:
        """Add a batch of inputs, and the weights of an expert's tokens."""
        rows = inputs.reshape(-1, inputs.shape[-1]).float()
        if routing is not None:
            squares = (rows * routing[:, None].float()).square().sum(0)
            self.routed_squares = squares if self.routed_squares is None else self.routed_squares + squares
        self.n_tokens += rows.shape[0]
        if self.total is not None:
            self.total += rows.sum(0)
        if self.gram is None:
            self.sum_squares += rows.square().sum(0)
        else:
            self.gram.addmm_(rows.T, rows)
            self.sum_squares = self.gram.diagonal()

    @property
    def norm(self) -> Float[Tensor, " in"]:
        """Root mean square of each input feature: its l2 norm over the tokens, divided by sqrt(n_tokens)."""
        return (self.sum_squares / max(self.n_tokens, 1)).sqrt()

    @property
    def routed_norm(self) -> Float[Tensor, " in"]:
        """Likewise of the inputs times the weights of routing; outside of experts the same as `norm`."""
        squares = self.sum_squares if self.routed_squares is None else self.routed_squares
        return (squares / max(self.n_tokens, 1)).sqrt()


@dataclass
class OutputStatistics:
    """Running moments of the inputs of an output projection; sums over batches in fp64, the Gram matrix in fp32.

    Args:
        n_tokens: calibration tokens seen.
        total: sum over tokens of the input, per feature.
        total_abs: sum over tokens of its absolute value.
        sum_squares: sum over tokens of its square.
        window_squares: sum over windows of the squared mean over the window's tokens of its absolute value.
        gram: sum over tokens of the outer product of the input with itself, or None if not collected.
    """

    n_tokens: int
    total: Float[Tensor, " in"]
    total_abs: Float[Tensor, " in"]
    sum_squares: Float[Tensor, " in"]
    window_squares: Float[Tensor, " in"]
    gram: Float[Tensor, "in in"] | None
    roles: ClassVar[Sequence[str]] = ROLES

    @classmethod
    def empty(cls, n_features: int, *, gram: bool, device: torch.device) -> OutputStatistics:
        """Statistics of no tokens."""
        matrix = torch.zeros(n_features, n_features, device=device) if gram else None
        total, total_abs, squares, windows = torch.zeros(4, n_features, dtype=torch.float64, device=device)
        return cls(0, total, total_abs, squares, windows, matrix)

    def add(self, inputs: Float[Tensor, "windows length in"]) -> None:
        """Add whole windows."""
        inputs = inputs.float()
        rows = inputs.flatten(0, 1)
        self.n_tokens += rows.shape[0]
        self.total += rows.sum(0)
        self.sum_squares += rows.square().sum(0)
        absolute = inputs.abs().mean(1)
        self.total_abs += absolute.sum(0) * inputs.shape[1]
        self.window_squares += absolute.square().sum(0)
        if self.gram is not None:
            self.gram.addmm_(rows.T, rows)

    @property
    def mean(self) -> Float[Tensor, " in"]:
        return self.total / max(self.n_tokens, 1)

    @property
    def mean_abs(self) -> Float[Tensor, " in"]:
        return self.total_abs / max(self.n_tokens, 1)

    @property
    def variance(self) -> Float[Tensor, " in"]:
        """Over the tokens."""
        return (self.sum_squares / max(self.n_tokens, 1) - self.mean.square()).clamp_min(0.0)

    @property
    def norm(self) -> Float[Tensor, " in"]:
        """Root mean square."""
        return (self.sum_squares / max(self.n_tokens, 1)).sqrt()

    @property
    def second_moment(self) -> Float[Tensor, "in in"]:
        """The Gram matrix a token, in fp64."""
        assert self.gram is not None, "collected where the table of methods says so"
        return self.gram.double() / max(self.n_tokens, 1)


T = TypeVar("T", InputStatistics, OutputStatistics)


class Collector(Generic[T]):
    """Accumulator of inputs of projections; a tensor that several of them read in turn is added once, for all.

    Inputs of an expert are those of the tokens that are routed to it (or all, see `Experts.every_token`); in their
    output statistics, which are of windows elsewhere, each token is a window.

    Args:
        kind: `InputStatistics`, of all projections; `OutputStatistics`, of output projections alone.
        gram: collect Gram matrices.
        experts: collect `OutputStatistics` of routed experts, too.
    """

    def __init__(self, kind: type[T], length: int, *, gram: bool, experts: bool = False) -> None:
        self._kind: type[T] = kind
        self._length, self._gram = length, gram
        self._of_experts = experts or issubclass(kind, InputStatistics)
        self._last: Tensor | None = None
        self._last_name = ""
        self.found: dict[str, T] = {}
        """By the projection's full name; projections that read the same tensor share one object."""

    def of(self, block: Block) -> dict[str, T]:
        """Statistics of the block's projections, by their full names; empty of experts that no token was routed to.

        Raises:
            RuntimeError: if another one was not called.
        """
        missing = [linear for linear in block.linears if linear.name not in self.found]
        for linear in missing:
            if linear.expert is None:
                names = [x.name for x in missing]
                raise RuntimeError(
                    f"Expected a forward pass to call every projection, got no call of {names}."
                )
            self.found[linear.name] = self._empty(linear.weight, linear.in_features)
        return self.found

    def _empty(self, like: Tensor, n_features: int) -> T:
        return self._kind.empty(n_features, gram=self._gram, device=like.device)

    def hook(self, linear: Linear) -> Hook | None:
        """See `HookOf`."""

        def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            name, inputs = linear.name, args[0]
            if inputs is self._last:
                self.found.setdefault(name, self.found[self._last_name])
                return
            self._last, self._last_name = inputs, name
            if name not in self.found:
                self.found[name] = self._empty(inputs, inputs.shape[-1])
            found: Any = self.found[name]
            if linear.expert is not None and isinstance(found, InputStatistics):
                found.add(inputs, linear.expert.routing)
            elif linear.expert is not None:
                found.add(inputs[:, None])
            else:  # OPT's MLP reads windows that were joined.
                found.add(inputs.reshape(-1, self._length, inputs.shape[-1]))

        watched = linear.role in self._kind.roles and (linear.expert is None or self._of_experts)
        return add if watched else None


class InputRecorder:
    """Recorder of the inputs of a block's projections of some roles, in fp32, a row a token."""

    def __init__(self, *roles: Role) -> None:
        self._roles = roles
        self._rows: defaultdict[Role, list[Tensor]] = defaultdict(list)

    def hook(self, linear: Linear) -> Hook | None:
        """See `HookOf`."""

        def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._rows[linear.role].append(args[0].flatten(0, -2).float())

        return add if linear.role in self._roles else None

    def of(self, role: Role) -> Float[Tensor, "tokens in"]:
        return torch.cat(self._rows[role])


@dataclass(frozen=True)
class ModelStatistics:
    """Statistics of the dense model as a whole.

    Args:
        n_blocks: length of the stack.
        gradients: those that were collected, by kind (see `gradient_kinds.KINDS`, `pass_kinds.PASS_KINDS`)
            and the projection's full name.
        influence: of each block (see `shortgpt.block_influence`), where a depth rule needs it.
        windows: number and tokens of the windows that gradients are over.
    """

    n_blocks: int
    gradients: Mapping[Kind, Mapping[str, Float[Tensor, "..."]]]
    influence: tuple[float, ...] = ()
    windows: tuple[int, int] = (0, 0)
