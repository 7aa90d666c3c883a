"""Row of a pruning method: what it needs, its parameters, its paper and the path of its function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from secateur.spaces.plugins import Row, resolve
from secateur.spaces.source import source_sha256

Stage = Literal["metric", "reconstruction", "importance", "repair", "allocation", "depth"]
Unit = Literal["weights", "structure", "blocks", "experts"]
UNITS: tuple[Unit, ...] = ("weights", "structure", "blocks", "experts")
"""Units of recipes."""

Scope = Literal["block", "model"]
Detail = Literal["nothing", "moments", "gram"]
"""Statistics of inputs: each detail includes those before it."""

Needs = Literal["nothing", "data", "moments", "gram"]
Gradients = Literal[
    "rms",
    "mean",
    "sums",
    "logits",
    "forward",
    "perturbed",
    "perturbed_round",
    "fisher",
    "fisher_outputs",
    "window_norms",
    "relevance",
    "damage_norms",
    "contrast_rms",
    "contrast_norms",
    "contrast_window_norms",
    "regularised",
    "fairness",
    "maskllm",
]
CONTRASTS: frozenset[Gradients] = frozenset(
    ("contrast_rms", "contrast_norms", "contrast_window_norms", "regularised", "fairness")
)
"""Statistics of the dense model that are of a second calibration set, or of both."""
CONTRAST = "contrast"
"""Name of the second calibration text among the sources of recipes."""

Evidence = Literal["scores", "influence", "flap", "outliers", "profile", "measured", "domains", "prompt"]
Comparison = Literal["output", "layer"]
Gives = Literal["nothing", "weight", "bias", "both"]


@dataclass(frozen=True)
class Parameter:
    """One parameter of an allocation rule, or of a reconstruction of structure.

    Args:
        name: beside ``rule`` in a recipe, or ``name`` of its metric.
        default: the published value.
        options: what a search tries: numbers, ascending, or names.
        low: the smallest number that makes sense.
        high: the largest number that makes sense.
        allows_protect: whether projections can be kept dense at another value than the default.
    """

    name: str
    default: float | str
    options: tuple[float | str, ...]
    low: float = 0.0
    high: float = 1.0
    allows_protect: bool = True

    def check(self, value: object, rule: str) -> None:
        """Raise a ValueError unless the parameter may have this value."""
        if isinstance(self.default, str):
            allowed, fits = f"one of {', '.join(map(str, self.options))}", value in self.options
        else:
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            allowed = f"a number from {self.low:g} to {self.high:g}"
            fits = is_number and self.low <= value <= self.high  # type: ignore[operator]
        if not fits:
            raise ValueError(f"Expected `{self.name}` to be {allowed}, got {value!r} at the rule {rule}.")


@dataclass(frozen=True)
class MethodRow(Row):
    """One method; its function is as `SIGNATURES` says.

    Args:
        name: in settings and recipes; alone in its stage and unit.
        stage: the step of pruning that it does.
        unit: what it prunes: single weights, KV groups and FFN channels (structure), whole blocks, or routed experts;
            of an allocation rule one or more of these, not blocks.
        path: of its function, ``module:name``; of a metric of weights also of a formula (see `formulas.tree`).
        summary: one line for people.
        paper: address.
        needs: calibration statistics that must be collected first: any data, moments or Gram matrices of inputs.
        gradients: kinds of gradients that must be collected first, of `KINDS`, `PASS_KINDS` or `CONTRAST_KINDS`.
        evidence: further inputs: of an allocation rule, ``influence`` of a depth rule; of a reconstruction of structure
            ``domains``, the source of each window, or ``prompt``, the token ids of its parameter of that name.
        parameters: of an allocation rule, or of a reconstruction of structure, which is given them by keyword.
        scope: what it works on at once, where that is not the usual of its stage: a reconstruction of whole blocks or
            of the model, a repair that needs the pruned model below.
        gives: what a repair changes beside what goes.
        comparison: of a metric or a reconstruction of weights, who competes with whom unless the settings say
            otherwise; None: nothing to choose.
        patterns: whether a reconstruction can prune n of m.
        group: length of the groups that a metric's scores are made for; None: any.
        trains: whether it trains by gradients.
        training_path: of one that does, a function ``(anatomy, windows, *, its parameters) -> the training's size``,
            from the number and the length of its calibration windows; "": its forecast leaves the training out.
        allows_protect: whether projections can be kept dense beside it; not where it cuts through all layers.
        check_path: of a function that raises a ValueError on a model that the method can't be used on; a reconstruction
            of structure's is given the parameters by keyword, too: ``(anatomy, *, its parameters)``.
        measure_path: of an allocation rule with the evidence ``measured``, a function ``(anatomy, sample, *, some of
            its parameters, the sparsity, or the layers with their scores) -> a number a layer``, computed once for its
            windows and these.
        searched: whether a search over recipes tries it where the settings name none; the first one of a unit is the
            default. Ours alone: what an installed package adds is tried where it is named.
    """

    name: str
    stage: Stage
    unit: Unit | tuple[Unit, ...]
    path: str
    summary: str
    paper: str = ""
    needs: Needs = "nothing"
    gradients: tuple[Gradients, ...] = ()
    evidence: tuple[Evidence, ...] = ()
    parameters: tuple[Parameter, ...] = ()
    scope: Scope | None = None
    gives: Gives = "nothing"
    comparison: Comparison | None = None
    patterns: bool = False
    group: int | None = None
    trains: bool = False
    training_path: str = ""
    allows_protect: bool = True
    check_path: str = ""
    measure_path: str = ""
    searched: bool = False

    @property
    def units(self) -> tuple[Unit, ...]:
        """The units that it prunes."""
        return self.unit if isinstance(self.unit, tuple) else (self.unit,)

    @property
    def kind(self) -> str:
        """Stage, unit and scope in words, a key of `SIGNATURES`."""
        if self.stage == "metric" and self.gradients:
            return "metric of weights with gradients"
        of = "" if self.stage == "allocation" else f" of {self.units[0]}"
        return f"{self.stage}{of}" + (
            f", {'a' if self.scope == 'block' else 'the'} {self.scope} at once" if self.scope else ""
        )

    @property
    def inputs(self) -> Detail:
        """Statistics of inputs that the caller collects; methods of whole blocks and models collect their own."""
        return "nothing" if self.needs == "data" or self.scope else self.needs

    @property
    def contrasts(self) -> bool:
        """True if it needs a second calibration set."""
        return not CONTRASTS.isdisjoint(self.gradients)

    @property
    def function(self) -> Any:
        """Its function, or the formula that it is."""
        return resolve(self.path)

    @property
    def source(self) -> str:
        """Hash of the source of its function, see `source_sha256`."""
        return source_sha256(self.function)

    def values(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Its parameters with these values, or their defaults."""
        return {x.name: given.get(x.name, x.default) for x in self.parameters}

    def check_protect(self, given: Mapping[str, Any], protect: Sequence[str]) -> None:
        """Raise a ValueError if it can't leave projections of these patterns dense, with these values."""
        values = self.values(given)
        through = [x.name for x in self.parameters if not x.allows_protect and values[x.name] != x.default]
        if through or not self.allows_protect:
            of = f"`{through[0]}` of the metric" if through else "the metric"
            mend = f"leave `{through[0]}` at its default" if through else "take another metric"
            raise ValueError(
                f"Expected no `protect` with {of} {self.name}, which cuts through all layers, got {protect[0]}. Leave "
                f"it out, or {mend}."
            )

    @property
    def check(self) -> Any:
        """The function at `check_path`; without one a function that accepts every model."""
        return resolve(self.check_path) if self.check_path else _accept

    @property
    def training(self) -> Any:
        """The function at `training_path`."""
        return resolve(self.training_path)

    @property
    def measure(self) -> Any:
        """The function at `measure_path`."""
        return resolve(self.measure_path)

    def keys(self, name: str) -> tuple[str, ...]:
        return tuple(f"{self.stage}/{unit}/{self.name}" for unit in self.units)

    def check_beside(self, others: Mapping[str, Any]) -> None:
        for other in others.values():
            for parameter in {x.name for x in self.parameters} & {x.name for x in other.parameters}:
                raise ValueError(
                    f"Expected a new parameter, got {parameter!r}, which the rule {other.name} has."
                )


