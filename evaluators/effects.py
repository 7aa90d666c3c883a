"""Gradients of candidates' losses: a forward and a backward pass, for the foretold effects of every switch."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from secateur.evaluators.data.windows import Batch, EvaluationData
from secateur.evaluators.evaluator import Evaluator
from secateur.pruners.calibration.backward import CHUNK_TOKENS, head_gradient
from secateur.pruners.effects import Foretelling
from secateur.pruners.pruner import InfeasibleError, Pruner
from secateur.spaces.measurement import Effects, Fidelity, Measurement, Table

WALK_TOKENS = 8192
"""Tokens of a backward walk, which holds the hidden states before every block; more are several walks."""

DIGITS = 6
"""Significant digits of effects in a study."""


class EffectsEvaluator(Evaluator):
    """Measures at the part ``gradient``; another evaluator measures the other parts.

    A candidate's windows are consecutive ones of those set aside, from a start that its text and the fidelity decide:
    they are no windows of the search's losses, others for nearly every candidate, and the same in every worker. Light
    training is left out. The dense model's KL has no gradient: its effects are the curvature alone, without a pass.

    Args:
        measured: the other evaluator.
        pruner: open; of a separable space.
        data: with windows of the part ``gradient``.
        foretelling: over the same pruner.
        loss: the one whose effects are foretold.
    """

    def __init__(
        self,
        measured: Evaluator,
        pruner: Pruner,
        data: EvaluationData,
        foretelling: Foretelling,
        *,
        loss: Literal["kl", "ce"],
    ) -> None:
        self._measured = measured
        self._pruner = pruner
        self._data = data
        self._foretelling = foretelling
        self._loss = loss

    def evaluate(self, candidates: Sequence[str], fidelity: Fidelity) -> list[Measurement]:
        """See `Evaluator.evaluate`.

        Raises:
            ValueError: if a text is no candidate of the space, or there are too few windows.
        """
        if fidelity.part != "gradient":
            return self._measured.evaluate(candidates, fidelity)
        return [self._effects(text, fidelity) for text in candidates]

    def _effects(self, text: str, fidelity: Fidelity) -> Measurement:
        space, started = self._pruner.space, time.perf_counter()
        candidate = space.parse(text)
        values, reason, effects = {}, None, None
        try:
            costs = self._pruner.cost(candidate)
            loss, effects = self._found(space.disassemble(candidate), text, fidelity)
            values = {"loss": loss, self._loss: loss, **costs}
        except InfeasibleError as error:
            reason = str(error)
        seconds, tokens = time.perf_counter() - started, fidelity.total_tokens
        return Measurement(
            text, fidelity, values, reason, self._pruner.seed, tokens, seconds, effects=effects
        )

    def _found(self, options: tuple[int, ...], text: str, fidelity: Fidelity) -> tuple[float, Effects]:
        """The loss on the candidate's windows, in nats a token, and the effects."""
        second = _rounded(self._foretelling.second(options))
        if options == self._foretelling.dense and self._loss == "kl":
            return 0.0, Effects(tuple((0.0,) * len(row) for row in second), second)
        batches = self._data.drawn("gradient", hash_of(f"{text} {fidelity.text}"), fidelity.n_tokens)
        n_scored = sum(int(self._scored(batch).sum()) for batch in batches)
        n_a_walk = max(1, WALK_TOKENS // batches[0].tokens.numel())
        total, first = 0.0, [np.zeros(len(row)) for row in second]
        for start in range(0, len(batches), n_a_walk):
            losses, table = self._walk(options, batches[start : start + n_a_walk], n_scored)
            total += losses
            first = [a + np.array(b) for a, b in zip(first, table, strict=True)]
        effects = Effects(_rounded(tuple(tuple(row.tolist()) for row in first)), second)
        return max(total / n_scored, 0.0), effects

    def _walk(self, options: tuple[int, ...], batches: Sequence[Batch], n_scored: int) -> tuple[float, Table]:
        """Sum of the batches' losses, and the first-order effects as far as they come from these batches."""
        totals: list[Tensor] = []

        def top(number: int, hidden: Tensor) -> Tensor:
            batch = batches[number]

            def residual(chunk: int, logits: Float[Tensor, "tokens vocab"]) -> Float[Tensor, "tokens vocab"]:
                found, losses = self._residual(batch, chunk, logits)
                totals.append(losses.double().sum())
                return found / n_scored

            return head_gradient(self._pruner.anatomy, hidden, residual)

        first = self._foretelling.first(options, [batch.inputs for batch in batches], top)
        return sum(torch.stack(totals).tolist()), first

    def _residual(
        self, batch: Batch, chunk: int, logits: Float[Tensor, "tokens vocab"]
    ) -> tuple[Float[Tensor, "tokens vocab"], Float[Tensor, " tokens"]]:
        """Gradients of a chunk's losses with respect to its logits, and the losses, by position."""
        log_probs = logits.log_softmax(-1)
        at = slice(chunk * CHUNK_TOKENS, chunk * CHUNK_TOKENS + logits.shape[0])
        scored = self._scored(batch).flatten()[at].to(logits.device)
        if self._loss == "kl":
            losses = batch.teacher.compare(at, log_probs)["kl"]
            residual = log_probs.exp_().sub_(batch.teacher.probabilities(at))
        else:
            targets = torch.roll(batch.tokens, -1, dims=1).flatten()[at, None].to(logits.device)
            losses = -log_probs.gather(1, targets)[:, 0]
            residual = log_probs.exp_().scatter_add_(
                1, targets, torch.full_like(targets, -1, dtype=logits.dtype)
            )
        return residual.mul_(scored[:, None]), losses * scored

    def _scored(self, batch: Batch) -> Bool[Tensor, "batch length"]:
        """Positions whose losses count: not the BOS token's, and of the cross-entropy none that predicts no token."""
        scored = torch.ones_like(batch.tokens, dtype=torch.bool)
        scored[:, : self._pruner.anatomy.first_scored] = False
        if self._loss == "ce":
            scored[:, -1] = False
        return scored


def hash_of(text: str) -> int:
    """Number that a text decides, the same in every process."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def _rounded(table: Table) -> Table:
    return tuple(tuple(float(f"{x:.{DIGITS}g}") for x in row) for row in table)
