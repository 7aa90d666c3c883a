"""Manifest of an exported model, `secateur.json`: its origin, method, counts and checks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from secateur.spaces.plain_files import check_plain

MANIFEST = "secateur.json"
UNSTRUCTURED = "unstructured: no smaller and no faster on stock servers (the zeros are stored)"

_IDENTITY = (
    "parent",
    "fingerprint",
    "format",
    "method",
    "candidate",
    "asked",
    "kept",
    "calibration",
    "seeds",
)


@dataclass(frozen=True)
class Manifest:
    """The record of one export, in plain JSON types.

    Args:
        parent: the model that was pruned, as a person would load it: a hub id or a path.
        fingerprint: hash of the parent's weights.
        method: metric and how it was applied, e.g. ``{"metric": "wanda", "calibration": "sequential"}``.
        candidate: the canonical text of the candidate, or "" if there is none.
        asked: the sparsity asked of each linear, a fraction of zeros in [0, 1], by module path.
        calibration: source, number of tokens and hash of the calibration set.
        seeds: by their use.
        measured: objectives by data, e.g. ``{"test:32768": {"loss": 0.87}}``.
        label: expected gain in size and speed, in words, e.g. `UNSTRUCTURED`.
        revision: the parent's revision, if it has one.
        format: of the directory, a name in `FORMATS`; ``hf`` loads with stock transformers.
        kept: for a structured model, what each block of the parent keeps: ``kv_groups`` (a KV head with its query
            heads) and ``ffn`` (channels); 0 = that sub-layer is removed; ``queries``: query heads of each KV head,
            where not all stay.
        dtype: of the saved weights; the export fills in this and all that follows.
        zeros: counted in the saved weight of each linear in `asked`.
        weights: number of weights of each of these.
        indices: which ``kv_groups``, ``ffn`` channels and ``queries`` of the parent these are, in the order in which
            they are stored, by the parent's block path, and which hidden ``channels`` of the parent, at ``hidden``;
            ranges as ``0-3,7``.
        shapes: heads and widths of each block of the saved model, by its path.
        parameters: of the ``parent`` and as ``saved``, a tied weight counted once.
        size_bytes: of the weight files.
        files: ``size_bytes`` and ``sha256`` of every other file of the export by path; of earlier versions, none.
        versions: of secateur, torch, transformers and Python.
        checks: results of the checks by name.
        parent_zeros: share of the parent's prunable weights that were zeros before.
        not_understood: numbers of parameters of the parent's blocks that nothing here understands, by path; they are
            as they were.
        texts: sources of the texts that `measured` is about, by part, e.g. ``test``; of earlier versions, none.
    """

    parent: str
    fingerprint: str
    method: Mapping[str, Any]
    candidate: str
    asked: Mapping[str, float]
    calibration: Mapping[str, Any]
    seeds: Mapping[str, int]
    measured: Mapping[str, Mapping[str, float]]
    label: str
    revision: str | None = None
    format: str = "hf"
    kept: Sequence[Mapping[str, int]] = field(default_factory=list)
    dtype: str = ""
    zeros: Mapping[str, int] = field(default_factory=dict)
    weights: Mapping[str, int] = field(default_factory=dict)
    indices: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    shapes: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    parameters: Mapping[str, int] = field(default_factory=dict)
    size_bytes: int = 0
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    checks: Mapping[str, Any] = field(default_factory=dict)
    parent_zeros: float = 0.0
    not_understood: Mapping[str, int] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """The text of ``secateur.json``."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Inverse of `to_json`; keys that it does not know are ignored, so that older readers keep working.

        Raises:
            ValueError: if the text is no manifest.
        """
        return TypeAdapter(cls).validate_json(text)


def manifest_of(directory: Path) -> Manifest | None:
    """Manifest of an exported directory; None if it has none that can be read."""
    try:
        check_plain(directory / MANIFEST)
        return Manifest.from_json((directory / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def same_export(directory: Path, manifest: Manifest, dtype: str = "") -> Manifest | None:
    """The manifest of this export, if a directory holds it already: same parent, candidate, method, data and seeds.

    Versions and measurements are not compared, nor is the dtype unless it is asked for, e.g. ``bfloat16``. Its files
    are checked, see `check_files`.
    """
    there = manifest_of(directory)
    if there is None or dtype not in {"", there.dtype}:
        return None
    wanted = Manifest.from_json(manifest.to_json())  # both as JSON gives them
    # These two are not known before pruning by some methods.
    compared = [name for name in _IDENTITY if name not in ("asked", "kept") or getattr(wanted, name)]
    if any(getattr(there, name) != getattr(wanted, name) for name in compared):
        return None
    check_files(directory)
    return there


def weight_bytes(directory: Path) -> int:
    """Size of the weight files of a saved model."""
    return sum(x.stat().st_size for x in directory.iterdir() if x.suffix in {".safetensors", ".gguf"})


def file_records(directory: Path) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of every file of an export that has no manifest yet, by path."""
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {file.relative_to(directory).as_posix(): file_record(file) for file in files}


def check_files(directory: Path, *, but: Collection[str] = ()) -> int:
    """Number of files with checksums, 0 in old exports; raise a ValueError that names those missing or damaged.

    Args:
        directory: of the export.
        but: files that are not compared.
    """
    manifest = manifest_of(directory)
    if manifest is None:
        raise ValueError(f"Expected an export with its {MANIFEST}, got {directory}. Name another directory.")
    if outside := [name for name in manifest.files if Path(name).is_absolute() or ".." in Path(name).parts]:
        raise ValueError(
            f"Expected files within {directory} in its {MANIFEST}, got {outside[0][:60]!r}. Export again."
        )
    compared = {name: written for name, written in manifest.files.items() if name not in but}
    damaged = [name for name, written in compared.items() if file_record(directory / name) != written]
    if not manifest.files and weight_bytes(directory) < manifest.size_bytes:
        damaged = ["weights"]  # their total size alone is known
    if damaged:
        raise ValueError(
            f"Expected the files of {directory} as they were exported, got {', '.join(damaged)} missing or damaged. "
            "Remove the directory and export again."
        )
    return len(manifest.files)


def file_record(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file; empty if there is none."""
    if not path.is_file():
        return {}
    with path.open("rb") as file:
        return {"size_bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
