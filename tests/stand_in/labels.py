"""Labels of tensors: the device that they say they are on, and what happened between host and device."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

CPU = torch.device("cpu")
LABEL = "_stand_in_device"


class MixedDevicesError(RuntimeError):
    """Tensors of different devices in one operation."""


def where(tensor: Tensor) -> torch.device:
    """The device that a tensor says it is on."""
    found: torch.device = getattr(tensor, LABEL, None) or CPU
    return found


def put(tensor: Any, device: torch.device) -> Any:
    """Label a tensor."""
    if isinstance(tensor, Tensor) and (device != CPU or hasattr(tensor, LABEL)):
        object.__setattr__(tensor, LABEL, device)
    return tensor


def normal(device: Any) -> torch.device:
    """The device with its index, where it is a GPU."""
    found = torch.device(device)
    return torch.device("cuda", found.index or 0) if found.type == "cuda" else found


@dataclass
class Events:
    """Events between host and device.

    Args:
        waits: operations that waited for the device, by name.
        uploads, downloads: bytes from the host to a device, and back.
        moves: bytes from one device to another.
    """

    waits: Counter[str] = field(default_factory=Counter)
    uploads: int = 0
    downloads: int = 0
    moves: int = 0

    def clear(self) -> None:
        self.waits.clear()
        self.uploads = self.downloads = self.moves = 0
