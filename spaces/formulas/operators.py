"""Terminals and operators of formulas. `pruners.formulas` computes them.

Operators are not protected: a formula with an undefined operator is infeasible, with the reason. Differences from
Pruner-Zero (arXiv 2406.02924): ``log`` adds nothing to its argument, ``exp`` is not capped, ``/`` is element-wise, W
and G have no implicit absolute value, and X is a norm, not its square.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Source = Literal[
    "weights", "moments", "gram", "gradients", "damage", "contrast moments", "contrast gradients"
]

ATOM = 9
"""Precedence of terms that never need parentheses."""


@dataclass(frozen=True)
class Quantity:
    """A terminal, broadcast to the weights.

    Args:
        latex: its symbol.
        nonnegative: True if its values are >= 0.
        source: statistics it is computed from: weights, moments or Gram matrices of inputs, gradients, inputs weighted
            by the damage to tokens, or statistics of the second calibration set.
    """

    latex: str
    nonnegative: bool = True
    source: Source = "weights"


TERMINALS: dict[str, Quantity] = {
    # The weight.
    "W": Quantity("W", nonnegative=False),
    # Gradient of the loss, of each weight: root mean square over the calibration windows.
    "G": Quantity("G", source="gradients"),
    # Norm of each input channel: root mean square over the calibration tokens.
    "X": Quantity(r"\lVert X \rVert_2", source="moments"),
    # Diagonal of the inverse of the dampened second moment of the inputs, one value a channel.
    "H": Quantity(r"\operatorname{diag}(H^{-1})", source="gram"),
    # Sum of |W| over its row, and over its column.
    "R": Quantity(r"\lVert W_{i,:} \rVert_1"),
    "C": Quantity(r"\lVert W_{:,j} \rVert_1"),
    # Position of the block: 0 the first, 1 the last.
    "P": Quantity("p"),
    # X with tokens weighted by the divergence of a pruned model's predictions.
    "T": Quantity(r"\lVert X_{\mathrm{damaged}} \rVert_2", source="damage"),
    # X and G over the second calibration set (`evaluator.data.contrast`) in place of the first.
    "X2": Quantity(r"\lVert X' \rVert_2", source="contrast moments"),
    "G2": Quantity("G'", source="contrast gradients"),
}


@dataclass(frozen=True)
class Operator:
    """A function of one or two arguments.

    Args:
        latex: template with a placeholder for each argument.
        needs: least precedence of each argument without parentheses in LaTeX.
        binds: precedence of the result in LaTeX.
        infix: sign between two arguments in the text; "" for a call.
        precedence: of the infix form, higher binds tighter.
        commutative: True if the order of arguments has no effect.
    """

    latex: str
    needs: tuple[int, ...]
    binds: int = ATOM
    infix: str = ""
    precedence: int = ATOM
    commutative: bool = False

    @property
    def arity(self) -> int:
        """Number of arguments."""
        return len(self.needs)


# With the domain of those that are not defined everywhere.
OPERATORS: dict[str, Operator] = {
    "abs": Operator(r"\lvert {0} \rvert", (0,)),
    "neg": Operator("-{0}", (2,), 1),  # also written -x
    "sqrt": Operator(r"\sqrt{{{0}}}", (0,)),  # x >= 0
    "square": Operator("{0}^{{2}}", (ATOM,), 3),
    "log": Operator(r"\ln\left( {0} \right)", (0,)),  # x > 0
    "exp": Operator("e^{{{0}}}", (0,), 3),  # numbers whose exponential is finite
    "tanh": Operator(r"\tanh\left( {0} \right)", (0,)),
    # To [0, 1], and to mean 0 and standard deviation 1, over the whole matrix, which is not constant.
    "minmax": Operator(r"\operatorname{{minmax}}\left( {0} \right)", (0,)),
    "zscore": Operator(r"\operatorname{{zscore}}\left( {0} \right)", (0,)),
    # Fraction of the whole matrix that is smaller, equals counted half.
    "rank": Operator(r"\operatorname{{rank}}\left( {0} \right)", (0,)),
    "add": Operator("{0} + {1}", (1, 2), 1, "+", 1, commutative=True),
    "sub": Operator("{0} - {1}", (1, 2), 1, "-", 1),
    "mul": Operator(r"{0} \cdot {1}", (2, 3), 2, "*", 2, commutative=True),
    "div": Operator(r"\frac{{{0}}}{{{1}}}", (0, 0), infix="/", precedence=2),  # y != 0
    "pow": Operator("{0}^{{{1}}}", (ATOM, 0), 3),  # x > 0, or x = 0 and y >= 0, or x < 0 and y whole
    "min": Operator(r"\min\left( {0}, {1} \right)", (0, 0), commutative=True),
    "max": Operator(r"\max\left( {0}, {1} \right)", (0, 0), commutative=True),
}

INFIX: dict[str, str] = {row.infix: name for name, row in OPERATORS.items() if row.infix}
"""Operators by infix sign."""
