"""Units that each layer loses at a sparsity, by an allocation rule."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from secateur.pruners.recipes.allocation.filling import wanted_weights
from secateur.pruners.recipes.allocation.layers import Layer, RuleEvidence, layers_sha256
from secateur.pruners.recipes.context import RecipeContext, Sample
from secateur.spaces.method import Unit
from secateur.spaces.methods import RULES
from secateur.spaces.names import nearest


def rules_for(unit: Unit) -> tuple[str, ...]:
    """Names of the rules for such units."""
    return tuple(name for name, row in RULES.items() if unit in row.units)


def defaults(rule: str) -> dict[str, float | str]:
    """The published values of a rule's parameters."""
    return {parameter.name: parameter.default for parameter in RULES[rule].parameters}


def check_rule(rule: str, unit: Unit, parameters: Mapping[str, object]) -> None:
    """Raise a ValueError unless there is such a rule, for such units, with such parameters."""
    if rule not in RULES:
        raise ValueError(f"Expected `rule` to be an allocation rule, got {rule!r}.{nearest(rule, RULES)}")
    if unit not in RULES[rule].units:
        raise ValueError(
            f"Expected a `rule` that spreads {unit}, got {rule}. Take one of {', '.join(rules_for(unit))}."
        )
    known = {parameter.name: parameter for parameter in RULES[rule].parameters}
    for name, value in parameters.items():
        if name not in known:
            raise ValueError(f"Expected parameters of the rule {rule}, got `{name}`.{nearest(name, known)}")
        known[name].check(value, rule)


def removed(
    config: Mapping[str, Any],
    layers: Sequence[Layer],
    context: RecipeContext,
    sample: Sample,
    **further: Callable[[], tuple[Any, ...]],
) -> tuple[int, ...]:
    """Number of units that each layer loses by a recipe; see `allocate`.

    Args:
        config: the recipe.
        further: functions that compute parts of `RuleEvidence` by name, called for the parts that the rule needs.

    Raises:
        BudgetError: if the rule can't reach the sparsity.
    """
    parameters = dict(config["allocation"])
    rule = parameters.pop("rule")
    parts: dict[str, Callable[[], tuple[Any, ...]]] = {
        "influence": lambda: sample.statistics.influence[: max(layer.block for layer in layers) + 1],
        "profile": lambda: tuple(context.profile),
        "measured": lambda: measured(rule, parameters, context, sample, config["sparsity"], layers),
        **further,
    }
    evidence = RuleEvidence(**{name: parts[name]() for name in RULES[rule].evidence if name in parts})
    return allocate(rule, layers, evidence, config["sparsity"], config["unit"], **parameters)


def measured(
    rule: str,
    parameters: Mapping[str, Any],
    context: RecipeContext,
    sample: Sample,
    sparsity: float,
    layers: Sequence[Layer],
) -> tuple[float, ...]:
    """Measurement of each layer by a rule's `MethodRow.measure`, made once for equal windows, parameters and scores."""
    row = RULES[rule]
    taken = inspect.signature(row.measure).parameters
    known = {"sparsity": sparsity, **_complete(rule, parameters)}
    given = {name: x for name, x in known.items() if name in taken}
    windows = "" if row.needs == "nothing" else sample.sha256
    scored = {"layers": layers} if "layers" in taken else {}
    seen = [layers_sha256(layers)] if scored else []
    found = context.made.get(
        ("measured", rule, windows, *sorted(given.items()), *seen),
        lambda: {"measured": row.measure(context.anatomy, sample, **given, **scored)},
    )
    numbers: tuple[float, ...] = found["measured"]
    return numbers


def allocate(
    rule: str,
    layers: Sequence[Layer],
    evidence: RuleEvidence,
    sparsity: float,
    unit: Unit | None = None,
    **parameters: int | float | str,
) -> tuple[int, ...]:
    """Number of units that each layer loses, at this share of all weights.

    The total is nearest to it, to within half of the smallest unit that may still be removed: a KV group, which is as
    large as many channels, is kept where it would exceed the budget, and channels are removed instead. The first
    block's attention keeps a group: caches read their length from it.

    Args:
        rule: a name of `RULES`.
        layers: all that share the budget, protected ones too.
        evidence: inputs of the rule beside the layers' scores.
        sparsity: share of the weights to remove, in [0, 1].
        unit: of the layers; None: weights if all units are of one weight, else structure.
        parameters: of the rule; others have their defaults.

    Returns:
        As many numbers as there are layers, in their order.

    Raises:
        BudgetError: if the rule can't remove as much.
        ValueError: on an unknown rule or parameter, or missing evidence.
    """
    is_weights = bool(layers) and all(layer.size == 1 for layer in layers)
    check_rule(rule, unit or ("weights" if is_weights else "structure"), parameters)
    if not 0 <= sparsity <= 1:
        raise ValueError(f"Expected `sparsity` within [0, 1], got {sparsity:g}. It is a share.")
    if not is_weights:
        layers = [
            replace(x, keep=max(x.keep, 1)) if (x.block, x.kind) == (0, "attention") else x for x in layers
        ]
    _check_needs(RULES[rule].evidence, layers, evidence, rule)
    if not wanted_weights(layers, sparsity):
        return (0,) * len(layers)
    gone = RULES[rule].function(layers, evidence, sparsity, **_complete(rule, parameters))
    return tuple(gone.tolist())


def _complete(rule: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """All parameters of a rule; numbers as a function takes them, 1.0 of 1."""
    return defaults(rule) | {name: float(x) if isinstance(x, int) else x for name, x in parameters.items()}


def _check_needs(needs: Sequence[str], layers: Sequence[Layer], evidence: RuleEvidence, rule: str) -> None:
    n_blocks = max(layer.block for layer in layers) + 1
    lengths = {
        "scores": (sum(len(layer.scores) > 0 or not layer.n_free for layer in layers), len(layers)),
        "influence": (len(evidence.influence), n_blocks),
        "flap": (len(evidence.flap), len(layers)),
        "outliers": (len(evidence.outliers), len(layers)),
        "profile": (min(len(evidence.profile), 1), 1),
        "measured": (len(evidence.measured), len(layers)),
    }
    for need in sorted(needs):
        got, expected = lengths[need]
        if got != expected:
            raise ValueError(
                f"Expected `{need}` of {expected} for the rule {rule}, got {got}. Give all of them."
            )
