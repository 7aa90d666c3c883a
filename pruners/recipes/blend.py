"""Blended metric of weights and of units: weight, input, gradient and curvature, with exponents."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from secateur.pruners.calibration.gradient_kinds import Kind
from secateur.pruners.calibration.statistics import InputStatistics, ModelStatistics
from secateur.pruners.models.anatomy import Linear, Role
from secateur.pruners.models.layout import SublayerLayout
from secateur.pruners.models.placement import Placement
from secateur.pruners.structure.evidence import Evidence
from secateur.spaces.method import Comparison, Detail

Order = Literal["none", "first", "second", "mixed"]
Absolute = Literal["element", "vector"]
Norm = Literal[1, 2, "inf"]
Reduce = Literal["sum", "mean", "max", "prod", "output"]
Matrix = Literal["q", "k", "v", "o", "gate", "up", "down"]
Gradients: TypeAlias = Mapping[Kind, Mapping[str, Float[Tensor, "..."]]]
"""Gradients of the dense model, by kind and the projection's full name."""

FUSED: dict[Role, tuple[Matrix, ...]] = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}
MAX_EXPONENT = 2.0


@dataclass(frozen=True)
class Blend:
    """One point of the metric subspace.

    [INFER] AdaPruner (Kong et al., AAAI 2025, arXiv 2503.06184) searches a space of metrics that it does not print;
    this one holds LLM-Pruner's, Wanda's and magnitude as points. The value of a weight is
    ``|w|^p ||x||^q (alpha w g - beta w^2 F / 2)`` with g the gradient of the mean loss, F the diagonal of the
    empirical Fisher matrix and ``||x||`` the root mean square of the weight's input.

    Args:
        order: which terms of the loss's expansion are in: none (their place is taken by a 1), ``w g``, ``w^2 F / 2``,
            or both.
        angle: of mixed orders, in [0, 1]: ``alpha = cos(angle pi / 2)``, ``beta = sin(angle pi / 2)``.
        magnitude: p, in [0, 2].
        activation: q, in [0, 2]. Of units, the factor is on the weights of the output projection alone.
        absolute: of units: each value without its sign, or the sum over a row (a column of output projections).
        norm: of units: over all that `absolute` leaves of one unit and one matrix.
        reduce: of units: over the matrices that it has a part in. A product has `weights` as exponents; `output` is
            the value of the output projection alone.
        weights: of units: of each matrix in `reduce`, in [0, 1]; 1 where nothing is said. Fused projections count as
            the matrices that are in them.
        comparison: of weights: who competes with whom.

    Raises:
        ValueError: on a value out of its range, or a blend that is the same for every weight.
    """

    order: Order = "none"
    angle: float = 0.5
    magnitude: float = 1.0
    activation: float = 0.0
    absolute: Absolute = "element"
    norm: Norm = 1
    reduce: Reduce = "sum"
    weights: Mapping[str, float] = field(default_factory=dict)
    comparison: Comparison = "output"

    def __post_init__(self) -> None:
        _within("angle", self.angle, 1.0)
        _within("magnitude", self.magnitude, MAX_EXPONENT)
        _within("activation", self.activation, MAX_EXPONENT)
        for name, weight in self.weights.items():
            if name not in get_args(Matrix):
                known = ", ".join(get_args(Matrix))
                raise ValueError(f"Expected `metric.weights` of {known}, got one of {name!r}.")
            _within(f"weights.{name}", weight, 1.0)
        if self.order == "none" and not self.magnitude and not self.activation:
            raise ValueError(
                "Expected `metric.magnitude` or `metric.activation` > 0 where `metric.order` is none, got 0 for both. "
                "Such a metric tells no weight from another."
            )

    @classmethod
    def of(cls, metric: Mapping[str, Any]) -> Blend:
        """From a recipe's section `metric` as written, but for `name` and `group_size`; 1 is a number, too."""
        given = {name: value for name, value in metric.items() if name not in ("name", "group_size")}
        numbers = {name: float(given[name]) for name in ("angle", "magnitude", "activation") if name in given}
        weights = {name: float(value) for name, value in given.get("weights", {}).items()}
        return cls(**given | numbers | {"weights": weights})

    @property
    def gradients(self) -> tuple[Kind, ...]:
        """Kinds of gradients that must be collected."""
        return ORDERS[self.order][0]

    @property
    def needs(self) -> Detail:
        """Statistics of inputs that must be collected."""
        return "moments" if self.activation else "nothing"

    @property
    def compares(self) -> Comparison:
        """See `Method.compares`."""
        return self.comparison

    def scores(
        self, linear: Linear, inputs: InputStatistics | None, whole: ModelStatistics | None = None
    ) -> Float[Tensor, "out in"]:
        """Importance of each weight of a projection, in fp32, higher = keep: the value without its sign.

        Args:
            linear: live and dense.
            inputs: its statistics; None unless `needs` them.
            whole: with `gradients`; None if there are none.
        """
        norm = None if inputs is None else inputs.norm
        return _values(linear, self, {} if whole is None else whole.gradients, norm).abs()


