"""Parts of every forecast: the model, free memory and disk by device, and how times were calibrated."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.search.app.session import Say
from secateur.search.errors import UsageError
from secateur.spaces.forecast import PROCESS, Forecast, Holding

if TYPE_CHECKING:
    from secateur.evaluators.forecast.prospect import Outline
    from secateur.evaluators.forecast.speed import Speed
    from secateur.evaluators.plan import SessionPlan

_DEVICE = re.compile(r"(\w+)(?::\d+)?(?::(\d+(?:\.\d+)?)\s*GB)?", re.IGNORECASE)


def parse_devices(text: str) -> list[tuple[str, int | None]]:
    """Devices that are only thought of, each with its bytes, from a text such as ``cuda:141GB,cuda:80GB``.

    Raises:
        UsageError: if it is none.
    """
    found = []
    for part in text.split(","):
        match = _DEVICE.fullmatch(part.strip())
        if match is None or match[1].lower() not in ("cpu", "cuda", "mps", "xpu"):
            raise UsageError(f"Expected `--device` such as cuda:141GB or cpu:64GB, got {text!r}.")
        found.append((match[1].lower(), None if match[2] is None else round(float(match[2]) * 1e9)))
    return found


def subject_of(model: str, found: Outline, **more: str) -> dict[str, Any]:
    """Facts about model and command."""
    return {
        "model": model,
        "family": found.anatomy.family,
        "blocks": len(found.anatomy.blocks),
        "parameters": sum(x.numel() for x in found.anatomy.model.parameters()),
        "dtype": str(found.dtype).removeprefix("torch."),
        **more,
    }


def with_streamed(whole: Forecast, stream: str, holdings: Sequence[Holding] | None) -> Forecast:
    """Forecast by the word: of the whole model, with that of the streamed one beside it, or of the latter alone.

    Args:
        whole: forecast.
        stream: word of `STREAM`.
        holdings: with the model streamed, without those of the process; None: it can't be.
    """
    if stream == "never" or holdings is None:
        return whole
    process = [x for x in whole.holdings[:1] if x.name == PROCESS]
    subject = {**whole.subject, "stream": "always"}
    streamed = replace(whole, subject=subject, holdings=(*process, *holdings))
    return streamed if stream == "always" else replace(whole, streamed=streamed)


def room_of(found: Outline, directory: Path, devices: Sequence[tuple[str, int | None]]) -> dict[str, int]:
    """Free bytes by place: of devices that are only thought of, what was said."""
    import torch

    from secateur.pruners.models.memory import available_bytes, resident_bytes

    host = available_bytes(torch.device("cpu"))
    room = {} if host is None else {"host": host + resident_bytes()}
    said = [n_bytes for name, n_bytes in devices if name != "cpu" and n_bytes is not None]
    on_host = [n_bytes for name, n_bytes in devices if name == "cpu" and n_bytes is not None]
    if on_host:
        room["host"] = min(on_host)
    if said:
        room["device"] = min(said)
    elif not devices and found.device.type != "cpu":
        left = available_bytes(found.device)
        room |= {} if left is None else {"device": left}
    place = next(x for x in (directory, *directory.absolute().parents) if x.exists())
    return room | {"disk": shutil.disk_usage(place).free}


def speed_of(
    found: Outline, window: int, say: Say, plan: SessionPlan | None = None, *, trains: bool = False
) -> Speed | None:
    """Speed of this machine, see `measure_speed`, which is said."""
    from secateur.evaluators.forecast.speed import measure_speed

    say("timing a block of this shape")
    return measure_speed(found, window, plan, trains=trains)


def calibration_line(speed: Speed | None) -> str:
    """Line on how times were measured; empty where they were not."""
    if speed is None:
        return ""
    return f"the first block with random weights, timed on this machine's {speed.device}, and scaled"
