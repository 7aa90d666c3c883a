"""Model in a GGUF file, dequantised once into a model directory in the cache."""

from __future__ import annotations

import hashlib
import importlib.util
import io
from contextlib import redirect_stderr
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from secateur.pruners.models.checkpoints.cache import cached
from secateur.pruners.models.checkpoints.checkpoint import Checkpoint, ModelError, one_line
from secateur.pruners.models.checkpoints.quiet import quiet

MAGIC = b"GGUF"


def open_gguf(path: Path) -> Checkpoint:
    """The model in a GGUF file, by way of the cache, where it takes 4 bytes a parameter.

    Raises:
        ModelError: if the file is no GGUF file, is damaged, holds an architecture that transformers can't
            read, or the package `gguf` is missing.
    """
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise ModelError(f"Expected a GGUF file, got {str(path)!r}, which does not begin with 'GGUF'.")
        file.seek(0)
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    directory = cached(cache_key(sha256), partial(convert, path))
    return Checkpoint(str(directory), f"gguf file {path.resolve()}", lambda: sha256)


def cache_key(sha256: str) -> str:
    """Name in the cache of the model converted from the GGUF file with this hash."""
    return f"gguf-{sha256[:16]}"


def convert(path: Path, directory: Path) -> None:
    """Write the model and the tokenizer of a GGUF file as a model directory with float32 weights.

    Raises:
        ModelError: as `open_gguf`.
        OSError: if the directory can't be written.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(
            f"Expected the package `gguf` to read {str(path)!r}; it is missing. Run pip install 'secateur[gguf]'."
        )
    with quiet():
        config, weights, tokenizer = _read(path)
        config.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    try:
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"Cannot write {str(directory)!r}: {one_line(error)}.") from error


def _read(path: Path) -> tuple[Any, dict[str, Tensor], Any]:
    """Config, weights and tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    # Not from_pretrained(gguf_file=...): that needs accelerate and gives a model marked as quantised, which
    # can't be saved.
    try:
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config)
        weights = _read_weights(path, skeleton)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:  # the readers of formats raise all kinds, tokenizers a plain Exception
        raise ModelError(
            f"Expected a whole GGUF file of a causal LM that transformers can read, got {str(path)!r} "
            f"({one_line(error)}). Use another file, or the original model."
        ) from error
    config.architectures = [type(skeleton).__name__]
    config.dtype = torch.float32
    return config, weights, tokenizer


def _read_weights(path: Path, skeleton: torch.nn.Module) -> dict[str, Tensor]:
    """All parameters of the skeleton, dequantised to float32, tied ones once.

    Raises:
        ValueError: if the file lacks one, or one has another shape.
    """
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    with redirect_stderr(io.StringIO()):  # a progress bar that knows no switch
        read = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=skeleton)["tensors"]
    weights: dict[str, Tensor] = {}
    for name, parameter in skeleton.named_parameters():  # lists a tied one under its first name alone
        if name not in read or read[name].shape != parameter.shape:
            raise ValueError(f"it lacks {name} of shape {tuple(parameter.shape)}")
        weights[name] = read[name].to(torch.float32).contiguous()
    return weights
