"""Published metrics as formulas: starting points and baselines of a search."""

from __future__ import annotations

from dataclasses import dataclass

from secateur.spaces.formulas.grammar import parse
from secateur.spaces.formulas.metric import formula_of
from secateur.spaces.formulas.tree import Tree


@dataclass(frozen=True)
class KnownFormula:
    """A published formula.

    Args:
        text: see `grammar`.
        summary: one line, with differences from the paper.
        paper: address.
    """

    text: str
    summary: str
    paper: str


# fmt: off
KNOWN: dict[str, KnownFormula] = {
    "magnitude": KnownFormula("abs(W)", "compared over the layer", "https://arxiv.org/abs/1506.02626"),
    "wanda": KnownFormula("abs(W) * X", "compared per output", "https://arxiv.org/abs/2306.11695"),
    "ria": KnownFormula("(abs(W) / R + abs(W) / C) * sqrt(X)",
                        "compared per output; undefined where a row or column is zero",
                        "https://openreview.net/forum?id=Tr0lPx9woF"),
    "gblm": KnownFormula(
        "abs(W) * (X + 25 * G)",
        "the released script's weighting in our units, for its 128 windows of 2048 tokens; the metric takes any",
        "https://arxiv.org/abs/2311.04902"),
    "pruner-zero": KnownFormula("abs(W * W) * minmax(G)", "the best formula published", "https://arxiv.org/abs/2406.02924"),
    "obs": KnownFormula("square(W) / H", "optimal brain surgeon's saliency per weight, without the update",
                 "https://arxiv.org/abs/2301.00774"),
}
# fmt: on


def known_tree(name: str) -> Tree:
    """Published formula of this name, or the formula given by ``formula: abs(W) * X``.

    Raises:
        FormulaTextError: if the text is not a formula.
        ValueError: for an unknown name.
    """
    given = formula_of(name)
    if given is None and name not in KNOWN:
        raise ValueError(
            f"Expected `known` out of {', '.join(KNOWN)}, or formulas such as `formula: abs(W) * X`, got {name!r}."
        )
    return parse(KNOWN[name].text) if given is None else given
