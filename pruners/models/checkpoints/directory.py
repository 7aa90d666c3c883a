"""Model in a local directory: checked before it is loaded, and identified by its content."""

from __future__ import annotations

import hashlib
import json
from functools import partial
from pathlib import Path

from safetensors import SafetensorError, safe_open

from secateur.pruners.models.checkpoints.checkpoint import Checkpoint, ModelError

CONFIG = "config.json"
# In transformers' order of preference: an index of shards, or the one file.
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# A directory has a tokenizer if it has one of these.
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def open_directory(directory: Path) -> Checkpoint:
    """The model in a directory, as `save_pretrained` writes it, with its tokenizer.

    Raises:
        ModelError: if the config, the tokenizer or weights are missing, or a weights file is damaged.
    """
    weights = check_directory(directory)
    identify = partial(hash_files, [directory / CONFIG, *weights])
    return Checkpoint(str(directory), f"directory {directory.resolve()}", identify)


def check_directory(directory: Path) -> list[Path]:
    """The weights files of a model directory, each of them whole.

    Raises:
        ModelError: as `open_directory`.
    """
    if not (directory / CONFIG).is_file():
        raise ModelError(
            f"Expected a model directory with {CONFIG}, got {str(directory)!r} without it. "
            f"Name the directory that save_pretrained wrote."
        )
    if not any((directory / name).is_file() for name in TOKENIZERS):
        raise ModelError(
            f"Expected a tokenizer beside the model ({', '.join(TOKENIZERS)}), found none in {str(directory)!r}. "
            f"Save the tokenizer there, too."
        )
    weights = _weight_files(directory)
    for path in weights:
        _check_weights(path)
    return weights


def hash_files(paths: list[Path]) -> str:
    """SHA-256 over the names and contents of files, independent of where they lie; hexadecimal."""
    total = hashlib.sha256()
    for path in sorted(paths, key=lambda path: path.name):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        total.update(f"{path.name} {content}\n".encode())
    return total.hexdigest()


def _weight_files(directory: Path) -> list[Path]:
    """The files that hold the weights, without a look inside."""
    first = next((directory / name for name in WEIGHTS if (directory / name).is_file()), None)
    if first is None:
        raise ModelError(
            f"Expected weights ({WEIGHTS[0]} or shards with an index), found none in {str(directory)!r}."
        )
    if first.suffix != ".json":
        return [first]
    try:
        shards = sorted(set(json.loads(first.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"Expected an index of shards with a `weight_map`, got {str(first)!r} without."
        ) from error
    return [directory / shard for shard in shards]


def _check_weights(path: Path) -> None:
    """The file is there and, if it is safetensors, as long as its header says."""
    if not path.is_file():
        raise ModelError(f"Expected the weights file {str(path)!r}, which the index lists; it is not there.")
    if path.suffix != ".safetensors":
        return
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise ModelError(
            f"Expected a whole safetensors file, got {str(path)!r} of {path.stat().st_size} bytes "
            f"({error}). It is damaged or incomplete: copy or download it again."
        ) from error
