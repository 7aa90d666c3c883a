"""Differentiable losses in chunks of positions: only the logits of one chunk are in memory.

For the backward pass a chunk's logits are computed again, as in gradient checkpointing
(https://arxiv.org/abs/1604.06174). `evaluators.losses` measures; these have gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from secateur.pruners.models.anatomy import Anatomy

CHUNK_TOKENS = 512
"""Positions whose logits are in memory at a time."""

CHUNK_TENSORS, TEACHER_TENSORS = 3, 2
"""Tensors of a chunk's size at a time: logits, log-probabilities and a gradient; and the teacher's, of which two."""


def head_inputs(anatomy: Anatomy, tokens: Int[Tensor, "batch length"]) -> Float[Tensor, "batch length width"]:
    """Hidden states before the head, by the model's own forward pass; with gradients where they are enabled."""
    model: Any = anatomy.model
    base = model.base_model
    if base is model:  # Llama 4 names a base that it has not
        base = model.get_submodule(anatomy.blocks[0].name.rsplit(".", 2)[0])
    states: Tensor = base(input_ids=tokens.to(anatomy.head.weight.device), use_cache=False)[0]
    return states


def logits_bytes(anatomy: Anatomy, n_tokens: int, *, teacher: bool) -> int:
    """Memory of the logits of a loss over so many positions, with its backward pass, in bytes.

    Args:
        anatomy: the model.
        n_tokens: positions.
        teacher: of `kl_loss`; else of `ce_loss`.
    """
    n_tensors = CHUNK_TENSORS + (TEACHER_TENSORS if teacher else 0)
    return 4 * n_tensors * min(CHUNK_TOKENS, n_tokens) * anatomy.vocab_size


def kl_loss(
    anatomy: Anatomy,
    tokens: Int[Tensor, "batch length"],
    teacher: Anatomy,
    teacher_states: Float[Tensor, "batch length width"] | None = None,
    states: Float[Tensor, "batch length width"] | None = None,
) -> Float[Tensor, ""]:
    """KL(teacher || student) in nats per position, over all but a BOS token's; the teacher gets no gradient.

    Args:
        anatomy: the student.
        tokens: to compare on.
        teacher: with weights of its own.
        teacher_states: the teacher's `head_inputs` on these tokens; None: computed here.
        states: likewise of the student.
    """
    if teacher_states is None:
        with torch.no_grad():
            teacher_states = head_inputs(teacher, tokens)

    def of_chunk(states: Tensor, teacher_states: Tensor) -> Tensor:
        with torch.no_grad():
            target = teacher.logits(teacher_states).float().log_softmax(-1)
        log_probs = anatomy.logits(states).float().log_softmax(-1)
        return (target.exp() * (target - log_probs)).sum()

    first = anatomy.first_scored
    states = (head_inputs(anatomy, tokens) if states is None else states)[:, first:].flatten(0, 1)
    return _in_chunks(of_chunk, states, teacher_states[:, first:].flatten(0, 1)) / states.shape[0]


def ce_loss(
    anatomy: Anatomy,
    tokens: Int[Tensor, "batch length"],
    states: Float[Tensor, "batch length width"] | None = None,
) -> Float[Tensor, ""]:
    """Cross-entropy of the next token in nats, over the positions that have one in their window.

    Args:
        anatomy: the model.
        tokens: windows.
        states: the model's `head_inputs` on these; None: computed here.
    """
    first = anatomy.first_scored
    states = (head_inputs(anatomy, tokens) if states is None else states)[:, first:-1].flatten(0, 1)
    targets = tokens[:, first + 1 :].flatten().to(states.device)

    def of_chunk(states: Tensor, targets: Tensor) -> Tensor:
        logits = anatomy.logits(states).float()
        return torch.nn.functional.cross_entropy(logits, targets, reduction="sum")

    return _in_chunks(of_chunk, states, targets) / states.shape[0]


def _in_chunks(of_chunk: Callable[[Tensor, Tensor], Tensor], states: Tensor, beside: Tensor) -> Tensor:
    """Sum of a function over chunks of positions."""
    total = torch.zeros((), device=states.device)
    for part, other in zip(states.split(CHUNK_TOKENS), beside.split(CHUNK_TOKENS), strict=True):
        total = total + checkpoint(of_chunk, part, other, use_reentrant=False, preserve_rng_state=False)
    return total
