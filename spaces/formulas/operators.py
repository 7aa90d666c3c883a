"""Terminals and operators of formulas, with their domains in words. `pruners.formulas` computes them.

Operators are not protected: a formula with an undefined operator is infeasible, with the reason. Differences from
Pruner-Zero (arXiv 2406.02924): ``log`` adds nothing to its argument, ``exp`` is not capped, ``/`` is element-wise, W
and G have no implicit absolute value, and X is a norm, not its square.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Shape = Literal["weight", "input", "output", "layer"]
"""One value for each weight, input channel (column), output (row), or layer; broadcast to the weights."""

Source = Literal["weights", "moments", "gram", "gradients"]

ATOM = 9
"""Precedence of terms that never need parentheses."""


@dataclass(frozen=True)
class Quantity:
    """A terminal.

    Args:
        summary: one line.
        shape: of its values.
        latex: its symbol.
        nonnegative: True if its values are >= 0.
        source: statistics it is computed from: weights, moments or Gram matrices of inputs, or gradients.
    """

    summary: str
    shape: Shape
    latex: str
    nonnegative: bool
    source: Source = "weights"


# fmt: off
TERMINALS: dict[str, Quantity] = {
    "W": Quantity("the weight", "weight", "W", False),
    "G": Quantity("gradient of the loss: root mean square over the calibration windows",
                  "weight", "G", True, "gradients"),
    "X": Quantity("norm of each input: root mean square over the calibration tokens",
                  "input", r"\lVert X \rVert_2", True, "moments"),
    "H": Quantity("diagonal of the inverse of the dampened second moment of the inputs",
                  "input", r"\operatorname{diag}(H^{-1})", True, "gram"),
    "R": Quantity("sum of |W| over its row", "output", r"\lVert W_{i,:} \rVert_1", True),
    "C": Quantity("sum of |W| over its column", "input", r"\lVert W_{:,j} \rVert_1", True),
    "P": Quantity("position of the block: 0 the first, 1 the last", "layer", "p", True),
}
# fmt: on


@dataclass(frozen=True)
class Latex:
    """LaTeX form of an operator.

    Args:
        template: with a placeholder for each argument.
        needs: least precedence of each argument without parentheses.
        binds: precedence of the result.
    """

    template: str
    needs: tuple[int, ...]
    binds: int = ATOM


@dataclass(frozen=True)
class Operator:
    """A function of one or two arguments.

    Args:
        arity: number of arguments.
        domain: in words.
        latex: its LaTeX form.
        infix: sign between two arguments; "" for a call.
        precedence: of the infix form, higher binds tighter.
        commutative: True if the order of arguments has no effect.
        summary: explanation, if the name is not enough.
    """

    arity: int
    domain: str
    latex: Latex
    infix: str = ""
    precedence: int = ATOM
    commutative: bool = False
    summary: str = ""


_ALL = "all numbers"
_MATRIX = "matrices that are not constant"

# fmt: off
OPERATORS: dict[str, Operator] = {
    "abs": Operator(1, _ALL, Latex(r"\lvert {0} \rvert", (0,))),
    "neg": Operator(1, _ALL, Latex("-{0}", (2,), 1), summary="also written -x"),
    "sqrt": Operator(1, "x >= 0", Latex(r"\sqrt{{{0}}}", (0,))),
    "square": Operator(1, _ALL, Latex("{0}^{{2}}", (ATOM,), 3)),
    "log": Operator(1, "x > 0", Latex(r"\ln\left( {0} \right)", (0,))),
    "exp": Operator(1, "numbers whose exponential is finite", Latex("e^{{{0}}}", (0,), 3)),
    "tanh": Operator(1, _ALL, Latex(r"\tanh\left( {0} \right)", (0,))),
    "minmax": Operator(1, _MATRIX, Latex(r"\operatorname{{minmax}}\left( {0} \right)", (0,)),
                       summary="to [0, 1], over the whole matrix"),
    "zscore": Operator(1, _MATRIX, Latex(r"\operatorname{{zscore}}\left( {0} \right)", (0,)),
                       summary="to mean 0 and standard deviation 1, over the whole matrix"),
    "rank": Operator(1, _ALL, Latex(r"\operatorname{{rank}}\left( {0} \right)", (0,)),
                     summary="fraction of the whole matrix that is smaller, equals counted half"),
    "add": Operator(2, _ALL, Latex("{0} + {1}", (1, 2), 1), "+", 1, commutative=True),
    "sub": Operator(2, _ALL, Latex("{0} - {1}", (1, 2), 1), "-", 1),
    "mul": Operator(2, _ALL, Latex(r"{0} \cdot {1}", (2, 3), 2), "*", 2, commutative=True),
    "div": Operator(2, "y != 0", Latex(r"\frac{{{0}}}{{{1}}}", (0, 0)), "/", 2),
    "pow": Operator(2, "x > 0, or x = 0 and y >= 0, or x < 0 and y whole", Latex("{0}^{{{1}}}", (ATOM, 0), 3)),
    "min": Operator(2, _ALL, Latex(r"\min\left( {0}, {1} \right)", (0, 0)), commutative=True),
    "max": Operator(2, _ALL, Latex(r"\max\left( {0}, {1} \right)", (0, 0)), commutative=True),
}
# fmt: on

INFIX: dict[str, str] = {row.infix: name for name, row in OPERATORS.items() if row.infix}
"""Operators by infix sign."""
