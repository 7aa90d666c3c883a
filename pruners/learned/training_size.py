"""Size of a method's training: its steps and what it holds, from which its memory and its time follow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from secateur.pruners.models.anatomy import Anatomy, Block
from secateur.pruners.models.losses import logits_bytes
from secateur.pruners.models.memory import check_memory
from secateur.pruners.models.runner import fp32_bytes

OTHERWISE = "Use shorter windows, or a method without training (`secateur list methods`)."
"""Advice where the memory does not do."""


@dataclass(frozen=True)
class TrainingSize:
    """Size of a training.

    Args:
        n_steps: of the optimizer; where blocks are trained one after the other, those of each.
        batch: windows a step.
        length: tokens of a window.
        n_values: numbers that are held beside the model and the activations: trained ones, gradients, moments.
        teacher: whether predictions are compared with those of another state of the model.
        n_blocks: blocks that are trained one after the other, by their outputs; None: all together, by the loss.
    """

    n_steps: int
    batch: int
    length: int
    n_values: int
    teacher: bool = False
    n_blocks: int | None = None

    @property
    def n_tokens(self) -> int:
        """Tokens of all steps."""
        return self.n_steps * self.batch * self.length

    def work_bytes(self, anatomy: Anatomy) -> int:
        """About the memory of a step's activations and logits."""
        n_tokens = self.batch * self.length
        if self.n_blocks is not None:
            return max(activation_bytes(anatomy, [x], n_tokens, self.length) for x in anatomy.blocks)
        inside = activation_bytes(anatomy, anatomy.blocks, n_tokens, self.length)
        return inside + logits_bytes(anatomy, n_tokens, teacher=self.teacher)

    def n_bytes(self, anatomy: Anatomy) -> int:
        """About the memory beyond the model."""
        return fp32_bytes(anatomy.model) + self.work_bytes(anatomy) + 4 * self.n_values

    def check(self, anatomy: Anatomy, what: str, otherwise: str = OTHERWISE) -> None:
        """Raise a ValueError, with the memory that it takes, beyond what this machine has.

        Args:
            anatomy: of the model.
            what: that is trained, for the error.
            otherwise: advice, likewise.
        """
        check_memory(self.n_bytes(anatomy), anatomy.embedding.weight.device, what, otherwise)


def activation_bytes(anatomy: Anatomy, blocks: Sequence[Block], n_tokens: int, length: int) -> int:
    """About the memory of what blocks keep for a backward pass in fp32, for so many tokens in windows of a length.

    Projections and the functions between them keep about two tensors of each one's outputs, norms one of their inputs.
    Attention scores are kept by transformers' ``eager`` attention alone. Routed experts count as
    those that a token goes to.
    """
    inside = sum(2 * _n_outputs(block) + anatomy.width * len(block.norms) for block in blocks)
    eager = getattr(anatomy.model.config, "_attn_implementation", None) == "eager"
    scores = length * sum(block.n_heads for block in blocks) if eager else 0
    return 4 * n_tokens * (inside + scores)


def _n_outputs(block: Block) -> int:
    """Outputs of the projections that a token goes through."""
    others = sum(x.out_features for x in block.linears if x.expert is None)
    if block.mixture is None:
        return others
    routed = [x for x in block.linears if x.expert is not None]
    n_experts = max(1, len({x.expert for x in routed}))
    return others + sum(x.out_features for x in routed) * block.mixture.top_k // n_experts