def unit_scores(evidence: Evidence, blend: Blend) -> Float[Tensor, " units"]:
    """Importance of each unit of a sub-layer, in fp64, higher = keep.

    Raises:
        ValueError: if the weights of all matrices of the sub-layer are 0.
    """
    layout = evidence.layout
    found: dict[str, Tensor] = {}
    for placement in layout.placements:
        last = placement.linear is layout.output
        if last or blend.reduce != "output":
            norm = evidence.seen.norm if last and blend.activation else None
            values = _values(placement.linear, blend, evidence.gradients, norm)
            found |= dict(_by_matrix(values if placement.axis == 0 else values.T, placement, layout))
    sizes = {name: _size(values, blend) for name, values in found.items()}
    if blend.reduce == "output":
        return next(iter(sizes.values()))
    weights = torch.tensor([blend.weights.get(name, 1.0) for name in sizes], dtype=torch.float64)
    if not weights.any():
        raise ValueError(
            f"Expected one of `metric.weights` of {', '.join(sizes)} > 0, got 0 for all at {layout.name}. Raise one."
        )
    stacked = torch.stack([*sizes.values()])
    return REDUCTIONS[blend.reduce](stacked, weights.to(stacked.device)[:, None])


def _values(
    linear: Linear, blend: Blend, gradients: Gradients, norm: Float[Tensor, " in"] | None
) -> Float[Tensor, "out in"]:
    """With signs, in fp32; without the factor of the inputs where there is no norm."""
    weight = linear.weight.float()
    kinds, value = ORDERS[blend.order]
    values = value(weight, {kind: gradients[kind][linear.name].to(weight) for kind in kinds}, blend)
    if blend.magnitude:
        values = values * weight.abs() ** blend.magnitude
    if blend.activation and norm is not None:
        values = values * norm.to(weight) ** blend.activation
    return values


def _by_matrix(
    values: Float[Tensor, "axis others"], placement: Placement, layout: SublayerLayout
) -> Iterator[tuple[str, Float[Tensor, "units entries others"]]]:
    """The matrices in a projection, a row a unit: those that are fused are taken apart."""
    role, units = placement.linear.role, layout.n_units
    names: tuple[str, ...] = FUSED.get(role, (role,))
    pieces = [
        part.reshape(units, -1, values.shape[1])
        for part in values.split([units * size for size in placement.parts])
    ]
    if len(pieces) < len(names):  # one unit's entries of all matrices stand together
        head = layout.head_dim
        widths = {"qkv": (layout.heads_per_group * head, head, head), "gate_up": (1, 1)}
        pieces = list(pieces[0].split(widths[role], dim=1))
    yield from zip(names, pieces, strict=True)


def _size(values: Float[Tensor, "units entries others"], blend: Blend) -> Float[Tensor, " units"]:
    """Size of each unit's part of one matrix."""
    left = values.flatten(1) if blend.absolute == "element" else values.sum(2)
    size: Tensor = torch.linalg.vector_norm(left, float(blend.norm), dim=1, dtype=torch.float64)
    return size


# Of each weight, signed, from the weight and its gradients by kind.
Value = Callable[[Float[Tensor, "out in"], Mapping[Kind, Float[Tensor, "out in"]], Blend], Tensor]


def _first(weight: Tensor, gradients: Mapping[Kind, Tensor], blend: Blend) -> Float[Tensor, "out in"]:
    return weight * gradients["mean"]


def _second(weight: Tensor, gradients: Mapping[Kind, Tensor], blend: Blend) -> Float[Tensor, "out in"]:
    return (weight * gradients["rms"]).square() / 2


def _mixed(weight: Tensor, gradients: Mapping[Kind, Tensor], blend: Blend) -> Float[Tensor, "out in"]:
    turn = blend.angle * math.pi / 2
    first, second = _first(weight, gradients, blend), _second(weight, gradients, blend)
    return math.cos(turn) * first - math.sin(turn) * second


# The kinds of gradients that must be collected first, and the value.
ORDERS: dict[Order, tuple[tuple[Kind, ...], Value]] = {
    "none": ((), lambda weight, gradients, blend: torch.ones_like(weight)),
    "first": (("mean",), _first),
    "second": (("rms",), _second),
    "mixed": (("rms", "mean"), _mixed),
}

REDUCTIONS: dict[Reduce, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": lambda sizes, weights: (weights * sizes).sum(0),
    "mean": lambda sizes, weights: (weights * sizes).sum(0) / weights.sum(),
    "max": lambda sizes, weights: (weights * sizes).amax(0),
    "prod": lambda sizes, weights: (sizes**weights).prod(0),
}


def _within(name: str, value: float, top: float) -> None:
    if not 0 <= value <= top:  # NaN too
        raise ValueError(f"Expected `metric.{name}` in [0, {top:g}], got {value}.")
