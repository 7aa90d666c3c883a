"""Description of a model: what its blocks consist of, and what of them can be pruned."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any

from secateur.search.app.session import Say, silent, usage_errors


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
        weights that are zero already; ``bos``, the token that windows begin with.

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
        find_layouts(anatomy)
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
    }
