"""Directory of a saved model, whole or not there, with checks before it is written."""

from __future__ import annotations

import fcntl
import glob
import platform
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path

import torch
from safetensors import SafetensorError

from secateur.pruners.export.export_check import TOLERANCES, ExportError, dtype_name

SPARE_BYTES = 32 * 2**20
"""Needed beside the weights: tokenizer, config, logits of the check."""
LOCK = "export.lock"  # names the host of the process that fills a directory; it holds the lock as long as it lives


def check_destination(directory: Path) -> None:
    """Raise a ValueError unless the directory is new or empty."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        kind = "a directory that is not empty" if directory.is_dir() else "a file"
        raise ValueError(
            f"Expected a new or empty directory to export to, got {directory}, {kind}. Name another one."
        )


def check_dtypes(*dtypes: torch.dtype) -> None:
    """Raise a ValueError for a dtype whose rounding is not known."""
    for dtype in dtypes:
        if dtype not in TOLERANCES:
            names = ", ".join(map(dtype_name, TOLERANCES))
            raise ValueError(f"Expected `dtype` to be one of {names}, got {dtype_name(dtype)}. Choose one.")


@contextmanager
def new_directory(directory: Path, n_bytes: int, *, continued: bool = False) -> Iterator[tuple[Path, Path]]:
    """Yields a directory to fill and one for scratch; the filled one gets its final name if nothing is raised.

    Args:
        directory: absolute; must not exist or be empty.
        n_bytes: of what will be written.
        continued: both are at `unfinished`, with what a process wrote that was killed there, or left by any error but
            an ExportError.

    Raises:
        ValueError: if the directory is not empty.
        ExportError: if it can't be written, or another process wrote it. Nothing is left then, nor after other errors.
    """
    check_destination(directory)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        there = sum(x.stat().st_size for x in unfinished(directory).rglob("*")) if continued else 0
        needed, free = max(n_bytes - there, 0) + SPARE_BYTES, shutil.disk_usage(directory.parent).free
        if free < needed:  # a disk that fills up while writing names no numbers
            raise ExportError(
                f"Expected {needed / 1e6:.0f} MB of free space in {directory.parent}, got {free / 1e6:.0f} MB. Free "
                "some space or choose another directory, and export again."
            )
        beside = _continued(directory) if continued else _new_beside(directory)
        with beside as scratch, _locked(scratch):
            made = scratch / "model"
            made.mkdir(
                exist_ok=continued
            )  # with the usual permissions; those of `scratch` are its owner's alone
            yield made, scratch
            for file in made.iterdir():  # safetensors lets nobody but the owner read
                file.chmod(made.stat().st_mode & 0o666)
            try:
                made.rename(directory)
            except OSError as error:
                if not directory.exists():
                    raise
                raise ExportError(
                    f"Expected {directory} to stay free, got another process that exported there meanwhile. Repeat the "
                    "command to see whether it wrote the same model, or choose another directory."
                ) from error
    except (OSError, SafetensorError) as error:
        raise ExportError(
            f"Expected to write the model to {directory}, got: {' '.join(str(error).split())}. Free some space or "
            "choose another directory, and export again."
        ) from error


@contextmanager
def _new_beside(directory: Path) -> Iterator[Path]:
    """A new directory beside the destination, removed at the end."""
    # The suffix of a process that was killed is random, so the next one is not in its way.
    with tempfile.TemporaryDirectory(prefix=f".{directory.name}-", dir=directory.parent) as scratch:
        yield Path(scratch)


@contextmanager
def _continued(directory: Path) -> Iterator[Path]:
    """The directory `unfinished`, removed at the end; errors other than an ExportError, and kills, leave it."""
    scratch = unfinished(directory)
    scratch.mkdir(mode=0o700, exist_ok=True)
    try:
        yield scratch
    except ExportError:
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def _locked(scratch: Path) -> Iterator[None]:
    """Context in which this process holds the lock of a directory."""
    with (scratch / LOCK).open("a", buffering=1) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            lock.truncate(0)
            lock.write(f"{socket.gethostname()}\n")  # after the lock is held
        except BlockingIOError as error:  # only of an unfinished one, whose name others have, too
            raise ValueError(
                f"Expected no other process that exports by way of {scratch}, got one. Wait for it, or stop it."
            ) from error
        except OSError:  # without locks in this file system, what is left is not removed later
            pass
        yield


STREAMED = "streamed"
"""Suffix of the directory beside a destination that a streamed export goes on from; `leftovers` looks for 8 letters."""


def unfinished(directory: Path) -> Path:
    """Hidden directory of a streamed export to a destination, as long as it is not finished."""
    return directory.parent / f".{directory.name}-{STREAMED}"


def leftovers(parent: Path, name: str) -> list[Path]:
    """Leftovers of killed processes of this machine in a directory of exports with this name, or with any for ``*``."""
    dead = []
    for left in parent.glob(
        f".{name if name == '*' else glob.escape(name)}-{'?' * 8}"
    ):  # as tempfile names them
        with suppress(OSError), (left / LOCK).open("r+") as lock:
            if lock.read().strip() == socket.gethostname():
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while its process lives
                dead.append(left)
    return dead


def remove_leftovers(directory: Path, *, continued: bool = False) -> list[str]:
    """Remove leftovers of killed processes of this machine beside a destination, and return their paths.

    Args:
        continued: leave the one that a streamed export goes on from.
    """
    directory = directory.expanduser().absolute()
    dead = leftovers(directory.parent, directory.name)
    if continued:
        dead = [left for left in dead if left != unfinished(directory)]
    for left in dead:
        shutil.rmtree(left, ignore_errors=True)
    return [str(left) for left in dead if not left.exists()]


def versions() -> dict[str, str]:
    """Versions of the packages that made the model."""
    found = {"python": platform.python_version()}
    for package in ("secateur", "torch", "transformers"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # a checkout that is not installed
            found[package] = "unknown"
    return found
