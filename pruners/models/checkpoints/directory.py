"""Model in a local directory: checked before it is loaded, and identified by its content."""

from __future__ import annotations

import hashlib
import json
import re
from functools import partial
from pathlib import Path

from safetensors import SafetensorError, safe_open

from secateur.pruners.models.checkpoints.checkpoint import Checkpoint, ModelError
from secateur.pruners.models.families import NAMED_ALIKE
from secateur.spaces.plain_files import check_plain

CONFIG = "config.json"
ADAPTER = "adapter_config.json"
# In transformers' order of preference: an index of shards, or the one file.
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# A directory has a tokenizer if it has one of these.
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
LAYER = re.compile(r"(?:\w+\.){0,2}(?:layers|h)\.(\d+)\.")  # of the known families, as below
EMBEDDING = re.compile(r"(?:\w+\.){0,2}(?:embed_tokens|embed_in|wte)\.weight")


def open_directory(directory: Path) -> Checkpoint:
    """The model in a directory, as `save_pretrained` writes it, with its tokenizer.

    Raises:
        ModelError: if the config, the tokenizer or weights are missing, or a weights file is damaged.
        ValueError: for a pipe or a device among its files.
    """
    check_plain(*directory.iterdir())
    if (directory / ADAPTER).is_file() and not (directory / CONFIG).is_file():
        raise ModelError(
            f"Expected a whole model, got an adapter ({ADAPTER}) in {str(directory)!r}. Merge it into its base model "
            f"(PEFT: `merge_and_unload`) and save that."
        )
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
    weights = weight_files(directory)
    for path in weights:
        _check_weights(path)
    identify = partial(hash_files, [directory / CONFIG, *weights])
    return Checkpoint(str(directory), f"directory {directory.resolve()}", identify)


def check_sizes(directory: Path) -> None:
    """Raise a ModelError if config and stored weights of a known family contradict each other, from headers alone."""
    try:
        config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
        if config["model_type"] not in NAMED_ALIKE:
            return
    except (ValueError, KeyError, TypeError):  # transformers says what is wrong
        return
    width = ["word_embed_proj_dim"] if config.get("word_embed_proj_dim") else ["hidden_size", "n_embd"]
    stored: dict[str, int] = {}
    for path in (path for path in weight_files(directory) if path.suffix == ".safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # no mapping
                if layer := LAYER.match(name):
                    n_layers = max(stored.get("n_layer", 0), int(layer[1]) + 1)
                    stored |= {"num_hidden_layers": n_layers, "n_layer": n_layers}
                elif EMBEDDING.fullmatch(name) and len(shape := file.get_slice(name).get_shape()) == 2:
                    stored |= {"vocab_size": shape[0]} | dict.fromkeys(width, shape[1])
    for key, size in stored.items():
        if config.get(key, size) != size:
            raise ModelError(
                f"Expected `{key}` of {str(directory / CONFIG)!r} to be {size}, as the stored weights have it, "
                f"got {config[key]!r}. Take config and weights from one model."
            )


def hash_files(paths: list[Path]) -> str:
    """SHA-256 over the names and contents of files, independent of where they lie; hexadecimal."""
    total = hashlib.sha256()
    for path in sorted(paths, key=lambda path: path.name):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        total.update(f"{path.name} {content}\n".encode())
    return total.hexdigest()


def weight_files(directory: Path) -> list[Path]:
    """The files that hold the weights, without a look inside."""
    first = next((directory / name for name in WEIGHTS if (directory / name).is_file()), None)
    if first is None:
        raise ModelError(
            f"Expected weights ({WEIGHTS[0]} or shards with an index), found none in {str(directory)!r}."
        )
    if first.suffix != ".json":
        return [first]
    try:
        shards = sorted(set(json.loads(first.read_text(encoding="utf-8"))["weight_map"].values()), key=Path)
        if wrong := [shard for shard in shards if shard != Path(shard).name]:
            raise ValueError(f"{wrong[0]!r} in it")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"Expected an index of shards with a `weight_map` to files beside it, got {str(first)!r} ({error})."
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
