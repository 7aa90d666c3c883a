"""Pruning into the shapes of a stock class, without a search: the default of ``secateur prune``."""

from __future__ import annotations

from secateur.search.app.candidate_file import CandidateFile
from secateur.search.app.pruning_file import CALIBRATION, checked
from secateur.search.errors import UsageError
from secateur.spaces.recipe.known import KNOWN

STOCK = "hf-stock"
SHARE = 0.2
"""Share of the blocks that is pruned in `stock_file`, unless another is asked for."""

TOKENS, WINDOW = 16384, 512


def stock_file(
    recipe: str | None = None,
    sparsity: float | None = None,
    source: str | None = None,
    form: str | None = None,
) -> CandidateFile:
    """Equal blocks, as few as possible dropped, by importance and repair of a published recipe.

    Args:
        recipe: whose importance and repair are used; None: those of a search by default (``obs``, where the
            memory allows it).
        sparsity: share of the blocks' parameters to remove; None: `SHARE`.
        source: of the calibration text.
        form: export format; None: `STOCK`.

    Raises:
        UsageError: if the recipe does not leave all blocks alike.
    """
    space: dict[str, object] = {"kind": "architecture", "tied": True, "target_format": form or STOCK}
    if recipe is not None:
        space |= _method_of(recipe)
    calibration = {"text": source or CALIBRATION, "tokens": TOKENS, "window": WINDOW}
    candidate = {"uniform": SHARE if sparsity is None else sparsity}
    return checked(CandidateFile, {"space": space, "candidate": candidate, "calibration": calibration})


def _method_of(name: str) -> dict[str, str]:
    """Importance and repair of a recipe."""
    form = KNOWN[name].form
    if not _leaves_alike(name):
        alike = ", ".join(sorted(x for x in KNOWN if _leaves_alike(x)))
        raise UsageError(
            f"Expected a recipe that leaves all blocks alike for the format {STOCK} ({alike}), got {name}. Take one of "
            "them, another format, or no recipe."
        )
    return {"importance": form["metric"], "repair": form.get("repair", "none")}


def _leaves_alike(name: str) -> bool:
    form = KNOWN[name].form
    plain = isinstance(form["metric"], str) and form.get("allocation", "uniform") == "uniform"
    return KNOWN[name].unit == "structure" and plain
