"""Export of a pruned model, checked by loading it: with zeros in place, or really smaller.

The model is written beside its destination, loaded again in a fresh process and compared with the model in memory,
and only then moved into place: a directory under its final name is whole and was seen to work.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Int64
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.pruners.export.card import card
from secateur.pruners.export.cut import CutModel, Job, Saved, stored
from secateur.pruners.export.export_check import TOLERANCES, Comparison, ExportError, check_saved, dtype_name
from secateur.pruners.export.manifest import MANIFEST, Manifest, file_records, weight_bytes
from secateur.pruners.export.registry import FORMATS
from secateur.pruners.export.saving import check_dtypes, new_directory, versions
from secateur.pruners.models.anatomy import Anatomy
from secateur.pruners.models.checkpoints.quiet import quiet
from secateur.pruners.models.experts import joined_experts
from secateur.pruners.models.narrow import Narrow
from secateur.spaces.architecture.candidate import Kept, KeptUnits


@dataclass(frozen=True)
class ExportReport:
    """A finished export, with the result of its check.

    Args:
        directory: of the model.
        manifest: as written, with dtype, counts, versions and checks filled in.
        comparison: of the saved model with the one in memory.
    """

    directory: Path
    manifest: Manifest
    comparison: Comparison


# Zeros in place -------------------------------------------------------------------------------------------


def export_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    *,
    manifest: Manifest,
    check_tokens: Int64[Tensor, "rows length"],
    dtype: torch.dtype | None = None,
) -> ExportReport:
    """Save a model whose pruned weights are zeros in place, and check the saved one against it.

    The check computes in the dtype that the model has in memory, on the CPU. Where rounding to `dtype` changes
    no weight, as for a float32 copy of a bfloat16 model that only got zeros, it is as strict as without;
    otherwise the tolerance of `dtype` applies.

    Args:
        model: on any device; it is unchanged afterwards.
        directory: must not exist or be empty; see `same_export` for one that does.
        manifest: with everything that the export does not fill in itself.
        check_tokens: ids to compare logits on; a few hundred tokens are plenty.
        dtype: of the saved weights; None: as in memory.

    Raises:
        ValueError: if the directory is not empty, or a linear of the manifest is unknown.
        ExportError: if the model could not be written, or what was loaded differs. Nothing is left behind.
    """
    directory = Path(directory).expanduser().absolute()
    dtype = dtype or model.dtype
    check_dtypes(model.dtype, dtype)
    _check_names(model, manifest)
    n_bytes = sum(p.numel() for p in model.parameters()) * dtype.itemsize
    with new_directory(directory, n_bytes) as (made, scratch):
        with stored_as(model, dtype) as lossy, quiet():
            zeros, weights = count_asked(model, manifest.asked)
            with joined_experts(model):
                model.save_pretrained(made)
                counted = zeros_of_parameters(model, zeros)
            tokenizer.save_pretrained(made)
        tolerance = max(TOLERANCES[model.dtype], TOLERANCES[dtype] if lossy else 0.0)
        comparison = check_saved(
            made, scratch, model, tokenizer, zeros=counted, tokens=check_tokens, tolerance=tolerance
        )
        manifest = write_record(made, manifest, dtype, comparison, zeros=zeros, weights=weights)
    return ExportReport(directory, manifest, comparison)


def _check_names(model: PreTrainedModel, manifest: Manifest) -> None:
    modules = dict(model.named_modules())
    for name in manifest.asked:
        if not isinstance(getattr(modules.get(name), "weight", None), Tensor):
            raise ValueError(
                f"Expected `asked` to name linears of the model, got {name!r}. Use their full paths."
            )


@contextmanager
def stored_as(model: nn.Module, dtype: torch.dtype) -> Iterator[bool]:
    """Context in which each parameter is as `stored` gives it; yields whether the dtype changed any value.

    Pruned weights may be transposed, or views on a part of a memory-mapped file or on each other's storage,
    which would be taken for tied weights.
    """
    parameters = dict(model.named_parameters())  # tied ones come once
    before = {name: parameter.data for name, parameter in parameters.items()}
    tensors, lossy = stored(before, dtype)
    try:
        for name, parameter in parameters.items():
            parameter.data = tensors[name]
        yield lossy
    finally:
        for name, parameter in parameters.items():
            parameter.data = before[name]


# Really smaller -------------------------------------------------------------------------------------------


def check_structured(
    anatomy: Anatomy,
    tokenizer: PreTrainedTokenizerBase,
    kept: Sequence[Kept],
    form: str,
    narrow: Narrow | None = None,
) -> None:
    """Raise a ValueError if the format can't carry the model once it is cut; it is dense, and is not changed.

    Args:
        form: a name in `FORMATS`.
        narrow: hidden channels that stay; None: all.
    """
    if form not in FORMATS:
        raise ValueError(f"Expected a format ({', '.join(FORMATS)}), got {form!r}.")
    FORMATS[form].check(CutModel(anatomy, kept, planned=True, narrow=narrow), tokenizer)


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
    narrow: Narrow | None = None,
) -> ExportReport:
    """Save a live model that is cut, or has zeros and new biases, and check the saved one against it.

    Args:
        anatomy: of the model, found before the cut; it is unchanged afterwards.
        kept: of each block.
        manifest: with everything that the export does not fill in itself; its `format` is a name in `FORMATS`.
        to: must not exist or be empty.
        check_tokens: ids to compare logits on; a few hundred tokens are plenty.
        dtype: of the saved weights; None: as in memory.
        units: which of the parent's these are, for the record.
        narrow: hidden channels that stay, masked in the live model; None: all.

    Raises:
        ValueError: if the directory is not empty, or the format can't carry the model.
        ExportError: if the model could not be written, or what was loaded differs. Nothing is left behind.
    """
    model: Any = anatomy.model
    to, dtype = Path(to).expanduser().absolute(), dtype or model.dtype
    check_dtypes(model.dtype, dtype)
    if manifest.format not in FORMATS:
        raise ValueError(f"Expected `format` to be one of {', '.join(FORMATS)}, got {manifest.format!r}.")
    cut = CutModel(anatomy, kept, narrow=narrow)
    n_parent = sum(parameter.numel() for parameter in cut.skeleton(cut.config).parameters())
    with new_directory(to, n_parent * dtype.itemsize) as (made, scratch):
        zeros, weights = count_asked(model, manifest.asked)
        job = Job(cut, tokenizer, manifest.parent, dtype, check_tokens)
        saved = FORMATS[manifest.format].save(job, made, scratch)
        manifest = write_record(
            made,
            manifest,
            dtype,
            saved.comparison,
            label=manifest.label if zeros else _label(saved, n_parent),
            kept=[] if zeros else [block.plain for block in kept],
            zeros=zeros,
            weights=weights,
            indices={
                block.name: {"kv_groups": ranges(x.kv_groups), "ffn": ranges(x.channels)}
                | ({"queries": ranges(x.queries)} if x.queries else {})
                for block, x in zip(anatomy.blocks, units, strict=False)
            }
            | ({} if narrow is None else {"hidden": {"channels": ranges(narrow.channels)}}),
            shapes={cut.saved_name(index): cut.shape(index) for index in cut.kept_blocks},
            parameters={"parent": n_parent, "saved": saved.n_params},
        )
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


# Both -----------------------------------------------------------------------------------------------------


def zeros_of_parameters(model: nn.Module, zeros: Mapping[str, int], prefix: str = "") -> dict[str, int]:
    """Zeros by full names of parameters of the joined model; of experts those of all in their fused tensors.

    Args:
        model: it, or a part of it.
        zeros: by the full names of projections.
        prefix: path of the part.
    """
    found = {}
    for name, parameter in model.named_parameters(prefix):
        owner = name.rpartition(".")[0]
        if owner in zeros or any(x.startswith(f"{owner}.") and parameter.ndim == 3 for x in zeros):
            found[name] = parameter.numel() - int(parameter.count_nonzero())
    return found


def count_asked(model: nn.Module, asked: Mapping[str, float]) -> tuple[dict[str, int], dict[str, int]]:
    """Zeros and weights of each linear, as they are saved.

    Raises:
        ExportError: if a linear has fewer zeros than asked, by more than rounding in each row or column explains.
    """
    zeros, weights = {}, {}
    for name, sparsity in asked.items():
        weight = cast("Tensor", model.get_submodule(name).weight)
        zeros[name], weights[name] = weight.numel() - int(weight.count_nonzero()), weight.numel()
        found = zeros[name] / weights[name]
        if not found >= sparsity - 1 / min(weight.shape):
            raise ExportError(
                f"Expected a sparsity of {sparsity:.4f}, got {found:.4f} at {name}. "
                "Prune the model before exporting it."
            )
    return zeros, weights


def write_record(
    made: Path, manifest: Manifest, dtype: torch.dtype, comparison: Comparison, **found: Any
) -> Manifest:
    """Fill in the manifest, and write the model card and, last of all files, the manifest."""
    manifest = replace(
        manifest,
        dtype=dtype_name(dtype),
        size_bytes=weight_bytes(made),
        versions=versions(),
        checks=comparison.to_json(),
        **found,
    )
    (made / "README.md").write_text(card(manifest), encoding="utf-8")
    manifest = replace(manifest, files=file_records(made))
    (made / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return manifest
