"""Spread of a model over several devices by blocks: hidden states move from one to the next, weights stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from secateur.pruners.models.discover import find_container, find_ends, text_config
from secateur.pruners.models.memory import available_bytes

SHARE = 0.9
"""Share of a device's free memory that weights may take; the rest is for the work."""


def spread(model: nn.Module, devices: Sequence[torch.device] | None = None) -> None:
    """Put the blocks of a model on devices, runs of blocks by their free memory; on the CPU what has no room.

    The embedding and what has no weights are on the first device, the final norm and the head on the last one, or
    beside the embedding where the head shares its weight. Whatever a part is given is moved to its device, so that the
    model and its blocks are called as on one device.

    Args:
        model: a causal LM in the host's memory.
        devices: None: all GPUs that this process sees.
    """
    devices = (
        [torch.device("cuda", i) for i in range(torch.cuda.device_count())] if devices is None else devices
    )
    if not devices:
        return
    embedding, head = find_ends(model)
    config: Any = model.config
    name, container = find_container(
        model, embedding, getattr(text_config(config), "num_hidden_layers", None)
    )
    first, last = _others(model, name, embedding, head)
    sizes = [_n_bytes(block) for block in container]
    rooms = [int(SHARE * (available_bytes(device) or 0)) for device in devices]
    places = placement([sum(map(_n_bytes, first)), *sizes, sum(map(_n_bytes, last))], rooms)
    every = [*devices, torch.device("cpu")]
    for module in first:
        _place(module, every[places[0]])
    for block, place in zip(container, places[1:-1], strict=True):
        _place(block, every[place])
    for module in last:
        _place(module, every[places[-1]])


def placement(sizes: Sequence[int], rooms: Sequence[int]) -> list[int]:
    """Device of each part, in order; one more than there are rooms stands for the host.

    Parts are cut into runs in proportion to the rooms; if they do not fit together, rooms are filled one after the
    other, and the rest is the host's.
    """
    total, held = sum(sizes), sum(rooms)
    ends = [total * end / held for end in accumulate(rooms)] if total <= held else [*accumulate(rooms)]
    middles = [end - size / 2 for end, size in zip(accumulate(sizes), sizes, strict=True)]
    if total > held:
        middles = [*accumulate(sizes)]  # a part that ends beyond a room has none in it
    return [sum(middle > end for end in ends) for middle in middles]


def _others(
    model: nn.Module, blocks: str, embedding: nn.Module, head: nn.Module
) -> tuple[list[nn.Module], list[nn.Module]]:
    """Modules with weights or buffers of their own outside of the blocks: those before, and those after."""
    first: list[nn.Module] = []
    last: list[nn.Module] = []
    seen, tied = False, head.weight is embedding.weight
    for name, module in model.named_modules():
        seen = seen or name == blocks
        own, buffers = list(module.parameters(recurse=False)), list(module.buffers(recurse=False))
        if name.startswith(f"{blocks}.") or not (own or buffers):
            continue
        (last if seen and own and not tied else first).append(module)
    return first, last


def _n_bytes(module: nn.Module) -> int:
    return sum(x.nbytes for x in (*module.parameters(), *module.buffers()))


def _place(module: nn.Module, device: torch.device) -> None:
    """Move a module, and from now on all that it is given."""
    module.to(device)

    def move(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return _moved(args, device), _moved(kwargs, device)

    module.register_forward_pre_hook(move, with_kwargs=True)


def _moved(value: Any, device: torch.device) -> Any:
    """The value with its tensors on a device; caches and other objects move their own."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(_moved(x, device) for x in value)
    if isinstance(value, Mapping):
        return {name: _moved(x, device) for name, x in value.items()}
    return value
