"""Dynamic batch loading of Sheared LLaMA: windows of the domains whose loss is furthest above its reference."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Float64, Int, Int64
from torch import Tensor

from secateur.pruners.learned.training import step_generator

HELD_OUT = 0.25
"""Share of a domain's windows, at least one, on which its loss is measured; the others are trained on."""

SMOOTHING = 1e-4
"""Share of the weights that is spread evenly, as in the released code."""


class DomainLoader:
    """Choice of the windows of each step from several domains, by weights that follow their losses.

    Algorithm 1 of Sheared LLaMA (Xia et al. 2024, arXiv 2310.06694): every so many steps the weight of a domain is
    multiplied by ``exp(max(loss - reference, 0))``, on windows that are held out, and the weights are scaled to sum to
    1. They begin as the shares of the windows. The windows of a domain come in their order, again from the first one
    behind the last.

    Args:
        names: domain of each window.
        seed: of the draws.

    Raises:
        ValueError: if a domain has less than two windows.
    """

    def __init__(self, names: Sequence[str], seed: int) -> None:
        self.domains, self._seed = tuple(sorted(set(names))), seed
        of = [[n for n, name in enumerate(names) if name == domain] for domain in self.domains]
        short = next((x for x, rows in zip(self.domains, of, strict=True) if len(rows) < 2), None)
        if short is not None:
            raise ValueError(
                f"Expected at least 2 windows of each source to load them by their losses, got 1 of {short}. Take more "
                "`samples`, or one source."
            )
        n_held = [max(1, int(HELD_OUT * len(rows))) for rows in of]
        self.held_out = [torch.tensor(rows[len(rows) - n :]) for rows, n in zip(of, n_held, strict=True)]
        self._trained = [torch.tensor(rows[: len(rows) - n]) for rows, n in zip(of, n_held, strict=True)]
        self.weights: Float64[Tensor, " domains"] = torch.tensor([len(x) / len(names) for x in of]).double()
        self._places: Int64[Tensor, " domains"] = torch.zeros(len(of), dtype=torch.int64)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The state, changed in place."""
        return {"domain weights": self.weights, "domain places": self._places}

    def rows(self, step: int, n: int) -> Int[Tensor, " n"]:
        """Numbers of the windows of a step."""
        drawn = torch.multinomial(
            self.weights, n, replacement=True, generator=step_generator(self._seed, step, torch.device("cpu"))
        )
        found = []
        for domain in drawn.tolist():
            windows = self._trained[domain]
            found.append(int(windows[self._places[domain] % len(windows)]))
            self._places[domain] += 1
        return torch.tensor(found)

    def update(self, losses: Float[Tensor, " domains"], references: Float[Tensor, " domains"]) -> None:
        """Follow these losses on the windows held out, and their references, both in nats a token."""
        grown = self.weights * (losses - references).clamp(min=0).double().exp()
        even = SMOOTHING / len(self.domains)
        self.weights.copy_((1 - SMOOTHING) * grown / grown.sum() + even)
