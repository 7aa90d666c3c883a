"""Scores of whole blocks by the depth rules, kept beside a store."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from jaxtyping import Int
from torch import Tensor

from secateur.pruners.calibration.gradients import gradients_path, model_statistics
from secateur.pruners.models.anatomy import Anatomy
from secateur.spaces.limited_text import read_text
from secateur.spaces.methods import DEPTH


def depth_scores(
    names: Collection[str],
    anatomy: Anatomy,
    tokens: Int[Tensor, "windows length"],
    directory: Path,
    identity: str,
    influence: tuple[float, ...],
) -> dict[str, tuple[float, ...]]:
    """Scores of the dense model's blocks by depth rule, cached beside a store.

    Args:
        names: of depth rules.
        anatomy: the dense model.
        tokens: calibration windows.
        directory: of the store.
        identity: of the model and the tokens, in one text.
        influence: of each block, see `shortgpt.block_influence`.

    Raises:
        LevelStoreError: if there is no room on the disk for gradients.
        ValueError: as `gradients.collect_gradients` does.
    """
    path = directory.with_name(f"{directory.name}-depth.json")
    known = _read(path, identity)
    for name in names:
        if name not in known:
            row = DEPTH[name]
            whole = model_statistics(
                anatomy, tokens, gradients=row.gradients, path=gradients_path(directory), identity=identity
            )
            known[name] = row.function(anatomy, tokens, replace(whole, influence=influence))
            path.write_text(json.dumps({"identity": identity, "scores": known}), encoding="utf-8")
    return {name: known[name] for name in names}


def _read(path: Path, identity: str) -> dict[str, tuple[float, ...]]:
    try:
        kept = json.loads(read_text(path, "scores of blocks"))
        same = kept["identity"] == identity
        return {name: tuple(map(float, scores)) for name, scores in kept["scores"].items()} if same else {}
    except (
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        RecursionError,
    ):  # missing or damaged: made again
        return {}
