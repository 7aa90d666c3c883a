"""Save a bench's live, pruned model with the checks of an export."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from secateur.pruners.export.export import ExportReport, export_model
from secateur.pruners.export.manifest import Manifest
from secateur.pruners.export.structured import export_structured
from secateur.spaces.architecture.candidate import Kept, KeptUnits

if TYPE_CHECKING:
    from secateur.evaluators.session import Workbench


def save_zeros(bench: Workbench, to: Path, manifest: Manifest) -> ExportReport:
    """In the parent's own form; see `export_model`, also for what is raised."""
    return export_model(
        bench.loaded.model,  # type: ignore[arg-type]  # a transformers model, known to mypy as a module
        bench.loaded.tokenizer,
        to,
        manifest=manifest,
        check_tokens=bench.check_tokens,
        dtype=bench.loaded.stored_dtype,
    )


def save_cut(
    bench: Workbench, kept: Sequence[Kept], to: Path, manifest: Manifest, units: Sequence[KeptUnits]
) -> ExportReport:
    """In the manifest's format; see `export_structured`, also for the arguments and what is raised."""
    return export_structured(
        bench.anatomy,
        bench.loaded.tokenizer,
        kept,
        manifest,
        to,
        check_tokens=bench.check_tokens,
        dtype=bench.loaded.stored_dtype,
        units=units,
    )
