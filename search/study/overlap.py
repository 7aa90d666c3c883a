"""How alike the masks of formulas and of published metrics are: derived at a search's end, kept beside the study."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from secateur.spaces.whole_file import whole_file

NAME = "formulas.json"


@dataclass(frozen=True)
class Overlap:
    """Of the masks of formulas with those of published ones.

    Args:
        blocks: indices of those that were compared.
        known: texts of the published formulas, by name.
        overlap: by a formula's text, then by a published one's name, the share of the pruned weights that both
            prune; mean over projections.
    """

    blocks: tuple[int, ...]
    known: Mapping[str, str]
    overlap: Mapping[str, Mapping[str, float]]


def write_overlap(directory: Path, content: Mapping[str, Any]) -> None:
    """Keep it; without room for it, a run is whole all the same.

    Args:
        directory: of the run.
        content: the fields of an `Overlap`.
    """
    with contextlib.suppress(OSError), whole_file(directory / NAME) as new:
        new.write_text(json.dumps(asdict(Overlap(**content)), indent=1) + "\n", encoding="utf-8")


def read_overlap(directory: Path) -> Overlap | None:
    """What was kept, or None."""
    try:
        content = json.loads((directory / NAME).read_text(encoding="utf-8"))
        return Overlap(**content)
    except (OSError, ValueError, TypeError):
        return None
