"""Structured model as a directory that transformers loads, checked by loading it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import save_torch_state_dict
from torch import Tensor

from secateur.pruners.export import heterogeneous
from secateur.pruners.export.cut import CutModel, Job, Saved, stored
from secateur.pruners.export.export_check import TOLERANCES, check_saved, dtype_name
from secateur.pruners.export.padded import padded_model
from secateur.pruners.export.stock import NotStockError, stock_model
from secateur.pruners.models.checkpoints.quiet import quiet

Made = tuple[dict[str, Any], dict[str, Tensor], dict[str, str]]
"""Content of the config, weights, and code files by name."""


def any_form(cut: CutModel, parent: str) -> Made:
    """The stock form if there is one, else the heterogeneous one."""
    try:
        return *stock_model(cut), {}
    except NotStockError:
        return heterogeneous.heterogeneous_model(cut, parent)


def stock_form(cut: CutModel, parent: str) -> Made:
    """The stock form, or a ValueError that says why there is none."""
    try:
        return *stock_model(cut), {}
    except NotStockError as error:
        raise ValueError(
            f"Expected a model that a stock class of {cut.anatomy.family} can hold, got one that it can't: {error}. "
            "Use the format hf, or search with `space.target_format: hf-stock`."
        ) from error


def padded_form(cut: CutModel, parent: str) -> Made:
    """The dense shapes with zeros."""
    try:
        return *padded_model(cut), {}
    except NotStockError as error:
        raise ValueError(
            f"Expected a model that fits the parent's class, got one that doesn't: {error}. Use the format hf, or a "
            "repair without biases."
        ) from error


def save_hf(make: Callable[[CutModel, str], Made], job: Job, made: Path, scratch: Path) -> Saved:
    """Write the form that `make` gives, load it in a fresh process and compare it with the live model.

    Raises:
        ValueError: if the model has no such form.
        ExportError: if what was loaded differs.
    """
    content, weights, code = make(job.cut, job.parent)
    tensors, lossy = stored(weights, job.dtype)
    model: Any = job.cut.anatomy.model
    config = json.dumps(content | {"dtype": dtype_name(job.dtype)}, indent=2) + "\n"
    for name, text in {"config.json": config, **code}.items():
        (made / name).write_text(text, encoding="utf-8")
    with quiet():
        save_torch_state_dict(tensors, made)
        if model.can_generate() and model.generation_config is not None:
            model.generation_config.save_pretrained(made)
        job.tokenizer.save_pretrained(made)
    comparison = check_saved(
        made,
        scratch,
        model,
        job.tokenizer,
        zeros={},
        tokens=job.tokens,
        tolerance=max(TOLERANCES[model.dtype], TOLERANCES[job.dtype] if lossy else 0.0),
        trust_remote_code=bool(code),
    )
    n_params = sum(weight.numel() for name, weight in weights.items() if _own(name) not in _buffers(model))
    return Saved(comparison, n_params, smaller=make is not padded_form)


def _buffers(model: Any) -> set[str]:
    """Own names of saved buffers, which are no parameters."""
    return {_own(name) for name, _ in model.named_buffers()} - {
        _own(name) for name, _ in model.named_parameters()
    }


def _own(name: str) -> str:
    return name.rpartition(".")[2]
