"""Modules of one's own metrics on their way to workers that lack them."""

from __future__ import annotations

import atexit
import importlib
import importlib.util
import shutil
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from secateur.spaces.methods import is_path

MOST_BYTES = 10_000_000
"""Largest size of the Python files of a module that is sent."""


@dataclass(frozen=True)
class SentModule:
    """Top-level module as text.

    Args:
        name: of the module.
        files: paths, relative to where it lies, with their texts.
    """

    name: str
    files: tuple[tuple[str, str], ...]


def modules_of(names: Iterable[str]) -> tuple[SentModule, ...]:
    """Top-level modules of the paths among these names, our own left out.

    Raises:
        ValueError: if one is no Python file or package of them, or too large.
    """
    tops = sorted(
        {name.partition(":")[0].partition(".")[0] for name in names if is_path(name)} - {"secateur"}
    )
    return tuple(_module(top) for top in tops)


def install(modules: Iterable[SentModule]) -> None:
    """Make modules importable that this process does not find, from a directory that goes with it."""
    missing = [module for module in modules if importlib.util.find_spec(module.name) is None]
    if not missing:
        return
    directory = Path(tempfile.mkdtemp(prefix="secateur-modules-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    for module in missing:
        for name, text in module.files:
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_text(text, encoding="utf-8")
    sys.path.append(str(directory))
    importlib.invalidate_caches()


def _module(top: str) -> SentModule:
    spec = importlib.util.find_spec(top)
    places = [Path(place) for place in (spec and spec.submodule_search_locations) or ()]
    if not places and spec is not None and spec.origin is not None and spec.origin.endswith(".py"):
        found = [(Path(spec.origin).name, Path(spec.origin))]
    else:
        found = [
            ((Path(top) / file.relative_to(place)).as_posix(), file)
            for place in places
            for file in sorted(place.rglob("*.py"))
        ]
    if not found or sum(path.stat().st_size for _, path in found) > MOST_BYTES:
        raise ValueError(
            f"Expected the module {top} of a metric as Python files of at most {MOST_BYTES:,} bytes, to send it to "
            f"workers, got {len(found)} files. Move the metric into a module of its own."
        )
    return SentModule(top, tuple((name, path.read_text(encoding="utf-8")) for name, path in found))
