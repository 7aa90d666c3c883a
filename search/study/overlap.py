"""Overlap of the masks of formulas and of published metrics, computed at a search's end and kept beside the study."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from secateur.search.errors import UsageError
from secateur.search.files import checked
from secateur.spaces.whole_file import whole_file

NAME = "formulas.json"


@dataclass(frozen=True)
class Overlap:
    """Overlap of the masks of formulas with those of published ones.

    Args:
        blocks: indices of the compared blocks.
        known: texts of the published formulas, by name.
        overlap: by a formula's text, then by a published one's name, the share of the pruned weights that both
            prune; mean over projections.
    """

    blocks: tuple[int, ...]
    known: Mapping[str, str]
    overlap: Mapping[str, Mapping[str, float]]


def write_overlap(directory: Path, content: Mapping[str, Any]) -> None:
    """Write the fields of an `Overlap`; an error is ignored, as a run is complete without it."""
    with contextlib.suppress(OSError), whole_file(directory / NAME) as new:
        new.write_text(json.dumps(asdict(Overlap(**content)), indent=1) + "\n", encoding="utf-8")


def read_overlap(directory: Path) -> Overlap | None:
    """Content of the file, or None."""
    try:
        return checked(directory / NAME, Overlap, NAME)
    except UsageError:
        return None
