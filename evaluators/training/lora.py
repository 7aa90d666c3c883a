"""Low-rank updates through PEFT that keep zeros.

Plain LoRA computes ``W x + B (A x)``: merged, ``W + B A`` has no zeros left. Here the update is masked by the pruned
weight's own zeros, in the forward pass as in the merge, so that the trained weight is the saved one: the sparse
``W + mask * (B A)``. The product is formed in each forward pass: rank / positions of the layer's own cost.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, LoraModel
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from secateur.pruners.models.anatomy import Anatomy

_ADAPTER = "secateur"


class MaskedLora(PeftLinear):
    """PEFT's LoRA of a linear layer (or Conv1D), with an update that is 0 wherever the weight is."""

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The update of the weight, in the weight's own layout; PEFT merges with it."""
        base: Any = self.get_base_layer()
        update: Tensor = super().get_delta_weight(adapter)
        return update.masked_fill(base.weight == 0, 0)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer with the weight that a merge would give it."""
        base: Any = self.get_base_layer()
        weight = base.weight + self.get_delta_weight(_ADAPTER)
        return F.linear(x, weight.T if isinstance(base, Conv1D) else weight, base.bias)


def attach_lora(anatomy: Anatomy, rank: int, seed: int) -> LoraModel:
    """Add updates, at first 0, to all projections of the live model, as its only trained parameters.

    Args:
        rank: of the updates, scaled by 2.
        seed: of their first values; the global generator is left alone.

    Returns:
        PEFT's view of the model, whose `merge_and_unload` writes the updates into the weights.
    """
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.0,
        target_modules=[x.name for x in anatomy.linears if x.n_weights],  # the others were removed
        fan_in_fan_out=any(linear.transposed for linear in anatomy.linears),
    )
    config._register_custom_module({nn.Linear: MaskedLora, Conv1D: MaskedLora})  # PEFT's documented hook
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LoraModel(anatomy.model, config, _ADAPTER)
