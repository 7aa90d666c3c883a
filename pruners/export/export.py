"""A pruned model as a directory that stock transformers loads, checked by loading it.

The model is written beside its destination, loaded again in a fresh process and compared with the model in memory,
and only then moved into place: a directory under its final name is whole and was seen to work.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.pruners.export.export_check import TOLERANCES, Comparison, ExportError, check_saved, dtype_name
from secateur.pruners.export.manifest import Manifest, same_export
from secateur.pruners.export.saving import check_dtypes, new_directory, versions, weight_bytes, write_record
from secateur.pruners.models.checkpoints.quiet import quiet

__all__ = ["ExportError", "ExportReport", "Manifest", "export_model", "same_export"]


@dataclass(frozen=True)
class ExportReport:
    """A finished export, with the result of its check.

    Args:
        directory: where the model is.
        manifest: as written, with dtype, counts, versions and checks filled in.
        comparison: of the saved model with the one in memory.
    """

    directory: Path
    manifest: Manifest
    comparison: Comparison

    @property
    def size_bytes(self) -> int:
        """Size of the weight files."""
        return self.manifest.size_bytes

    @property
    def n_zeros(self) -> int:
        """Counted in the saved weights of the linears that the manifest names."""
        return sum(self.manifest.zeros.values())

    @property
    def n_weights(self) -> int:
        """Number of weights of these linears."""
        return sum(self.manifest.weights.values())


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
        with _stored_as(model, dtype) as lossy, quiet():
            model.save_pretrained(made)
            tokenizer.save_pretrained(made)
            zeros, weights = count_asked(model, manifest.asked)
        tolerance = max(TOLERANCES[model.dtype], TOLERANCES[dtype] if lossy else 0.0)
        comparison = check_saved(
            made, scratch, model, tokenizer, zeros=zeros, tokens=check_tokens, tolerance=tolerance
        )
        manifest = replace(
            manifest,
            dtype=dtype_name(dtype),
            zeros=zeros,
            weights=weights,
            size_bytes=weight_bytes(made),
            versions=versions(),
            checks=comparison.to_json(),
        )
        write_record(made, manifest)
    return ExportReport(directory, manifest, comparison)


# Before ---------------------------------------------------------------------------------------------------


def _check_names(model: PreTrainedModel, manifest: Manifest) -> None:
    modules = dict(model.named_modules())
    for name in manifest.asked:
        if not isinstance(getattr(modules.get(name), "weight", None), Tensor):
            raise ValueError(
                f"Expected `asked` to name linears of the model, got {name!r}. Use their full paths."
            )


# Writing --------------------------------------------------------------------------------------------------


@contextmanager
def _stored_as(model: PreTrainedModel, dtype: torch.dtype) -> Iterator[bool]:
    """Within it, each parameter is contiguous, owns its storage and has this dtype; then it is as before.

    Pruned weights may be transposed, or views on a part of a memory-mapped file or on each other's storage,
    which would be taken for tied weights. Yields whether the dtype changed the value of any weight.
    """
    before = [(parameter, parameter.data) for parameter in model.parameters()]  # tied ones come once
    seen: set[int] = set()
    lossy = False
    try:
        for parameter, data in before:
            stored = data.to(dtype).contiguous()
            lossy |= stored.dtype != data.dtype and not torch.equal(stored.to(data.dtype), data)
            storage = stored.untyped_storage()
            if storage.nbytes() != stored.numel() * stored.itemsize or storage.data_ptr() in seen:
                stored = stored.clone()
            seen.add(stored.untyped_storage().data_ptr())
            parameter.data = stored
        yield lossy
    finally:
        for parameter, data in before:
            parameter.data = data


def count_asked(model: PreTrainedModel, asked: Mapping[str, float]) -> tuple[dict[str, int], dict[str, int]]:
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
