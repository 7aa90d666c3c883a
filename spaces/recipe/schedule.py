"""Schedule of a recipe: rounds of pruning, with training in and around them; checks of both, and their tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from secateur.spaces.method import MethodRow, Unit
from secateur.spaces.methods import (
    BLOCK_RECONSTRUCTIONS,
    CUT_REPAIRS,
    MASK_REPAIRS,
    MODEL_RECONSTRUCTIONS,
    RULES,
    UNIT_RECONSTRUCTIONS,
    repairs_itself,
)
from secateur.spaces.recipe.keys import TRAINING, Flat

BATCH = 4
"""Windows of a step of training."""

PASSES = {"ce": 3, "kl": 4}
"""Forward passes that a trained token costs: its own, two for the backward pass, and the dense model's for ``kl``."""

OF_TRAINING = ("schedule.loss", "schedule.lr", "schedule.penalty")
"""Keys that need training."""


def check_schedule(unit: Unit, flat: Flat) -> None:
    """Check a schedule by itself, and against metric, rule and repair.

    Args:
        unit: of the recipe.
        flat: applicable values by ``section.key``; of a schedule only those that are not at their defaults.

    Raises:
        ValueError: if it contradicts itself, or there is a method that it can't serve.
    """
    given = [path for path in flat if path.startswith("schedule.")]
    if not given:
        return
    steps, step = flat.get("schedule.steps", 1), flat.get("schedule.step", 1)
    if steps > 1 and step < 1:
        raise ValueError(
            f"Expected one of `schedule.steps` and `schedule.step`, got {steps} and {step}. Remove one."
        )
    if "schedule.shape" in flat and steps == 1:
        raise ValueError(
            f"Expected `schedule.steps` > 1 with `schedule.shape: {flat['schedule.shape']}`, got 1. Say how many."
        )
    needing = [path for path in given if path in OF_TRAINING]
    if needing and not trains(flat):
        raise ValueError(
            f"Expected `schedule.retrain`, `schedule.before` or `schedule.after` with `{needing[0]}`, got none. Say "
            "how many tokens to train on, or remove it."
        )
    if "schedule.penalty" in flat and "schedule.retrain" not in flat:
        raise ValueError(
            "Expected `schedule.retrain` with `schedule.penalty`, which counts while it trains, got none. Say how "
            "many tokens to train on before what was chosen goes."
        )
    rule = flat.get("allocation.rule", "uniform")
    if in_rounds(flat) and looks_at_dense(rule):
        raise ValueError(
            f"Expected no `schedule` with the rule {rule}, which looks at the dense model, got one. Use another rule, "
            "or leave it out."
        )
    _check_methods(unit, flat)


def _check_methods(unit: Unit, flat: Flat) -> None:
    metric, repair = flat["metric.name"], flat["repair"]
    if prunes_at_once(metric):
        raise ValueError(
            f"Expected no `schedule` with the metric {metric}, which prunes more than a layer at once, got one. Leave "
            "it out, or take another metric."
        )
    if "schedule.penalty" in flat and repairs_itself(metric):
        raise ValueError(
            f"Expected a metric with scores for `schedule.penalty`, which makes what goes small before, got {metric}. "
            "Take another one, or leave the penalty out."
        )
    if not repair_goes_on(unit, flat, repair):
        raise ValueError(
            f"Expected a repair that rounds can go on from with this `schedule`, got {repair!r}. Say `repair: none`; "
            "without a penalty one that changes the weights of single layers alone fits, too."
        )


def trains(flat: Flat) -> bool:
    """True if the schedule trains."""
    return any(flat.get(path, 0) for path in TRAINING)


def in_rounds(flat: Flat) -> bool:
    """True if there are several rounds."""
    return bool(flat.get("schedule.steps", 1) > 1 or flat.get("schedule.step", 1) < 1)


def prunes_at_once(metric: str) -> bool:
    """True for metrics that give the weights of several layers together, and can't go on from a pruned model."""
    return metric in {**MODEL_RECONSTRUCTIONS, **BLOCK_RECONSTRUCTIONS, **UNIT_RECONSTRUCTIONS}


def repair_goes_on(unit: Unit, flat: Flat, repair: str) -> bool:
    """True if rounds can go on from repaired weights, or none do: KV groups and channels are else repaired once."""
    if repair == "none" or (not trains(flat) and (unit != "weights" or not in_rounds(flat))):
        return True
    of: dict[str, Mapping[str, MethodRow]] = {"weights": MASK_REPAIRS, "structure": CUT_REPAIRS}
    rows = of.get(unit, {})
    alone = repair in rows and rows[repair].gives in ("nothing", "weight")
    return alone and not flat.get("schedule.penalty", 0)


def looks_at_dense(rule: str) -> bool:
    """True if the rule compares a layer with the dense model's, so that it can't go on where it stopped."""
    row = RULES[rule]
    return not {"flap", "profile"}.isdisjoint(row.evidence) or (
        "measured" in row.evidence and "structure" in row.units
    )


def shares_of(config: Mapping[str, Any]) -> list[float]:
    """Share that is removed after each round, ascending, the recipe's sparsity last; it alone without a schedule.

    The shape ``cubic`` is that of Zhu and Gupta (2017, arXiv 1710.01878): ``s (1 - (1 - t / n)^3)`` after t of n
    rounds, fast at first and slow at the end.

    Args:
        config: the recipe's complete plain form.
    """
    schedule, sparsity = config.get("schedule", {}), config["sparsity"]
    n_rounds, cubic = schedule.get("steps", 1), schedule.get("shape") == "cubic"
    if n_rounds > 1:
        left = [1 - number / n_rounds for number in range(1, n_rounds)]
        return [*(sparsity * (1 - (x**3 if cubic else x)) for x in left), sparsity]
    step = schedule.get("step", 1.0)
    whole = [step * number for number in range(1, int(sparsity / step) + 1)]
    return [*(share for share in whole if share < sparsity * (1 - 1e-9)), sparsity]


def n_steps(tokens: int, length: int) -> int:
    """Steps of training on at least so many tokens, in windows of this length."""
    return -(-tokens // (BATCH * length))


def untrained(config: Mapping[str, Any]) -> dict[str, Any]:
    """The complete plain form of the same recipe with its rounds, and without training in or around them."""
    left_out = {path.partition(".")[2] for path in (*TRAINING, *OF_TRAINING)}
    rounds = {key: value for key, value in config.get("schedule", {}).items() if key not in left_out}
    form = {key: value for key, value in config.items() if key != "schedule"}
    return form | ({"schedule": rounds} if rounds else {})


def trained_tokens(config: Mapping[str, Any]) -> int:
    """Tokens that a recipe trains on, in whole steps, repetitions counted."""
    of, length = config.get("schedule", {}), int(config["calibration"]["length"])
    steps = [n_steps(of.get(name, 0), length) for name in ("before", "retrain", "after")]
    return (steps[0] + steps[1] * len(shares_of(config)) + steps[2]) * BATCH * length


def computed_tokens(config: Mapping[str, Any]) -> int:
    """Tokens of forward passes that a recipe's training costs, see `PASSES`."""
    if not config["sparsity"]:
        return 0
    return PASSES[config.get("schedule", {}).get("loss", "ce")] * trained_tokens(config)
