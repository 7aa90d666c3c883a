"""Model in a GGUF file, dequantised once into a model directory in the cache."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from secateur.pruners.models.checkpoints.cache import cached
from secateur.pruners.models.checkpoints.checkpoint import Checkpoint, ModelError, Say, one_line, silent
from secateur.pruners.models.checkpoints.quiet import quiet

MAGIC = b"GGUF"
CHUNK = 1 << 22
"""Numbers that are dequantised at a time."""


def open_gguf(path: Path, say: Say = silent) -> Checkpoint:
    """The model in a GGUF file, by way of the cache, where it takes 4 bytes a parameter.

    Args:
        path: of the file.
        say: told the progress of the conversion, which takes minutes once.

    Raises:
        ModelError: if the file is no GGUF file, is damaged, holds an architecture that transformers can't
            read, or the package `gguf` is missing.
    """
    with path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise ModelError(f"Expected a GGUF file, got {str(path)!r}, which does not begin with 'GGUF'.")
        file.seek(0)
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    directory = cached(cache_key(sha256), partial(convert, path, say=say))
    return Checkpoint(str(directory), f"gguf file {path.resolve()}", lambda: sha256)


def cache_key(sha256: str) -> str:
    """Name in the cache of the model converted from the GGUF file with this hash."""
    return f"gguf-{sha256[:16]}"


def convert(path: Path, directory: Path, say: Say = silent) -> None:
    """Write the model and the tokenizer of a GGUF file as a model directory with float32 weights.

    One tensor is dequantised and written at a time.

    Raises:
        ModelError: as `open_gguf`.
        OSError: if the directory can't be written.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(
            f"Expected the package `gguf` to read {str(path)!r}; it is missing. Run pip install 'secateur[gguf]'."
        )
    say(f"converting {path.name}, once")
    with quiet():
        config = _write_model(path, directory, say)
        config.save_pretrained(directory)


def _write_model(path: Path, directory: Path, say: Say) -> Any:
    """Write weights and tokenizer, and give the config."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    # Not from_pretrained(gguf_file=...): that needs accelerate and gives a model marked as quantised, which
    # can't be saved.
    try:
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(config)
        # Lists a tied one under its first name alone.
        shapes = {name: tuple(parameter.shape) for name, parameter in skeleton.named_parameters()}
        write_tensors(directory / "model.safetensors", shapes, _tensors(path, skeleton, say))
        AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(directory)
    except OSError:
        raise
    except Exception as error:  # the readers of formats raise all kinds, tokenizers a plain Exception
        raise ModelError(
            f"Expected a whole GGUF file of a causal LM that transformers can read, got {str(path)!r} "
            f"({one_line(error)}). Use another file, or the original model."
        ) from error
    config.architectures = [type(skeleton).__name__]
    config.dtype = torch.float32
    return config


def _tensors(path: Path, skeleton: torch.nn.Module, say: Say) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the file, dequantised to float32 one by one, by their names in the skeleton."""
    from gguf import GGUFReader
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
        load_gguf_checkpoint,
        read_field,
    )

    # Without the vocabulary, which takes several objects a token.
    parsed: dict[str, Any] = {"config": load_gguf_checkpoint(str(path))["config"], "tensors": {}}
    reader = GGUFReader(path)
    kind = read_field(reader, "general.architecture")[0]
    reader.fields.clear()
    processor = TENSOR_PROCESSORS.get(kind, TensorProcessor)(config=parsed["config"])
    names = get_gguf_hf_weights_map(skeleton, processor)
    n_tensors, told = len(reader.tensors), 0
    for index, tensor in enumerate(reader.tensors, start=1):
        found = processor.process(
            weights=dequantised(tensor.data, tensor.tensor_type),
            name=tensor.name,
            tensor_key_mapping=names,
            parsed_parameters=parsed,
        )
        if found.name in names:
            yield names[found.name], torch.from_numpy(np.require(found.weights, np.float32, ["C", "W"]))
        if (tenth := 10 * index // n_tensors) > told:
            told = tenth
            say(f"converting {path.name}: {index} of {n_tensors} tensors")
    yield from parsed["tensors"].items()  # experts, which are put together


def dequantised(data: Any, kind: Any) -> Any:
    """A tensor's numbers in float32: some rows at a time, as the steps in between take several times their room.

    Args:
        data: array of its rows as stored; each is dequantised by itself.
        kind: of its quantisation.
    """
    from gguf import dequantize

    if data.ndim < 2:
        return dequantize(data, kind)
    row = dequantize(data[:1], kind)
    step = max(1, CHUNK // row.size)
    found = np.empty((len(data), *row.shape[1:]), np.float32)
    for start in range(0, len(data), step):
        found[start : start + step] = dequantize(data[start : start + step], kind)
    return found


def write_tensors(
    path: Path, shapes: Mapping[str, tuple[int, ...]], tensors: Iterable[tuple[str, Tensor]]
) -> None:
    """A safetensors file of float32 tensors, written one by one in any order (https://github.com/huggingface/safetensors).

    Args:
        path: new file.
        shapes: of all of them, by name.
        tensors: float32; those of other names are left out.

    Raises:
        ValueError: if one is missing, or has another shape.
    """
    starts, end, header = dict[str, int](), 0, dict[str, Any]({"__metadata__": {"format": "pt"}})
    for name, shape in shapes.items():
        starts[name], end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [starts[name], end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
        missing = dict(shapes)
        for name, tensor in tensors:
            if name in missing and tuple(tensor.shape) == missing.pop(name):
                file.seek(8 + len(text) + starts[name])
                tensor.float().contiguous().numpy().tofile(file)
            elif name in shapes:
                missing[name] = shapes[name]
    if missing:
        name = next(iter(missing))
        raise ValueError(f"it lacks {name} of shape {missing[name]}")
