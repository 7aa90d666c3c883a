"""Directories in the user's cache: built once, whole or not at all, and checked when used."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from secateur.pruners.models.checkpoints.directory import hash_files

RECORD = "sha256"


def cache_root() -> Path:
    """``$SECATEUR_CACHE``, else ``$XDG_CACHE_HOME/secateur``, else ``~/.cache/secateur``."""
    own = os.environ.get("SECATEUR_CACHE")
    if own:
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "secateur"


def cached(key: str, build: Callable[[Path], None]) -> Path:
    """The cached directory `key`; built if it isn't there, and again if its content has changed.

    Several processes may ask at once: one builds, the others wait. A build that fails leaves nothing behind.

    Args:
        key: a file name.
        build: fills the empty directory that it is given.

    Raises:
        OSError: if the cache can't be written.
    """
    root = cache_root()
    place = root / key
    if _is_whole(place):
        return place
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f"{key}.lock", fallback_to_soft=False):
        if not _is_whole(place):  # no one else has built it meanwhile
            _replace(place, build)
    return place


def _replace(place: Path, build: Callable[[Path], None]) -> None:
    """Build beside `place`, on the same file system, and put the result there in one step."""
    with tempfile.TemporaryDirectory(prefix=f"{place.name}.", dir=place.parent) as temporary:
        fresh = Path(temporary) / "fresh"
        fresh.mkdir()
        build(fresh)
        (fresh / RECORD).write_text(hash_files(_content(fresh)) + "\n", encoding="ascii")
        shutil.rmtree(place, ignore_errors=True)
        fresh.rename(place)


def _is_whole(place: Path) -> bool:
    """True if the directory's files are those that were built."""
    try:
        record = (place / RECORD).read_text(encoding="ascii").strip()
        return record == hash_files(_content(place))
    except (FileNotFoundError, NotADirectoryError, UnicodeDecodeError):
        return False


def _content(directory: Path) -> list[Path]:
    return [path for path in directory.iterdir() if path.name != RECORD]
