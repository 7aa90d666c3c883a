"""Settings of light training of candidates before they are measured."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from secateur.spaces.section import Section

RATES = {"full": 3e-5, "norms": 3e-4, "lora": 2e-4}
"""Learning rates, a tenth of those of a recovery: in few steps higher ones harm (experiments/003)."""


class TrainingSettings(Section):
    """Short training of each candidate before it is measured, so that candidates that recover well are preferred.

    On windows of the calibration part, in fp32, with removed parts cut and zeros kept. The trained weights are
    discarded. See DarwinLM (https://arxiv.org/abs/2502.07780).

    Args:
        tokens: of training, one number a fidelity, ascending, 0 for none; whole batches. The test measurement is
            trained as much as the last.
        learn: ``full``: every parameter; ``norms``: gains and biases of the norms; ``lora``: low-rank updates.
        loss: ``kl``, distillation from the dense model, or ``ce``, the cross-entropy of the next token.
        learning_rate: the same in all steps; None for that of `learn` in `RATES`.
        batch: windows a step.
        rank: of the updates of ``lora``.
        seed: of the order of windows; None: that of the evaluator.
    """

    tokens: tuple[int, ...] = Field(min_length=1)
    learn: Literal["full", "norms", "lora"] = "full"
    loss: Literal["kl", "ce"] = "kl"
    learning_rate: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    batch: int = Field(default=1, gt=0)
    rank: int = Field(default=16, gt=0)
    seed: int | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _check(self) -> TrainingSettings:
        if list(self.tokens) != sorted(self.tokens) or self.tokens[0] < 0 or not self.tokens[-1]:
            raise ValueError(
                f"Expected `tokens` to ascend from 0 or more to a number above 0, got {list(self.tokens)}."
            )
        return self

    @property
    def rate(self) -> float:
        return RATES[self.learn] if self.learning_rate is None else self.learning_rate

    @property
    def text(self) -> str:
        tokens = ", ".join(f"{n:,}" for n in self.tokens)
        return (
            f"{self.learn}, loss {self.loss}, {tokens} tokens of the calibration text; thrown away afterwards"
        )

    def check_fits(self, window: int, n_fidelities: int) -> None:
        """Check that each fidelity has a number of whole batches.

        Raises:
            ValueError: if not.
        """
        if len(self.tokens) != n_fidelities:
            raise ValueError(
                f"Expected one number in `evaluator.training.tokens` for each of the {n_fidelities} `fidelities`, "
                f"got {list(self.tokens)}."
            )
        for n_tokens in self.tokens:
            if n_tokens % (self.batch * window):
                near = max(1, round(n_tokens / (self.batch * window))) * self.batch * window
                raise ValueError(
                    f"Expected `evaluator.training.tokens` in batches of {self.batch} windows of {window} tokens, "
                    f"got {n_tokens}. Use {near}, or change `evaluator.window`."
                )
