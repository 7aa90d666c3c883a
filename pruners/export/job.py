"""A model to save, and the result."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from secateur.pruners.export.cut import CutModel
from secateur.pruners.export.export_check import Comparison


@dataclass(frozen=True)
class Job:
    """A structured model to save.

    Args:
        cut: the live model.
        tokenizer: its tokenizer.
        parent: name of the dense model.
        dtype: of the saved weights.
        tokens: to compare logits on.
    """

    cut: CutModel
    tokenizer: PreTrainedTokenizerBase
    parent: str
    dtype: torch.dtype
    tokens: Int64[Tensor, "rows length"]


@dataclass(frozen=True)
class Saved:
    """A model that was written and checked.

    Args:
        comparison: with the model in memory.
        n_params: as stored.
        smaller: False if it has the parent's shapes.
    """

    comparison: Comparison
    n_params: int
    smaller: bool = True
