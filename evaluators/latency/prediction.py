"""What a table says about whole models, and which part of a dense model an exported one is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from secateur.pruners.export.manifest import MANIFEST, Manifest
from secateur.pruners.models.anatomy import Anatomy
from secateur.spaces.architecture.candidate import Kept
from secateur.spaces.latency import LatencyTable, PhaseName


def predicted_ms(table: LatencyTable, phase: PhaseName, blocks: Sequence[Kept]) -> float:
    """What a table says that a model takes whose blocks keep so much."""
    times = table.phases[phase]
    return times.rest_ms + sum(times.attention(kept.kv_groups) + times.mlp(kept.ffn) for kept in blocks)


def kept_in(model: str, anatomy: Anatomy, fingerprint: str) -> tuple[Kept, ...] | None:
    """What the blocks of a model keep of a dense one's; None if that is not known.

    Args:
        model: an exported directory.
        anatomy: of the dense model.
        fingerprint: the dense model's.
    """
    try:
        manifest = Manifest.from_json((Path(model) / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, TypeError, ValueError):  # not one of our exports
        return None
    if manifest.fingerprint != fingerprint or len(manifest.kept) != len(anatomy.blocks):
        return None
    return tuple(Kept(block["kv_groups"], block["ffn"]) for block in manifest.kept)


def all_of(anatomy: Anatomy) -> tuple[Kept, ...]:
    """What the blocks of the dense model keep: everything."""
    return tuple(block.whole for block in anatomy.blocks)
