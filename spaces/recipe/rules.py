"""Allocation rules by name: how many units go of each layer at a sparsity."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from secateur.spaces.names import nearest
from secateur.spaces.recipe.filling import wanted_weights
from secateur.spaces.recipe.layers import Evidence, Ints, Layer
from secateur.spaces.recipe.profiles import prefix, shares_of_file
from secateur.spaces.recipe.shares import adapt, cfsp, owl, uniform
from secateur.spaces.recipe.thresholds import NORMALISATIONS, flap, nirvana, one_threshold

RuleUnit = Literal["weights", "structure"]
Need = Literal["scores", "influence", "flap", "outliers", "profile"]
BOTH: frozenset[RuleUnit] = frozenset({"weights", "structure"})
WEIGHTS: frozenset[RuleUnit] = frozenset({"weights"})
STRUCTURE: frozenset[RuleUnit] = frozenset({"structure"})


@dataclass(frozen=True)
class Knob:
    """One parameter of a rule.

    Args:
        name: beside ``rule`` in a recipe.
        default: the published value.
        options: what a search tries: numbers, ascending, or names.
        low: the smallest number that makes sense.
        high: the largest number that makes sense.
    """

    name: str
    default: float | str
    options: tuple[float | str, ...]
    low: float = 0.0
    high: float = 1.0

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
class RuleRow:
    """A rule of the registry.

    Args:
        function: from layers, evidence, sparsity and the rule's parameters to units that go of each layer.
        units: what it can spread.
        knobs: its parameters.
        needs: what the layers or the evidence must hold.
        paper: where it comes from.
        summary: one line for lists.
    """

    function: Callable[..., Ints]
    units: frozenset[RuleUnit]
    knobs: tuple[Knob, ...]
    needs: frozenset[Need]
    paper: str
    summary: str


RULES: dict[str, RuleRow] = {
    "uniform": RuleRow(
        uniform,
        BOTH,
        (
            Knob("skip_first", 0.0, (0.0, 0.0625, 0.125, 0.1875, 0.25), high=0.9),
            Knob("skip_last", 0.0, (0.0, 0.0625, 0.125, 0.1875, 0.25), high=0.9),
        ),
        frozenset(),
        "https://arxiv.org/abs/2305.11627",
        "the same share everywhere, first and last blocks may be left alone",
    ),
    "global": RuleRow(
        one_threshold,
        BOTH,
        (
            Knob("normalise", "none", tuple(NORMALISATIONS)),
            Knob("cost", 0.0, (-1.0, -0.5, 0.0, 0.5, 1.0), low=-2.0, high=2.0),
        ),
        frozenset({"scores"}),
        "https://arxiv.org/abs/2412.12441",
        "one threshold for the scores of all layers",
    ),
    "flap": RuleRow(
        flap,
        STRUCTURE,
        (),
        frozenset({"flap"}),
        "https://arxiv.org/abs/2312.11983",
        "one threshold for the standardised fluctuations of all layers",
    ),
    "nirvana": RuleRow(
        nirvana,
        STRUCTURE,
        (Knob("gamma", 3.36, (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.36, 4.0, 6.0), low=0.01, high=100.0),),
        frozenset({"scores"}),
        "https://arxiv.org/abs/2509.14230",
        "MLPs lose a multiple of what attentions lose, with a threshold for each",
    ),
    "cfsp": RuleRow(
        cfsp,
        BOTH,
        (
            Knob("a", 1.0, (0.25, 0.5, 1.0, 2.0, 4.0), high=100.0),
            Knob("sublayers", "mlp", ("mlp", "both")),
        ),
        frozenset({"influence"}),
        "https://arxiv.org/abs/2409.13199",
        "what blocks keep follows the sigmoid of their influence",
    ),
    "adapt": RuleRow(
        adapt,
        BOTH,
        (Knob("rate", 0.02, (0.005, 0.01, 0.015, 0.02, 0.03, 0.04)),),
        frozenset({"influence"}),
        "https://arxiv.org/abs/2502.03460",
        "shares that grow step by step, faster where blocks matter less",
    ),
    "owl": RuleRow(
        owl,
        WEIGHTS,
        (
            Knob("spread", 0.08, (0.02, 0.04, 0.08, 0.12, 0.16, 0.2)),
            Knob("factor", 5.0, (3.0, 5.0, 7.0, 10.0), low=1.0, high=1000.0),
        ),
        frozenset({"outliers"}),
        "https://arxiv.org/abs/2310.05175",
        "layers with many outliers lose less",
    ),
    "profile": RuleRow(
        shares_of_file,
        BOTH,
        (),
        frozenset({"profile"}),
        "https://arxiv.org/abs/2410.14649",
        "shares from a file",
    ),
    "prefix": RuleRow(
        prefix,
        STRUCTURE,
        (),
        frozenset({"profile"}),
        "https://arxiv.org/abs/2406.10594",
        "whole sub-layers in the order of a file",
    ),
}


def rules_for(unit: RuleUnit) -> tuple[str, ...]:
    """Names of the rules that spread such units."""
    return tuple(name for name, row in RULES.items() if unit in row.units)


def defaults(rule: str) -> dict[str, float | str]:
    """The published values of a rule's parameters."""
    return {knob.name: knob.default for knob in RULES[rule].knobs}


