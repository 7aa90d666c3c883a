"""Causal LM whose weights stay in mapped safetensors files; a block is held in memory while it is worked on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from secateur.pruners.models.anatomy import Anatomy
from secateur.pruners.models.checkpoints.checkpoint import ModelError, Say, one_line, silent
from secateur.pruners.models.checkpoints.directory import weight_files
from secateur.pruners.models.checkpoints.hub import fetched
from secateur.pruners.models.checkpoints.quiet import quiet
from secateur.pruners.models.discover import dissect
from secateur.pruners.models.experts import split_experts
from secateur.pruners.models.held_blocks import HeldBlocks, in_precision
from secateur.pruners.models.loading import (
    DTYPES,
    SPREAD,
    CheckConfig,
    LoadedModel,
    device_of,
    find_checkpoint,
    load_tokenizer,
    open_config,
    other_shape,
    precision_of,
)
from secateur.pruners.models.memory import available_bytes
from secateur.pruners.models.stored_names import stored_names
from secateur.pruners.models.usable import check_vocabulary, check_weights

MEMORY_SHARE = 0.4
"""Share of the free memory that a model may take unless it is streamed: the pruned copy takes as much again."""


class NotStreamedError(ValueError):
    """A model or a recipe that can't be streamed; one line that says why."""


@dataclass(frozen=True)
class MappedModel(LoadedModel):
    """A causal LM on the CPU whose parameters are views on mapped files, in the dtype in which they are stored.

    The system reads their pages when they are used and may drop them at any time, so that they take no memory of the
    process. What computes wants `precision`: after `dissect` each projection in a block is converted while it runs;
    norms, routers, the embedding, the head and all else outside of the blocks for good; in `Anatomy.hold` all of a
    block. Nothing is copied where weights are stored in that precision.

    Args:
        precision: dtype to compute in.
        names: the stored tensors, mapped, by the names of the model's parameters and buffers, split experts among them.
        directory: of the files.
        stored_names: those that they are stored under.
    """

    precision: torch.dtype
    names: Mapping[str, Tensor]
    directory: Path
    stored_names: Mapping[str, str]

    @property
    def converts(self) -> bool:
        """True if parameters are stored in another dtype than they compute in."""
        buffers = {name for name, _ in self.model.named_buffers()}
        found = (x for name, x in self.names.items() if name not in buffers)
        return any(x.is_floating_point() and x.dtype != self.precision for x in found)

    def dissect(self, bos: int | None = None) -> Anatomy:
        """Anatomy of the model, see `discover.dissect`; what reads weights of its blocks is to do so in `hold`.

        Raises:
            NotStreamedError: if the weights are stored in another dtype than `precision`, and are not converted by the
                module while it runs: some modules use weights of others.
        """
        split_experts(self.model)  # while all weights are of one dtype
        for module in self.model.modules():
            if type(module) not in (nn.Linear, Conv1D):  # routers may be linears of a class of their own
                for parameter in module.parameters(recurse=False):
                    parameter.data = in_precision(parameter.data, self.precision)
        handles = _convert_while_running(self.model, self.precision)
        try:
            anatomy = dissect(self.model, bos)
        except (RuntimeError, ValueError) as error:
            for handle in handles:
                handle.remove()
            if not self.converts:
                raise
            raise NotStreamedError(
                f"Expected modules that use their own weights alone, or `--dtype` as the weights are stored, got "
                f"{type(self.model).__name__} ({one_line(error)})."
            ) from error
        inside = {id(p) for block in anatomy.blocks for p in block.module.parameters()}
        for parameter in self.model.parameters():
            if id(parameter) not in inside:
                parameter.data = in_precision(parameter.data, self.precision)
        return replace(anatomy, hold=HeldBlocks(anatomy.blocks, self.precision), precision=self.precision)


def load_mapped(
    name: str,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
    check: CheckConfig = lambda config: None,
    say: Say = silent,
    only_large: bool = False,
) -> MappedModel | None:
    """Open a causal LM and its tokenizer without reading its weights into memory.

    Its class is built from the config without memory for parameters, which then become views on the files; buffers
    that are not stored, such as rotary frequencies, are computed as the class does.

    Args:
        name, dtype, device, trust_remote_code, check, say: see `load_model`.
        only_large: give None for a model that takes at most `MEMORY_SHARE` of the memory that is free, if that is
            known, and for one that is not on the CPU.

    Raises:
        NotStreamedError: if the weights are no safetensors, or are not stored one by one under the names of the
            model's parameters, or the device is not the CPU, or code of its own may be needed.
        ValueError: as `check` does.
        ModelError: as `load_model` does.
    """
    cpu = torch.device("cpu")
    if device == SPREAD or device_of(device) != cpu:
        if only_large:
            return None
        raise NotStreamedError(f"Expected a model on the CPU, got `--device {device}`.")
    precision = precision_of(dtype, cpu)
    checkpoint = find_checkpoint(name, say)
    with quiet():
        config, where = open_config(checkpoint, trust_remote_code, check)
        stored = config.dtype
        directory = Path(checkpoint.location)
        if checkpoint.revision is not None:
            directory = fetched(checkpoint.location, checkpoint.revision) or Path()
        if only_large and not _is_large(directory, precision):
            return None
        if trust_remote_code:
            raise NotStreamedError("Expected a model without code of its own, got `--trust-remote-code`.")
        found = stored_tensors(directory)
        model = _without_weights(config, precision)
        names = stored_names(model, found)
        tensors = {own: found[name] for own, name in names.items()}
        _fill(model, tensors, directory)
        _set_generation(model, directory)
        tokenizer = load_tokenizer(checkpoint, where)
    model.eval().requires_grad_(False)
    check_weights(model)
    check_vocabulary(model, tokenizer)
    stored = stored if stored in DTYPES.values() else precision
    return MappedModel(model, tokenizer, name, checkpoint, stored, precision, tensors, directory, names)


