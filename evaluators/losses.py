"""Losses in chunks of positions: KL to the dense model and cross-entropy, accumulated in fp32 and up."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from secateur.pruners.models.anatomy import Anatomy

CHUNK_TOKENS = 128
"""Positions whose logits are in memory at a time."""

_SCALE = 2.0**15
"""Scale of the dense probabilities stored in fp16: they are normal numbers down to 1.9e-9."""


@dataclass(frozen=True)
class LossSums:
    """Sums in nats over positions, in float64 on the host.

    Args:
        kl: sum of KL(dense || pruned) over `n_kl` positions.
        ce: sum of the cross-entropy of the next token over `n_ce` positions.
    """

    kl: float = 0.0
    ce: float = 0.0
    n_kl: int = 0
    n_ce: int = 0

    def __add__(self, other: LossSums) -> LossSums:
        return LossSums(
            self.kl + other.kl, self.ce + other.ce, self.n_kl + other.n_kl, self.n_ce + other.n_ce
        )

    def means(self) -> dict[str, float]:
        """``kl`` and ``ce`` in nats per position."""
        return {"kl": self.kl / self.n_kl, "ce": self.ce / self.n_ce}


class Teacher:
    """The dense model's distribution at every position of a batch, computed once.

    Up to a limit it is kept as scaled fp16 probabilities, renormalised in use: the loss is then an exact KL to a
    distribution within 2^-11 of the dense one at each token. Past the limit only the last hidden
    states are kept and the probabilities are computed again for each use.

    Args:
        anatomy: the model with its dense weights.
        hidden: computes the output of the last block, if it is needed.
        keep: keep the probabilities.
        file: mapped file of the probabilities: processes with the same file share one copy, written by the first. None:
            in memory, as on a full disk or for a model on a GPU.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        hidden: Callable[[], Float[Tensor, "batch length width"]],
        *,
        keep: bool,
        file: Path | None = None,
    ) -> None:
        self._anatomy = anatomy
        self._states: Tensor | None = None
        self._stored: dict[str, Tensor] | None = None
        if file is not None and anatomy.head.weight.device.type != "cpu":
            file = None
        if keep and file is not None and file.exists():
            self._stored = load_file(file)
            return
        states = anatomy.tail(hidden()).flatten(0, 1)
        if not keep:
            self._states = states
            return
        self._stored = _probabilities(anatomy, states)
        if file is not None and _saved(self._stored, file):
            self._stored = load_file(file)

    @staticmethod
    def bytes_per_token(anatomy: Anatomy) -> int:
        """Memory for the kept probabilities of one position."""
        return 2 * anatomy.vocab_size

    def kl(self, chunk: int, log_probs: Float[Tensor, "tokens vocab"]) -> Float[Tensor, " tokens"]:
        """KL(dense || student) in nats at each position of a chunk, given the student's log-probabilities."""
        at = slice(chunk * CHUNK_TOKENS, (chunk + 1) * CHUNK_TOKENS)
        if self._stored is None:
            assert self._states is not None
            weights = self._anatomy.logits(self._states[at]).float().softmax(-1)
            negative_entropy = _negative_entropy(weights)
        else:
            weights = self._stored["probabilities"][at].float()
            negative_entropy = self._stored["negative_entropy"][at]
        mass = weights.sum(-1)
        # In place, and summed pairwise: a dot product's running sum loses 1e-3 nats over a vocabulary.
        kl = negative_entropy - weights.mul_(log_probs).sum(-1).double() / mass
        positive: Tensor = kl.clamp_min(0)  # rounding alone takes it below
        return positive


def _probabilities(anatomy: Anatomy, states: Float[Tensor, "tokens width"]) -> dict[str, Tensor]:
    """Scaled probabilities in fp16, ``tokens vocab``, and their negative entropy in nats in fp64, ``tokens``."""
    n_tokens, device = states.shape[0], states.device
    probabilities = torch.empty(n_tokens, anatomy.vocab_size, dtype=torch.float16, device=device)
    entropy = torch.empty(n_tokens, dtype=torch.float64, device=device)
    for start in range(0, n_tokens, CHUNK_TOKENS):
        at = slice(start, start + CHUNK_TOKENS)
        probabilities[at] = anatomy.logits(states[at]).float().softmax(-1) * _SCALE
        entropy[at] = _negative_entropy(probabilities[at].float())
    return {"probabilities": probabilities, "negative_entropy": entropy}


def _saved(tensors: dict[str, Tensor], path: Path) -> bool:
    """Write the file atomically, while another process may write the same one; False if the disk is full."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        save_file(tensors, temporary)
        temporary.replace(path)
    except (SafetensorError, OSError):
        temporary.unlink(missing_ok=True)
        return False
    return True


def _negative_entropy(weights: Float[Tensor, "tokens vocab"]) -> Float[Tensor, " tokens"]:
    """``sum p log p`` of unnormalised weights, in fp64 since large terms cancel; 0 log 0 = 0."""
    exact = weights.double()
    mass = exact.sum(-1)
    total: Tensor = torch.special.xlogy(exact, exact).sum(-1)
    return total / mass - mass.log()


def loss_sums(
    anatomy: Anatomy,
    hidden: Float[Tensor, "batch length width"],
    tokens: Int[Tensor, "batch length"],
    teacher: Teacher,
) -> LossSums:
    """Both losses of a batch, in chunks of positions.

    Args:
        anatomy: for the final norm and the head.
        hidden: output of the last block of the pruned model.
        tokens: the batch's token ids; position t predicts token t + 1 of the same window. What a BOS token at their
            beginning predicts does not count.
        teacher: the dense model on the same batch.
    """
    states = anatomy.tail(hidden).flatten(0, 1)
    targets = torch.roll(tokens, -1, dims=1).to(states.device)
    scored = torch.ones_like(targets, dtype=torch.bool)
    scored[:, : anatomy.first_scored] = False
    counted = scored.clone()
    counted[:, -1] = False
    targets, scored, counted = targets.flatten(), scored.flatten(), counted.flatten()
    kl = torch.zeros((), dtype=torch.float64, device=states.device)
    ce = torch.zeros_like(kl)
    for chunk, part in enumerate(states.split(CHUNK_TOKENS)):
        at = slice(chunk * CHUNK_TOKENS, chunk * CHUNK_TOKENS + part.shape[0])
        log_probs = anatomy.logits(part).float().log_softmax(-1)
        picked = log_probs.gather(1, targets[at, None])[:, 0]
        ce -= (picked * counted[at]).double().sum()
        kl += (teacher.kl(chunk, log_probs) * scored[at]).double().sum()
    return LossSums(float(kl), float(ce), int(scored.sum()), int(counted.sum()))
