"""Budget of a search, and the work that counts against it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pydantic import Field, model_validator

from secateur.search.controller import Trial
from secateur.spaces.section import Section


class Budget(Section):
    """Limits of a search, which ends as soon as one of them is reached.

    Args:
        evaluations: distinct search measurements, baselines included.
        tokens: tokens evaluated for them, and trained on.
        minutes: time spent on them, summed over workers.
    """

    evaluations: int | None = Field(default=None, gt=0)
    tokens: int | None = Field(default=None, gt=0)
    minutes: float | None = Field(default=None, gt=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _check(self) -> Budget:
        if self.evaluations is None and self.tokens is None and self.minutes is None:
            raise ValueError("Expected `budget` to limit evaluations, tokens or minutes, got no limit.")
        return self

    def share(self, spent: Spent) -> float:
        """Largest spent share of a limit."""
        pairs = (
            (spent.evaluations, self.evaluations),
            (spent.tokens, self.tokens),
            (spent.seconds / 60, self.minutes),
        )
        return max(used / limit for used, limit in pairs if limit is not None)


@dataclass(frozen=True)
class Spent:
    """Work of some measurements.

    Args:
        evaluations: number of measurements, without closed forms.
        tokens: evaluated for them, nominal.
        seconds: spent on them, summed over workers.
        blocks: model blocks computed.
        blocks_saved: model blocks not recomputed, as their output was shared.
    """

    evaluations: int = 0
    tokens: int = 0
    seconds: float = 0.0
    blocks: int = 0
    blocks_saved: int = 0

    def plus(self, trials: Iterable[Trial]) -> Spent:
        """Sum of this and the work of the trials."""
        found = [trial.measurement for trial in trials]
        return Spent(
            self.evaluations + sum([m.fidelity.n_evaluations for m in found]),
            self.tokens + sum([m.n_tokens for m in found]),
            sum([m.seconds for m in found], self.seconds),
            self.blocks + sum([m.blocks for m in found]),
            self.blocks_saved + sum([m.blocks_saved for m in found]),
        )
