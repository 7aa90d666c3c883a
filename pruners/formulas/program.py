"""Formulas as plain data: what a program may look like, and what it needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from secateur.pruners.formulas.operations import OPERATIONS
from secateur.pruners.formulas.terminals import TERMINALS

Program: TypeAlias = str | float | tuple[Any, ...]
"""A terminal's name, a number, or an operator's name and its arguments: ``("mul", ("abs", "W"), "X")``."""


@dataclass(frozen=True)
class Needs:
    """What has to be collected before a program can run.

    Args:
        inputs: nothing, second moments, or Gram matrices of the layer's inputs.
        gradients: gradients of the loss.
    """

    inputs: Literal["nothing", "moments", "gram"]
    gradients: bool


def needs(program: object) -> Needs:
    """What a program needs.

    Raises:
        ValueError: if it is no program.
    """
    passes = {TERMINALS[name] for name in used(program)}
    inputs: Literal["gram", "moments"] = "gram" if "gram" in passes else "moments"
    return Needs(inputs if passes & {"gram", "moments"} else "nothing", "gradients" in passes)


def used(program: object) -> frozenset[str]:
    """Names of the terminals in it.

    Raises:
        ValueError: if it is no program.
    """
    if isinstance(program, tuple) and program:
        operator, *arguments = program
        if isinstance(operator, str) and OPERATIONS.get(operator, (0,))[0] == len(arguments) > 0:
            return frozenset().union(*map(used, arguments))
    elif isinstance(program, str) and program in TERMINALS:
        return frozenset({program})
    elif isinstance(program, float):
        return frozenset()
    raise ValueError(
        f"Expected a program of {', '.join(TERMINALS)}, numbers, and (operator, arguments ...) with one of "
        f"{', '.join(OPERATIONS)}, got {program!r}."
    )
