"""Damaged positions: the fifth of each window at which a reference candidate differs most from the dense model."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from secateur.evaluators.losses import Teacher, position_kl
from secateur.pruners.calibration.tokens import tokens_sha256
from secateur.pruners.models.runner import BlockRunner
from secateur.pruners.pruner import Config, InfeasibleError, Pruner
from secateur.spaces.measurement import Part

DAMAGED_SHARE = 0.2
"""Share of a window's positions that ``weighted_kl`` looks at, rounded up."""

Windows = Mapping[Part, Int[Tensor, "windows length"]]
Damaged = Mapping[Part, Bool[Tensor, "windows length"]]


def reference_of(space: Any) -> str:
    """Canonical text of the candidate that damaged positions are found with: the reference of the middle target."""
    named = [candidate for name, candidate in space.baselines().items() if name != "dense"]
    by_target = {target: x.text for x in reversed(named) if (target := space.target_of(x)) is not None}
    middle = len(space.targets) // 2
    text: str = by_target.get(middle, named[0].text)
    return text


def read_damaged(path: Path, windows: Windows) -> tuple[Damaged | None, str | None]:
    """Positions in a file and the reference that they were found with; None for those of other windows, or no file.

    Raises:
        ValueError: if the file can't be read.
    """
    if not path.exists():
        return None, None
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata()
            same = about["windows"] == _hash(windows)
            return {part: file.get_tensor(part) for part in windows} if same else None, about["reference"]
    except (SafetensorError, OSError, TypeError, KeyError) as error:
        raise ValueError(
            f"Expected the positions of `weighted_kl` in {path}, got a file that can't be read ({error}). Remove it, "
            f"and continue the search, which finds them again."
        ) from error


@torch.no_grad()
def find_damaged(
    pruner: Pruner, windows: Windows, reference: str, path: Path, say: Callable[[str], None]
) -> Damaged:
    """Find the positions and write them to a file.

    A window's positions depend on the model, the reference and this window alone, so that fidelities stay nested, and
    all candidates are measured at the same ones. Of equal positions the first counts.

    Args:
        pruner: open; the live model is dense, before and after.
        windows: token ids of each part.
        reference: canonical text of a candidate.
        path: of the file.
        say: given progress, one line at a time.

    Raises:
        ValueError: if the reference has no weights.
    """
    say(f"finding the tokens that {reference!r} damages most")
    config = pruner.space.config(pruner.space.parse(reference))
    try:
        found = {
            part: torch.cat([_damaged(pruner, config, window) for window in tokens.split(1)])
            for part, tokens in windows.items()
        }
    except InfeasibleError as error:
        raise ValueError(
            f"Expected a reference with weights for `weighted_kl`, got {reference!r}: {error} Choose another loss."
        ) from error
    about = {"windows": _hash(windows), "reference": reference}
    temporary = path.with_name(f"{path.name}.new")
    save_file({str(part): chosen for part, chosen in found.items()}, temporary, about)
    temporary.replace(path)  # whole or not at all
    return found


def _damaged(pruner: Pruner, config: Config, window: Int[Tensor, "1 length"]) -> Bool[Tensor, "1 length"]:
    runner = BlockRunner(pruner.anatomy)
    inputs = runner.start(window)
    teacher = Teacher(pruner.anatomy, lambda: runner.run(inputs), keep=False)
    hidden = inputs.hidden
    try:
        for block, key in enumerate(pruner.keys(config)):
            pruner.apply(block, key)
            hidden = runner.block(block, hidden, inputs)
            if pruner.copies:
                pruner.release(block)
        pruner.finish(key)
        kl, first = position_kl(pruner.anatomy, hidden, teacher)[0].cpu(), pruner.anatomy.first_scored
    finally:
        pruner.restore()
    n_damaged = math.ceil(DAMAGED_SHARE * (len(kl) - first))
    worst = first + kl[first:].argsort(descending=True, stable=True)[:n_damaged]
    chosen = torch.zeros_like(kl, dtype=torch.bool)
    chosen[worst] = True
    return chosen[None]


def _hash(windows: Windows) -> str:
    return " ".join(f"{part}:{tokens_sha256(tokens)}" for part, tokens in sorted(windows.items()))