def _is_large(directory: Path, precision: torch.dtype) -> bool:
    """True if the weights of a directory would take more than `MEMORY_SHARE` of the free memory."""
    files, free = weight_files(directory), available_bytes(torch.device("cpu"))
    if free is None or any(file.suffix != ".safetensors" for file in files):
        return False
    return precision.itemsize * sum(map(_n_numbers, files)) > MEMORY_SHARE * free


def stored_tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of a model's safetensors files by their names, mapped.

    Raises:
        NotStreamedError: if its weights are stored otherwise.
    """
    files = weight_files(directory)
    if any(file.suffix != ".safetensors" for file in files):
        raise NotStreamedError(f"Expected weights in safetensors files, got {files[0].name} in {directory}.")
    tensors: dict[str, Tensor] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
    return tensors


def _n_numbers(file: Path) -> int:
    """Numbers in a safetensors file, from its header."""
    with file.open("rb") as opened:
        header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    shapes = (torch.Size(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    return sum(shape.numel() for shape in shapes)


def _without_weights(config: Any, precision: torch.dtype) -> Any:
    """Model of a config whose parameters have no memory, and whose buffers are real."""
    from transformers import AutoModelForCausalLM

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter | None:
        return None if parameter.is_meta else nn.Parameter(parameter.data.to("meta"), requires_grad=False)

    # Its annotation says that hooks return nothing; its docstring, that they may return another parameter.
    handle = register_module_parameter_registration_hook(on_meta)  # type: ignore[arg-type]
    try:
        return AutoModelForCausalLM.from_config(config, dtype=precision)
    finally:
        handle.remove()


def _fill(model: nn.Module, tensors: Mapping[str, Tensor], directory: Path) -> None:
    """Make every parameter and stored buffer the tensor of its name; tied parameters are stored once.

    Raises:
        NotStreamedError: if the names are not the same.
        ModelError: if a shape is another, or some have no weights in this directory.
    """
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    kept = model.state_dict(keep_vars=True)
    for name in kept.keys() - {x for names in aliases.values() for x in names}:
        aliases[id(kept[name])] = [name]  # a buffer
    stored = {name: [x for x in names if x in tensors] for names in aliases.values() for name in names[:1]}
    wrong = [name for name, found in stored.items() if len(found) != 1]
    unknown = sorted(tensors.keys() - {x for found in stored.values() for x in found})
    missing = [name for name in wrong if not stored[name]]
    if missing and not unknown:
        raise ModelError(
            f"Expected weights for every parameter in {str(directory)!r}, {len(missing)} are missing, e.g. "
            f"{min(missing)}. The weights belong to another config, or a shard to another index."
        )
    wrong += unknown
    if wrong:
        raise NotStreamedError(
            f"Expected weights stored one by one under the names of {type(model).__name__}'s parameters, got "
            f"{len(wrong)} others, e.g. {wrong[0]}, which transformers converts as it loads them."
        )
    for names in aliases.values():
        tensor, before = tensors[stored[names[0]][0]], kept[names[0]]
        if tensor.shape != before.shape:
            raise other_shape(names[0], before.shape, tensor.shape)
        new = nn.Parameter(tensor, requires_grad=False) if isinstance(before, nn.Parameter) else None
        for name in names:
            owner, _, own = name.rpartition(".")
            module = model.get_submodule(owner)
            if new is None:
                # As transformers does, which keeps in fp32 what routers add to their scores.
                module.register_buffer(own, tensor.to(torch.promote_types(tensor.dtype, before.dtype)))
            else:
                setattr(module, own, new)


def _set_generation(model: Any, directory: Path) -> None:
    """The settings of generation that come with the model."""
    from transformers import GenerationConfig

    if model.can_generate() and (directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory)


def _convert_while_running(model: nn.Module, precision: torch.dtype) -> list[RemovableHandle]:
    """Have each module's own parameters in a precision while it runs, and not before or after."""
    mapped: dict[nn.Module, list[tuple[nn.Parameter, Tensor]]] = {}

    def convert(module: nn.Module, args: tuple[Any, ...]) -> None:
        own = [(parameter, parameter.data) for parameter in module.parameters(recurse=False)]
        mapped.setdefault(module, own)
        for parameter, data in own:
            parameter.data = in_precision(data, precision)

    def give_back(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        for parameter, data in mapped.pop(module, ()):
            parameter.data = data

    owners = [m for m in model.modules() if any(p.dtype != precision for p in m.parameters(recurse=False))]
    handles = [module.register_forward_pre_hook(convert) for module in owners]
    # Also of a forward pass that is left by an exception.
    return handles + [module.register_forward_hook(give_back, always_call=True) for module in owners]
