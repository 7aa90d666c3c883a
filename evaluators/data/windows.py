"""Token windows for measurements, with the dense model's side of the loss computed once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, pairwise
from pathlib import Path

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from secateur.evaluators.losses import LossSums, Teacher, loss_sums
from secateur.pruners.calibration.tokens import tokens_sha256
from secateur.pruners.models.anatomy import Anatomy
from secateur.pruners.models.runner import BlockInputs, BlockRunner
from secateur.spaces.measurement import Fidelity, Part

BATCH_TOKENS = 2048
"""Tokens computed by a block at a time on a CPU, and the least elsewhere."""

CHECK_TOKENS = 256
"""Positions on which a saved model's logits are compared."""

TEACHER_BYTES = 4 << 30
"""Dense probabilities are kept up to so many bytes, then computed again for each use."""


@dataclass(frozen=True)
class Batch:
    """Windows computed together, with the blocks' inputs and the dense model's distribution.

    `name` is unique in its `EvaluationData`.
    """

    name: str
    tokens: Int[Tensor, "batch length"]
    inputs: BlockInputs
    teacher: Teacher


class EvaluationData:
    """Nested subsets of fixed windows, in batches.

    Batches end at every fidelity, and between them at the batch size: fixed beforehand, so that a measurement
    does not depend on earlier ones.

    Args:
        anatomy: the dense model.
        windows: token windows of each part, ``windows length``; a fidelity is the first ones.
        fidelities: all that will be asked for.
        shared: prefix of files for the dense side of the loss of this very model, mapped by all processes with the
            same prefix; None: each process keeps it in its own memory.
        acceptance: measure the expected acceptance, too.
        damaged: positions of each part that ``weighted_kl`` is measured at; None: it is not measured.

    Attributes:
        acceptance: as given.
        runner: of the model's blocks, for candidates on these batches.

    Raises:
        ValueError: if a fidelity is not of whole windows, or of more than there are.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        windows: Mapping[Part, Int[Tensor, "windows length"]],
        fidelities: Sequence[Fidelity],
        shared: Path | None = None,
        *,
        acceptance: bool = False,
        damaged: Mapping[Part, Bool[Tensor, "windows length"]] | None = None,
        compiled: bool = False,
    ) -> None:
        self._anatomy = anatomy
        self._windows = windows
        self._shared = shared
        self.acceptance = acceptance
        self._damaged = damaged
        self.runner = BlockRunner(anatomy, compiled=compiled)
        self._batches: dict[Part, list[Batch]] = {}
        self._drawn: dict[tuple[Part, int], Batch] = {}
        self._teacher_bytes = 0
        self._cuts = self._all_cuts(fidelities)

    @property
    def check_tokens(self) -> Int[Tensor, "1 length"]:
        """Tokens on which a saved model's logits are compared: the first ones of the test part."""
        return self._windows["test"][:1, :CHECK_TOKENS]

    def windows_of(self, fidelity: Fidelity) -> Int[Tensor, "windows length"]:
        """The windows of a fidelity: the first of its part."""
        return self._windows[fidelity.part][: self._n_windows(fidelity)]

    def damaged_of(self, fidelity: Fidelity) -> Bool[Tensor, "windows length"] | None:
        """The damaged positions of these windows; None: ``weighted_kl`` is not measured."""
        return None if self._damaged is None else self._damaged[fidelity.part][: self._n_windows(fidelity)]

    @torch.no_grad()
    def of(self, fidelity: Fidelity) -> list[Batch]:
        """The batches of a fidelity: the first windows of its part.

        A batch asked for the first time is prepared with the model's present weights, which must be the dense ones.

        Raises:
            ValueError: if the object was not made for this fidelity.
        """
        cuts = self._cuts.get(fidelity.part, [])
        wanted = self._n_windows(fidelity)
        if wanted not in cuts:
            raise ValueError(
                f"Expected one of the fidelities that the evaluator was made for, got {fidelity.text!r}."
            )
        batches = self._batches.setdefault(fidelity.part, [])
        bounds = cuts[: cuts.index(wanted) + 1]
        for start, stop in list(pairwise([0, *bounds]))[len(batches) :]:
            name = f"{fidelity.part}:{start}-{stop}"
            damaged = None if self._damaged is None else self._damaged[fidelity.part][start:stop]
            batches.append(self._prepare(name, self._windows[fidelity.part][start:stop], damaged))
        return batches[: len(bounds)]

    @torch.no_grad()
    def drawn(self, part: Part, start: int, n_tokens: int) -> list[Batch]:
        """Consecutive windows of a part, a batch each, from any start on; the first window follows the last.

        As in `of`, a window asked for the first time is prepared with the model's present weights. Of the dense side
        the last hidden states alone are kept, since few windows are drawn again.
        """
        windows = self._windows[part]
        indices = [(start + i) % len(windows) for i in range(n_tokens // windows.shape[1])]
        for index in indices:
            if (part, index) not in self._drawn:
                window = windows[index : index + 1]
                self._drawn[part, index] = self._prepare(f"{part}:{index}", window, None, keep=False)
        return [self._drawn[part, index] for index in indices]

    def _prepare(
        self,
        name: str,
        tokens: Int[Tensor, "batch length"],
        damaged: Bool[Tensor, "batch length"] | None,
        *,
        keep: bool = True,
    ) -> Batch:
        """Capture the blocks' arguments and compute the dense side, once; `keep` probabilities while there is room."""
        inputs = self.runner.start(tokens)
        room = tokens.numel() * Teacher.bytes_per_token(self._anatomy)
        keep = keep and self._teacher_bytes + room <= teacher_bytes(self._anatomy)
        self._teacher_bytes += room if keep else 0
        teacher = Teacher(
            self._anatomy,
            lambda: self.runner.run(inputs),
            keep=keep,
            file=self._shared_file(tokens),
            acceptance=self.acceptance,
            damaged=damaged,
        )
        return Batch(name, tokens.to(self.runner.device), inputs, teacher)

    def _shared_file(self, tokens: Int[Tensor, "batch length"]) -> Path | None:
        """File named after the model, its precision and the tokens."""
        if self._shared is None:
            return None
        precision = str(self._anatomy.head.weight.dtype).removeprefix("torch.")
        tokens_hash = tokens_sha256(tokens)[:16]
        return self._shared.with_name(f"{self._shared.name}-{precision}-{tokens_hash}.safetensors")

    def _n_windows(self, fidelity: Fidelity) -> int:
        windows = self._windows[fidelity.part]
        count, rest = divmod(fidelity.n_tokens, windows.shape[1])
        if rest or count > windows.shape[0]:
            raise ValueError(
                f"Expected a fidelity of whole windows of {windows.shape[1]} tokens, at most "
                f"{windows.numel()} tokens in part {fidelity.part!r}, got {fidelity.n_tokens}."
            )
        return count

    def _all_cuts(self, fidelities: Sequence[Fidelity]) -> dict[Part, list[int]]:
        """Ends of batches, in windows."""
        cuts: dict[Part, list[int]] = {}
        for part in {fidelity.part for fidelity in fidelities}:
            window = self._windows[part].shape[1]
            counts = [self._n_windows(fidelity) for fidelity in fidelities if fidelity.part == part]
            cuts[part] = batch_ends(window, [n * window for n in counts], batch_tokens(self._anatomy))
        return cuts

    @staticmethod
    def n_kept(anatomy: Anatomy, n_tokens: int) -> int:
        """Positions out of so many whose dense probabilities are kept; of the others the hidden states are."""
        return min(n_tokens, teacher_bytes(anatomy) // Teacher.bytes_per_token(anatomy))

    def live_losses(self, fidelity: Fidelity) -> dict[str, float]:
        """Means of the losses of the model with its present weights, see `LossSums.means`.

        The fidelity must have been prepared by `of` while the model was dense.
        """
        return losses_on(self._anatomy, ((batch.tokens, batch.teacher) for batch in self.of(fidelity)))


def teacher_bytes(anatomy: Anatomy) -> int:
    """Most bytes of kept probabilities."""
    return TEACHER_BYTES if anatomy.room is None else min(TEACHER_BYTES, anatomy.room.probabilities)


def batch_tokens(anatomy: Anatomy) -> int:
    """Tokens computed by a block at a time: `BATCH_TOKENS` on a CPU, else as many as the device's room allows."""
    if anatomy.room is None:
        return BATCH_TOKENS
    widest = max(sum(x.out_features * x.weight.itemsize for x in block.linears) for block in anatomy.blocks)
    return anatomy.room.batch_tokens(4 * widest, BATCH_TOKENS)


def batch_ends(window: int, n_tokens: Sequence[int], batch: int = BATCH_TOKENS) -> list[int]:
    """Ends of batches, in windows: at each of these numbers of tokens, and between them at the batch size in tokens."""
    ends = sorted({n // window for n in n_tokens})
    rows = max(1, batch // window)
    between = (range(start + rows, stop, rows) for start, stop in pairwise([0, *ends]))
    return sorted({*ends, *chain.from_iterable(between)})


def losses_on(
    anatomy: Anatomy, batches: Iterable[tuple[Int[Tensor, "batch length"], Teacher]]
) -> dict[str, float]:
    """Means of the losses of a live model, see `LossSums.means`; not finite if the model overflows."""
    return sums_on(anatomy, batches).means()


def sums_on(anatomy: Anatomy, batches: Iterable[tuple[Int[Tensor, "batch length"], Teacher]]) -> LossSums:
    """Sums of the losses of a live model; not finite if the model overflows."""
    with torch.no_grad():
        sums = (loss_sums(anatomy, _last_hidden(anatomy, tokens), tokens, it) for tokens, it in batches)
        return sum(sums, LossSums())


def teacher_batches(
    dense: Anatomy,
    windows: Int[Tensor, "windows length"],
    *,
    acceptance: bool = False,
    damaged: Bool[Tensor, "windows length"] | None = None,
) -> list[tuple[Int[Tensor, "batch length"], Teacher]]:
    """Batches for `losses_on`, with the dense model's hidden states alone.

    Args:
        dense: the dense model with weights of its own.
        windows: token ids.
        acceptance, damaged: see `EvaluationData`; the latter for these windows.
    """
    rows = max(1, batch_tokens(dense) // windows.shape[1])
    batches = windows.split(rows)
    chosen = [None] * len(batches) if damaged is None else damaged[: len(windows)].split(rows)
    return [
        (
            tokens,
            Teacher(
                dense, partial(_last_hidden, dense, tokens), keep=False, acceptance=acceptance, damaged=at
            ),
        )
        for tokens, at in zip(batches, chosen, strict=True)
    ]


def _last_hidden(anatomy: Anatomy, tokens: Int[Tensor, "batch length"]) -> Tensor:
    """Output of the last block."""
    runner = BlockRunner(anatomy)
    return runner.run(runner.start(tokens))
