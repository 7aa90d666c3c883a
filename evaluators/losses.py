"""Losses in chunks of positions: KL to the dense model, cross-entropy and others, accumulated in fp32 and up."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from secateur.pruners.models.anatomy import Anatomy
from secateur.pruners.models.usable import check_finite
from secateur.pruners.stores.block_files import LevelStoreError, load_tensors, save_tensors

CHUNK_TOKENS = 128
"""Positions whose logits are in memory at a time."""

_SCALE = 2.0**15
"""Scale of the dense probabilities stored in fp16: they are normal numbers down to 1.9e-9."""


@dataclass(frozen=True)
class LossSums:
    """Sums over positions in float64 on the host, and the numbers of positions, by name.

    ``kl`` is the sum of KL(dense || pruned) and ``ce`` that of the cross-entropy of the next token, in nats;
    `Teacher` says which others there are. `windows` has the sum of each window by name.
    """

    sums: Mapping[str, tuple[float, int]] = field(default_factory=dict)
    windows: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def __add__(self, other: LossSums) -> LossSums:
        names = dict.fromkeys([*self.sums, *other.sums])
        pairs = {name: (self.sums.get(name, (0.0, 0)), other.sums.get(name, (0.0, 0))) for name in names}
        return LossSums(
            {name: (a + b, n + m) for name, ((a, n), (b, m)) in pairs.items()},
            {name: (*self.windows.get(name, ()), *other.windows.get(name, ())) for name in names},
        )

    def means(self) -> dict[str, float]:
        """Means over positions: ``kl``, ``ce`` and ``weighted_kl`` in nats, ``acceptance`` a probability."""
        return {name: total / n for name, (total, n) in self.sums.items()}

    def window_losses(self, loss: str) -> tuple[float, ...]:
        """The value to minimise of each window, in six digits; their mean is that of all positions, see `minimised`.

        Of a mean over some positions alone, such as ``weighted_kl``, a window's part counts as if each had as many.
        """
        windows, n_positions = self.windows[loss], self.sums[loss][1]
        means = ({loss: total * len(windows) / n_positions} for total in windows)
        return tuple(float(f"{minimised(loss, mean):.6g}") for mean in means)


def minimised(loss: str, means: Mapping[str, float]) -> float:
    """The value to minimise, >= 0 but for rounding: a mean, or ``1 - acceptance``."""
    return 1 - means[loss] if loss == "acceptance" else means[loss]


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
        acceptance: compute the expected acceptance, too.
        damaged: positions that ``weighted_kl`` is the mean KL of; None: it is not computed.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        hidden: Callable[[], Float[Tensor, "batch length width"]],
        *,
        keep: bool,
        file: Path | None = None,
        acceptance: bool = False,
        damaged: Bool[Tensor, "batch length"] | None = None,
    ) -> None:
        self._anatomy = anatomy
        self.acceptance = acceptance
        self.damaged = None if damaged is None else damaged.flatten().to(anatomy.head.weight.device)
        self._states: Tensor | None = None
        self._stored: dict[str, Tensor] | None = None
        if file is not None and anatomy.head.weight.device.type != "cpu":
            file = None
        if keep and file is not None:
            self._stored = load_tensors(file, None)  # none if it is damaged
        if self._stored is not None:
            return
        states = anatomy.tail(hidden()).flatten(0, 1)
        check_finite(states, "states of the dense model")
        if not keep:
            self._states = states
            return
        self._stored = _probabilities(anatomy, states)
        if file is not None and _saved(self._stored, file):
            self._stored = load_tensors(file, None) or self._stored

    @staticmethod
    def bytes_per_token(anatomy: Anatomy) -> int:
        """Memory for the kept probabilities of one position."""
        return 2 * anatomy.vocab_size

    def compare(
        self, chunk: int, log_probs: Float[Tensor, "tokens vocab"]
    ) -> dict[str, Float[Tensor, " tokens"]]:
        """Differences between dense model and student at each position of a chunk, by name.

        ``kl`` is KL(dense || student) in nats. ``acceptance``, if it is asked for, is the probability that
        speculative decoding (https://arxiv.org/abs/2211.17192, Corollary 3.6) accepts a token that the student drafts
        for the dense model, sum_x min(p(x), q(x)); its mean over given text is the Expected Speculative Acceptance
        Proxy of EvoESAP (https://arxiv.org/abs/2603.06003).

        Args:
            chunk: its number.
            log_probs: of the student at these positions.
        """
        weights = self._weights(chunk)
        if self._stored is None:
            negative_entropy = _negative_entropy(weights)
        else:
            negative_entropy = self._stored["negative_entropy"][_at(chunk)]
        mass = weights.sum(-1)
        found = {}
        if self.acceptance:
            drafted = log_probs.exp().mul_(mass[:, None])
            found["acceptance"] = torch.minimum(weights, drafted, out=drafted).sum(-1).double() / mass
        # In place, and summed pairwise: a dot product's running sum loses 1e-3 nats over a vocabulary.
        kl = negative_entropy - weights.mul_(log_probs).sum(-1).double() / mass
        found["kl"] = kl.clamp_min(0)  # rounding alone takes it below
        return found

    def probabilities(self, chunk: int) -> Float[Tensor, "tokens vocab"]:
        """The dense model's probabilities at each position of a chunk, as `kl` has them."""
        weights = self._weights(chunk)
        return weights.div_(weights.sum(-1, keepdim=True))

    def _weights(self, chunk: int) -> Float[Tensor, "tokens vocab"]:
        """Probabilities times a factor, in fp32, in memory of their own."""
        if self._stored is not None:
            return self._stored["probabilities"][_at(chunk)].float()
        assert self._states is not None
        return self._anatomy.logits(self._states[_at(chunk)]).float().softmax(-1)


def _at(chunk: int) -> slice:
    """Positions of a chunk."""
    return slice(chunk * CHUNK_TOKENS, (chunk + 1) * CHUNK_TOKENS)


def _probabilities(anatomy: Anatomy, states: Float[Tensor, "tokens width"]) -> dict[str, Tensor]:
    """Scaled probabilities in fp16, ``tokens vocab``, and their negative entropy in nats in fp64, ``tokens``."""
    n_tokens, device = states.shape[0], states.device
    probabilities = torch.empty(n_tokens, anatomy.vocab_size, dtype=torch.float16, device=device)
    entropy = torch.empty(n_tokens, dtype=torch.float64, device=device)
    for start in range(0, n_tokens, CHUNK_TOKENS):
        at = slice(start, start + CHUNK_TOKENS)
        logits = anatomy.logits(states[at])
        check_finite(logits, "logits of the dense model")
        probabilities[at] = logits.float().softmax(-1) * _SCALE
        entropy[at] = _negative_entropy(probabilities[at].float())
    return {"probabilities": probabilities, "negative_entropy": entropy}


def _saved(tensors: dict[str, Tensor], path: Path) -> bool:
    """Write the file atomically, while another process may write the same one; False if the disk is full."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        save_tensors(temporary, tensors)
        temporary.replace(path)
    except (LevelStoreError, OSError):
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
    """Losses of a batch, in chunks of positions: ``ce`` and those of the teacher.

    Args:
        anatomy: for the final norm and the head.
        hidden: output of the last block of the pruned model.
        tokens: the batch's token ids; position t predicts token t + 1 of the same window. What a BOS token at their
            beginning predicts does not count.
        teacher: the dense model on the same batch.
    """
    states = anatomy.tail(hidden).flatten(0, 1)
    targets = torch.roll(tokens, -1, dims=1).to(states.device).flatten()
    scored = torch.ones_like(tokens, dtype=torch.bool, device=states.device)
    scored[:, : anatomy.first_scored] = False
    counted = scored.clone()
    counted[:, -1] = False
    masks = {"kl": scored.flatten(), "ce": counted.flatten()}
    if teacher.acceptance:
        masks["acceptance"] = masks["kl"]
    if teacher.damaged is not None:
        masks["weighted_kl"] = masks["kl"] & teacher.damaged
    sums = dict.fromkeys(masks, torch.zeros((), dtype=torch.float64, device=states.device))
    parts: dict[str, list[Tensor]] = {name: [] for name in masks}
    for chunk, part in enumerate(states.split(CHUNK_TOKENS)):
        at = slice(chunk * CHUNK_TOKENS, chunk * CHUNK_TOKENS + part.shape[0])
        log_probs = anatomy.logits(part).float().log_softmax(-1)
        found = {"ce": -log_probs.gather(1, targets[at, None])[:, 0], **teacher.compare(chunk, log_probs)}
        found["weighted_kl"] = found["kl"]
        for name, mask in masks.items():
            parts[name].append((found[name] * mask[at]).double())
            sums[name] = sums[name] + parts[name][-1].sum()
    return LossSums(
        {name: (float(total), int(masks[name].sum())) for name, total in sums.items()},
        {name: tuple(torch.cat(x).reshape(tokens.shape).sum(1).tolist()) for name, x in parts.items()},
    )


def position_kl(
    anatomy: Anatomy, hidden: Float[Tensor, "batch length width"], teacher: Teacher
) -> Float[Tensor, "batch length"]:
    """KL(dense || pruned) in nats at each position, for the output of the pruned model's last block."""
    chunks = anatomy.tail(hidden).flatten(0, 1).split(CHUNK_TOKENS)
    log_probs = (anatomy.logits(part).float().log_softmax(-1) for part in chunks)
    found = [teacher.compare(chunk, x)["kl"] for chunk, x in enumerate(log_probs)]
    return torch.cat(found).reshape(hidden.shape[:2])
