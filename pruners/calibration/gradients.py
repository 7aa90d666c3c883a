"""Gradients of the dense model's loss: one pass over the calibration windows for all projections."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor

from secateur.pruners.calibration.gradient_kinds import KINDS, Kind, empty_like
from secateur.pruners.calibration.pass_kinds import CONTRAST_KINDS, PASS_KINDS, n_bytes, trained
from secateur.pruners.calibration.statistics import ModelStatistics
from secateur.pruners.calibration.window_gradients import add_over_windows, backward_bytes
from secateur.pruners.models.anatomy import Anatomy
from secateur.pruners.models.memory import check_memory
from secateur.pruners.stores.block_files import load_tensors, save_tensors
from secateur.pruners.stores.saved_state import FileState, SavedState

Gradients: TypeAlias = dict[str, Tensor]
"""By the projection's full name."""


@torch.enable_grad()
def collect_gradients(
    anatomy: Anatomy,
    tokens: Int[Tensor, "windows length"],
    kinds: Collection[Kind],
    *,
    contrast: Int[Tensor, "others _"] | None = None,
    on_window: Callable[[int], None] = lambda index: None,
    states: Mapping[Kind, SavedState] = MappingProxyType({}),
) -> dict[Kind, Gradients]:
    """Gradients of the calibration windows, of several kinds: one pass for all kinds of one value.

    The computation is in fp32 whatever the model's dtype, window by window, so the result does not depend on
    batches. Kinds with a pass of their own are collected by `PASS_KINDS`. Memory: see
    `gradient_bytes`; it is checked first.

    Args:
        anatomy: the dense model; not changed.
        tokens: calibration windows of at least two tokens.
        kinds: rows of `KINDS`, `PASS_KINDS` or `CONTRAST_KINDS`.
        contrast: windows of the second calibration set, for the last of these.
        on_window: told the index of each window that is done, in each backward pass.
        states: of kinds that are trained, to continue from.

    Returns:
        By kind, for each projection by its full name, in fp32 on the projection's device: an ``out in`` matrix,
        for `sums` and norms a vector, for `perturbed` a score a unit, of output projections alone.

    Raises:
        ValueError: if a gradient is not finite, there is too little memory, or no second set where one is needed.
    """
    check_contrast(kinds, contrast)
    check_gradients(anatomy, kinds, tokens.shape[1])
    own = {kind: PASS_KINDS[kind] for kind in kinds if kind in PASS_KINDS}
    of_both = {kind: CONTRAST_KINDS[kind] for kind in kinds if kind in CONTRAST_KINDS}
    found: dict[Kind, Gradients] = {
        kind: {linear.name: empty_like(kind, linear) for linear in anatomy.linears}
        for kind in kinds
        if kind not in own and kind not in of_both
    }
    for value in dict.fromkeys(KINDS[kind].value for kind in found):
        totals = [(KINDS[k].of_window, x) for k, x in found.items() if KINDS[k].value is value]
        add_over_windows(anatomy, tokens, value, totals, on_window)
    for kind, by_name in found.items():
        _finish(kind, by_name, len(tokens))
    found |= {
        kind: row.collect(anatomy, tokens, **({"state": states.get(kind)} if row.trains else {}))
        for kind, row in own.items()
    }
    for kind, row in of_both.items():
        assert contrast is not None, "checked first"
        if row.of is not None:
            found[kind] = collect_gradients(anatomy, contrast, (row.of,))[row.of]
        else:
            assert row.collect is not None, "either has a row"
            found[kind] = row.collect(anatomy, tokens, contrast)
    return found


def check_contrast(kinds: Collection[Kind], contrast: Int[Tensor, "others _"] | None) -> None:
    """Raise a ValueError if kinds need a second calibration set that is not given."""
    of_both = [kind for kind in kinds if kind in CONTRAST_KINDS]
    if of_both and (contrast is None or not len(contrast)):
        raise ValueError(
            f"Expected a second calibration text for the statistics {', '.join(of_both)}, got none. Name it in "
            "`evaluator.data.contrast`, or in `sources.contrast` of a recipe's file."
        )


