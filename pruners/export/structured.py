"""A structured model, really smaller, as files that others load, checked by loading them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from secateur.pruners.export.cut import CutModel
from secateur.pruners.export.export import ExportReport, count_asked
from secateur.pruners.export.export_check import dtype_name
from secateur.pruners.export.job import Job, Saved
from secateur.pruners.export.manifest import Manifest
from secateur.pruners.export.registry import FORMATS
from secateur.pruners.export.saving import check_dtypes, new_directory, versions, weight_bytes, write_record
from secateur.pruners.models.anatomy import Anatomy
from secateur.spaces.architecture.candidate import Kept, KeptUnits


def check_structured(
    anatomy: Anatomy, tokenizer: PreTrainedTokenizerBase, kept: Sequence[Kept], form: str
) -> None:
    """Raise a ValueError if the format can't carry the model once it is cut; it is still dense, and stays so.

    Args:
        form: a name in `FORMATS`.
    """
    if form not in FORMATS:
        raise ValueError(f"Expected a format ({', '.join(FORMATS)}), got {form!r}.")
    FORMATS[form].check(CutModel(anatomy, kept, planned=True), tokenizer)


def export_structured(
    anatomy: Anatomy,
    tokenizer: PreTrainedTokenizerBase,
    kept: Sequence[Kept],
    manifest: Manifest,
    to: Path,
    *,
    check_tokens: Int64[Tensor, "rows length"],
    dtype: torch.dtype | None = None,
    units: Sequence[KeptUnits] = (),
) -> ExportReport:
    """Save a live model that is cut, or has zeros and new biases, and check the saved one against it.

    Args:
        anatomy: of the model, found before the cut; it is unchanged afterwards.
        kept: of each block.
        manifest: with everything that the export does not fill in itself; its `format` says in which form.
        to: must not exist or be empty.
        check_tokens: ids to compare logits on; a few hundred tokens are plenty.
        dtype: of the saved weights; None: as in memory.
        units: which of the parent's these are, for the record.

    Raises:
        ValueError: if the directory is not empty, or the format can't carry the model.
        ExportError: if the model could not be written, or what was loaded differs. Nothing is left behind.
    """
    model: Any = anatomy.model
    to, dtype = Path(to).expanduser().absolute(), dtype or model.dtype
    check_dtypes(model.dtype, dtype)
    if manifest.format not in FORMATS:
        raise ValueError(f"Expected `format` to be one of {', '.join(FORMATS)}, got {manifest.format!r}.")
    cut = CutModel(anatomy, kept)
    n_parent = sum(parameter.numel() for parameter in cut.skeleton(cut.config).parameters())
    with new_directory(to, n_parent * dtype.itemsize) as (made, scratch):
        zeros, weights = count_asked(model, manifest.asked)
        job = Job(cut, tokenizer, manifest.parent, dtype, check_tokens)
        saved = FORMATS[manifest.format].save(job, made, scratch)
        manifest = replace(
            manifest,
            label=manifest.label if zeros else _label(saved, n_parent),
            kept=[] if zeros else [{"kv_groups": block.kv_groups, "ffn": block.ffn} for block in kept],
            zeros=zeros,
            weights=weights,
            dtype=dtype_name(dtype),
            indices={
                block.name: {"kv_groups": ranges(x.kv_groups), "ffn": ranges(x.channels)}
                for block, x in zip(anatomy.blocks, units, strict=False)
            },
            shapes={cut.saved_name(index): cut.shape(index) for index in cut.stays},
            parameters={"parent": n_parent, "saved": saved.n_params},
            size_bytes=weight_bytes(made),
            versions=versions(),
            checks=saved.comparison.to_json(),
        )
        write_record(made, manifest)
    return ExportReport(to, manifest, saved.comparison)


def _label(saved: Saved, n_parent: int) -> str:
    if not saved.smaller:
        return "structured, padded with zeros to the parent's shapes: no size or speed gain"
    share = saved.n_params / n_parent
    return f"structured: {share:.1%} of the parent's parameters; the rest is neither stored nor computed"


def ranges(numbers: Sequence[int]) -> str:
    """Numbers in their order, runs of neighbours as ``first-last``: ``0-3,7,5``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(f"{first}-{last}" if last > first else f"{first}" for first, last in runs)
