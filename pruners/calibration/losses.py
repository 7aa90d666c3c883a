"""The loss of a model at the end of its stack of blocks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from secateur.pruners.models.anatomy import Anatomy


def mean_loss(
    anatomy: Anatomy, hidden: Float[Tensor, "windows length width"], tokens: Int[Tensor, "windows length"]
) -> float:
    """Mean cross-entropy of the next token, in nats, of the last block's output.

    Window by window, as logits are large.
    """
    windows = [
        F.cross_entropy(anatomy.logits(anatomy.tail(x[None]))[0, :-1].float(), ids[1:])
        for x, ids in zip(hidden, tokens.to(hidden.device), strict=True)
    ]
    return float(torch.stack(windows).double().mean())