def check_gradients(anatomy: Anatomy, kinds: Collection[Kind], length: int) -> None:
    """Raise a ValueError unless the model fits, and there is the memory for windows of so many tokens."""
    if not kinds:
        return
    for kind in kinds:
        if kind in PASS_KINDS:
            PASS_KINDS[kind].check(anatomy)
    check_memory(
        gradient_bytes(anatomy, kinds, length),
        anatomy.embedding.weight.device,
        f"gradients of windows of {length} tokens",
        "Use shorter windows, or a method without gradients (`secateur list methods`).",
    )


def gradient_bytes(anatomy: Anatomy, kinds: Collection[Kind], length: int) -> int:
    """About the memory of `collect_gradients` beyond the model, in bytes: the results, and the work of one window."""
    own = [PASS_KINDS[kind].work_bytes(anatomy, length) for kind in kinds if kind in PASS_KINDS]
    rows = [CONTRAST_KINDS[kind] for kind in kinds if kind in CONTRAST_KINDS]
    own += [gradient_bytes(anatomy, (row.of,), length) for row in rows if row.of is not None]
    own += [row.work_bytes(anatomy, length) for row in rows if row.of is None]
    per_weight = sum(KINDS[kind].n_bytes for kind in kinds if kind in KINDS)
    backward = any(kind in KINDS for kind in kinds)
    return sum(own) + (backward_bytes(anatomy, per_weight, length) if backward else 0)


def _finish(kind: Kind, by_name: Gradients, n_windows: int) -> None:
    """Turn sums into means, or root mean squares, in place."""
    for name, total in by_name.items():
        if not torch.isfinite(total).all():
            raise ValueError(
                f"Expected finite gradients, got NaN or infinity at {name}. Check the calibration text."
            )
        total.div_(n_windows)
        if KINDS[kind].root:
            total.sqrt_()


def model_statistics(
    anatomy: Anatomy,
    tokens: Int[Tensor, "windows length"],
    *,
    gradients: Collection[Kind],
    path: Path | None = None,
    identity: str = "",
    contrast: Int[Tensor, "others _"] | None = None,
) -> ModelStatistics:
    """Statistics of the dense model as a whole.

    Args:
        gradients: kinds of them to collect.
        path: file of cached gradients (see `kind_path`), read if its identity is this one; None: no cache.
        identity: of the model and the tokens, in one text.
        contrast: windows of the second calibration set.

    Raises:
        LevelStoreError: if the file can't be written.
        ValueError: as `collect_gradients` does.
    """
    known = {kind: load_tensors(kind_path(path, kind), identity) if path else None for kind in gradients}
    found = {kind: by_name for kind, by_name in known.items() if by_name is not None}
    missing = [kind for kind in gradients if kind not in found]
    states = {kind: FileState(state_path(path, kind), identity) for kind in trained(missing)} if path else {}
    new = collect_gradients(anatomy, tokens, missing, contrast=contrast, states=states) if missing else {}
    for kind, by_name in new.items():
        if path:
            save_tensors(kind_path(path, kind), by_name, identity)
        found[kind] = by_name
        if kind in states:
            states[kind].clear()
    n_windows, length = tokens.shape
    return ModelStatistics(len(anatomy.blocks), found, windows=(n_windows, length))


def kind_path(path: Path, kind: Kind) -> Path:
    """The file of a kind, beside that of the unsigned gradients, which has the plain name."""
    return path if kind == "rms" else path.with_stem(f"{path.stem}-{kind}")


def state_path(path: Path, kind: Kind) -> Path:
    """The file of the state of a kind while it is trained."""
    return path.with_stem(f"{path.stem}-{kind}-training")


def gradients_to_write(path: Path, anatomy: Anatomy, kinds: Collection[Kind]) -> int:
    """Bytes of the kinds that are not cached yet."""
    per_weight = sum(n_bytes(kind) for kind in kinds if not kind_path(path, kind).exists())
    return per_weight * sum(linear.n_weights for linear in anatomy.linears)


def gradients_path(directory: Path) -> Path:
    """File of the gradients beside a level store."""
    return directory.with_name(f"{directory.name}-gradients.safetensors")