def _accept(*model: Any, **parameters: Any) -> None:
    pass


SIGNATURES: dict[str, str] = {
    "metric of weights": "(weight, inputs, generator) -> a score a weight, or a formula",
    "metric of weights with gradients": "(weight, inputs, generator, *, gradients, windows, dampening) -> scores",
    "reconstruction of weights": "(layer, sparsities) -> the weight at each sparsity",
    "reconstruction of weights, a block at once": "(anatomy, block, tokens, states, sparsity, *, dampening) -> weights",
    "reconstruction of weights, the model at once": "(anatomy, tokens, sparsity, *, dampening, protected) -> weights",
    "reconstruction of structure, the model at once": (
        "(anatomy, layouts, tokens, sparsity, *, protected) -> units, weights, and hidden channels if fewer"
    ),
    "importance of structure": "(evidence) -> a score a unit",
    "importance of experts": "(evidence) -> a score an expert",
    "importance of experts, a block at once": "(evidence, counts) -> the kept experts of each count",
    "repair of experts": "(evidence, kept) -> the kept experts, and weights by name",
    "repair of weights": "(masked) -> the weight, or an addition to the bias",
    "repair of structure": "(inputs, counts) -> weights or biases, one a count",
    "repair of structure, the model at once": "(anatomy, layouts, stays, tokens) -> weights by projection",
    "repair of blocks": "(anatomy, runs, tokens, fitting) -> parameters by block",
    "allocation": "(layers, evidence, sparsity, *, its parameters) -> units that each layer loses",
    "depth of blocks": "(anatomy, tokens, whole) -> a score a block",
}
"""Parameters and results of the functions of each kind, see `MethodRow.kind`."""
