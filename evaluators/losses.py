"""Losses in chunks of positions: KL to the dense model, cross-entropy and others, accumulated in fp32 and up."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from secateur.pruners.models.anatomy import Anatomy
from secateur.pruners.models.usable import check_finite
from secateur.pruners.stores.block_files import LevelStoreError, load_tensors, save_tensors

CHUNK_TOKENS = 128
"""Positions whose logits are in memory at a time on a CPU, and the least elsewhere."""

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

    Attributes:
        chunk_tokens: positions to compute the logits of at a time.
        n_damaged: number of damaged positions from the first or the second of each window on.
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
        device = anatomy.head.weight.device
        self.chunk_tokens = chunk_tokens(anatomy)
        self.damaged = None if damaged is None else damaged.flatten().to(device)
        self.n_damaged = {first: 0 if damaged is None else int(damaged[:, first:].sum()) for first in (0, 1)}
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
        self._stored = _probabilities(anatomy, states, self.chunk_tokens)
        if file is not None and _saved(self._stored, file):
            self._stored = load_tensors(file, None) or self._stored

    @staticmethod
    def bytes_per_token(anatomy: Anatomy) -> int:
        """Memory for the kept probabilities of one position."""
        return 2 * anatomy.vocab_size

    def compare(
        self, at: slice, log_probs: Float[Tensor, "tokens vocab"]
    ) -> dict[str, Float[Tensor, " tokens"]]:
        """Differences between dense model and student at some positions, by name.

        ``kl`` is KL(dense || student) in nats. ``acceptance``, if it is asked for, is the probability that
        speculative decoding (https://arxiv.org/abs/2211.17192, Corollary 3.6) accepts a token that the student drafts
        for the dense model, sum_x min(p(x), q(x)); its mean over given text is the Expected Speculative Acceptance
        Proxy of EvoESAP (https://arxiv.org/abs/2603.06003).

        Args:
            at: the positions, of all windows in a row.
            log_probs: of the student at these positions.
        """
        weights = self._weights(at)
        if self._stored is None:
            negative_entropy = _negative_entropy(weights)
        else:
            negative_entropy = self._stored["negative_entropy"][at]
        mass = weights.sum(-1)
        found = {}
        if self.acceptance:
            drafted = log_probs.exp().mul_(mass[:, None])
            found["acceptance"] = torch.minimum(weights, drafted, out=drafted).sum(-1).double() / mass
        # In place, and summed pairwise: a dot product's running sum loses 1e-3 nats over a vocabulary.
        kl = negative_entropy - weights.mul_(log_probs).sum(-1).double() / mass
        found["kl"] = kl.clamp_min(0)  # rounding alone takes it below
        return found

    def probabilities(self, at: slice) -> Float[Tensor, "tokens vocab"]:
        """The dense model's probabilities at some positions, as `kl` has them."""
        weights = self._weights(at)
        return weights.div_(weights.sum(-1, keepdim=True))

    def _weights(self, at: slice) -> Float[Tensor, "tokens vocab"]:
        """Probabilities times a factor, in fp32, in memory of their own."""
        if self._stored is not None:
            return self._stored["probabilities"][at].float()
        assert self._states is not None
        return self._anatomy.logits(self._states[at]).float().softmax(-1)


def chunk_tokens(anatomy: Anatomy) -> int:
    """Positions whose logits are computed at a time: `CHUNK_TOKENS` on a CPU, else as many as its room allows.

    Losses at a position do not depend on it, but for rounding in the head's matrix product.
    """
    room = anatomy.room
    return CHUNK_TOKENS if room is None else room.chunk_tokens(anatomy.vocab_size, CHUNK_TOKENS)


def _probabilities(anatomy: Anatomy, states: Float[Tensor, "tokens width"], chunk: int) -> dict[str, Tensor]:
    """Scaled probabilities in fp16, ``tokens vocab``, and their negative entropy in nats in fp64, ``tokens``."""
    n_tokens, device = states.shape[0], states.device
    probabilities = torch.empty(n_tokens, anatomy.vocab_size, dtype=torch.float16, device=device)
    entropy = torch.empty(n_tokens, dtype=torch.float64, device=device)
    for start in range(0, n_tokens, chunk):
        at = slice(start, start + chunk)
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


@dataclass(frozen=True)
class LossValues:
    """Losses of a batch at each position, still on the device of the head.

    Args:
        values: in float64, 0 where a position does not count; a row for each of `counted`.
        counted: number of positions that count, by the loss's name.
    """

    values: Float[Tensor, "losses batch length"]
    counted: Mapping[str, int]

    @staticmethod
    def read(found: Sequence[LossValues]) -> list[LossSums]:
        """Sums of batches of one shape; the host waits for the device once."""
        every = torch.stack([x.values for x in found]).cpu()
        return [_summed(values, x.counted) for values, x in zip(every, found, strict=True)]


def _summed(values: Float[Tensor, "losses batch length"], counted: Mapping[str, int]) -> LossSums:
    """Sums in chunks of `CHUNK_TOKENS` whatever the device computed at a time."""
    sums, windows = {}, {}
    for (name, n), row in zip(counted.items(), values, strict=True):
        total = torch.zeros((), dtype=torch.float64)
        for part in row.flatten().split(CHUNK_TOKENS):
            total = total + part.sum()
        sums[name] = (float(total), n)
        windows[name] = tuple(row.sum(1).tolist())
    return LossSums(sums, windows)


def loss_sums(
    anatomy: Anatomy,
    hidden: Float[Tensor, "batch length width"],
    tokens: Int[Tensor, "batch length"],
    teacher: Teacher,
) -> LossSums:
    """Losses of a batch, see `loss_values`."""
    return LossValues.read([loss_values(anatomy, hidden, tokens, teacher)])[0]


def loss_values(
    anatomy: Anatomy,
    hidden: Float[Tensor, "batch length width"],
    tokens: Int[Tensor, "batch length"],
    teacher: Teacher,
) -> LossValues:
    """Losses of a batch at each position, in chunks of positions: ``ce`` and those of the teacher.

    Args:
        anatomy: for the final norm and the head.
        hidden: output of the last block of the pruned model.
        tokens: the batch's token ids; position t predicts token t + 1 of the same window. What a BOS token at their
            beginning predicts does not count.
        teacher: the dense model on the same batch.
    """
    (rows, length), first = tokens.shape, anatomy.first_scored
    states = anatomy.tail(hidden).flatten(0, 1)
    targets = torch.roll(tokens, -1, dims=1).to(states.device).flatten()
    position = torch.arange(length, device=states.device).expand(rows, length).flatten()
    scored = position >= first
    masks = {"kl": scored, "ce": scored & (position < length - 1)}
    counted = {"kl": rows * max(0, length - first), "ce": rows * max(0, length - 1 - first)}
    if teacher.acceptance:
        masks["acceptance"], counted["acceptance"] = scored, counted["kl"]
    if teacher.damaged is not None:
        masks["weighted_kl"], counted["weighted_kl"] = scored & teacher.damaged, teacher.n_damaged[first]
    parts: dict[str, list[Tensor]] = {name: [] for name in masks}
    for start, part in zip(
        range(0, len(states), teacher.chunk_tokens), states.split(teacher.chunk_tokens), strict=True
    ):
        at = slice(start, start + len(part))
        log_probs = anatomy.logits(part).float().log_softmax(-1)
        found = {"ce": -log_probs.gather(1, targets[at, None])[:, 0], **teacher.compare(at, log_probs)}
        found["weighted_kl"] = found["kl"]
        for name, mask in masks.items():
            parts[name].append((found[name] * mask[at]).double())
    values = torch.stack([torch.cat(x) for x in parts.values()])
    return LossValues(values.reshape(len(masks), rows, length), counted)


def position_kl(
    anatomy: Anatomy, hidden: Float[Tensor, "batch length width"], teacher: Teacher
) -> Float[Tensor, "batch length"]:
    """KL(dense || pruned) in nats at each position, for the output of the pruned model's last block."""
    states, found = anatomy.tail(hidden).flatten(0, 1), []
    for start in range(0, len(states), teacher.chunk_tokens):
        at = slice(start, start + teacher.chunk_tokens)
        log_probs = anatomy.logits(states[at]).float().log_softmax(-1)
        found.append(teacher.compare(at, log_probs)["kl"])
    return torch.cat(found).reshape(hidden.shape[:2])
