"""Description of a model: what its blocks consist of, and what of them can be pruned."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from secateur.search.app.session import Say, silent, usage_errors

if TYPE_CHECKING:
    from secateur.pruners.models.anatomy import Anatomy
    from secateur.pruners.models.loading import LoadedModel

WINDOW, N_TOKENS = 256, 8192
"""Tokens of text that routing is counted on, in windows of so many."""


@usage_errors()
def describe_model(model: str, *, say: Say = silent, **loading: Any) -> dict[str, Any]:
    """Mixers of a model's blocks, its parameters by what happens to them, and whether its units can be cut.

    Args:
        model: see `load_model`.
        say: given progress, one line at a time.
        loading: of `load_model`: dtype, device, trust_remote_code.

    Returns:
        ``family``; ``blocks``, by their mixers the number of blocks; ``parameters``, one row for each path within a
        block, see `ParameterRow`; ``units``, ``works`` or the reason why not; ``zeros``, the share of the prunable
        weights that are zero already; ``bos``, the token that windows begin with; ``starved_experts``, the experts that
        too few of 8,192 tokens of the packages' documentation are routed to, with how many.

    Raises:
        UsageError: if the model can't be loaded, or is of a kind that can't be pruned.
    """
    from secateur.pruners.calibration.tokens import bos_token
    from secateur.pruners.models.account import account, zeros_of
    from secateur.pruners.models.discover import dissect
    from secateur.pruners.models.find_layout import find_layouts
    from secateur.pruners.models.loading import load_model

    say(f"loading {model}")
    loaded = load_model(model, say=say, **loading)
    anatomy = dissect(loaded.model, bos_token(loaded.tokenizer))
    try:
        find_layouts(anatomy, experts=True)
        units = "works"
    except ValueError as error:
        units = str(error)
    return {
        "family": anatomy.family,
        "blocks": dict(Counter(" + ".join(mixer.kind for mixer in block.mixers) for block in anatomy.blocks)),
        "parameters": [asdict(row) for row in account(anatomy)],
        "units": units,
        "zeros": zeros_of(anatomy),
        "bos": anatomy.bos,
        "starved_experts": _starved(loaded, anatomy),
    }


def _starved(loaded: LoadedModel, anatomy: Anatomy) -> dict[str, int]:
    """Tokens of the experts that get too few of the packages' documentation; nothing of a model without mixtures."""
    from secateur.evaluators.data.text import load_parts
    from secateur.evaluators.data.tokens import windows
    from secateur.pruners.experts.routing import starved_experts

    if not any(block.mixture for block in anatomy.blocks):
        return {}
    text = load_parts("docs", "docs", "docs")["calibration"]
    tokens = windows(loaded.tokenizer, text, WINDOW, N_TOKENS, bos=anatomy.bos)
    return starved_experts(anatomy, tokens)