def check_rule(rule: str, unit: RuleUnit, parameters: Mapping[str, object]) -> None:
    """Raise a ValueError unless there is such a rule, for such units, with such parameters."""
    if rule not in RULES:
        raise ValueError(f"Expected `rule` to be an allocation rule, got {rule!r}.{nearest(rule, RULES)}")
    if unit not in RULES[rule].units:
        raise ValueError(
            f"Expected a `rule` that spreads {unit}, got {rule}. Take one of {', '.join(rules_for(unit))}."
        )
    knobs = {knob.name: knob for knob in RULES[rule].knobs}
    for name, value in parameters.items():
        if name not in knobs:
            raise ValueError(f"Expected parameters of the rule {rule}, got `{name}`.{nearest(name, knobs)}")
        knobs[name].check(value, rule)


def allocate(
    rule: str, layers: Sequence[Layer], evidence: Evidence, sparsity: float, **parameters: float | str
) -> tuple[int, ...]:
    """How many units go of each layer, at this share of all their weights.

    The total is nearest to it, to within half of the smallest unit that may still go; so that a KV group, which is as
    large as many channels, is left out where it would lead beyond, and channels go instead. Of sub-layers the first
    block's attention keeps a group: caches read their length from it.

    Args:
        rule: a name of `RULES`.
        layers: all that share the budget, protected ones too.
        evidence: what the rule needs beside the layers' scores.
        sparsity: share of the weights to remove, in [0, 1].
        parameters: the rule's own; those that are missing have their defaults.

    Returns:
        As many numbers as there are layers, in their order.

    Raises:
        BudgetError: if the rule can't remove as much.
        ValueError: if the rule and what it is given don't fit together.
    """
    is_weights = bool(layers) and all(layer.size == 1 for layer in layers)
    check_rule(rule, "weights" if is_weights else "structure", parameters)
    if not 0 <= sparsity <= 1:
        raise ValueError(f"Expected `sparsity` within [0, 1], got {sparsity:g}. It is a share.")
    if not is_weights:
        layers = [_with_cache(layer) for layer in layers]
    _check_needs(RULES[rule].needs, layers, evidence, rule)
    if not wanted_weights(layers, sparsity):
        return (0,) * len(layers)
    gone = RULES[rule].function(layers, evidence, sparsity, **defaults(rule) | parameters)
    return tuple(gone.tolist())


def _with_cache(layer: Layer) -> Layer:
    is_first = layer.block == 0 and layer.kind == "attention"
    return replace(layer, keep=max(layer.keep, 1)) if is_first else layer


def _check_needs(needs: frozenset[Need], layers: Sequence[Layer], evidence: Evidence, rule: str) -> None:
    n_blocks = max(layer.block for layer in layers) + 1
    lengths = {
        "scores": (sum(len(layer.scores) > 0 or not layer.n_free for layer in layers), len(layers)),
        "influence": (len(evidence.influence), n_blocks),
        "flap": (len(evidence.flap), len(layers)),
        "outliers": (len(evidence.outliers), len(layers)),
        "profile": (min(len(evidence.profile), 1), 1),
    }
    for need in sorted(needs):
        got, expected = lengths[need]
        if got != expected:
            raise ValueError(
                f"Expected `{need}` of {expected} for the rule {rule}, got {got}. Give all of them."
            )
