"""Evidence that importances of experts are computed from: what calibration tokens are routed where, and its effect."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from secateur.pruners.models.experts import Expert
from secateur.pruners.models.mixture import Mixture

SUMS = ("n_routed", "gates", "norms", "gated_norms", "contributions")
"""Sums of the evidence over tokens, in the order of its fields."""


@dataclass(frozen=True)
class ExpertEvidence:
    """A mixture of the live model on the calibration tokens. Sums are over the tokens, in fp64.

    Args:
        mixture: whole.
        hidden: inputs of the mixture.
        n_routed: tokens that are routed to each expert.
        gates: sum of the weights with which they are.
        norms: sum of the l2 norms of the expert's outputs.
        gated_norms: sum of the weights times these norms.
        contributions: sum of the weights times these norms times one minus the cosine between the hidden state before
            the mixture and the same plus all routed experts' outputs.
    """

    mixture: Mixture
    hidden: Float[Tensor, "tokens width"]
    n_routed: Float[Tensor, " experts"]
    gates: Float[Tensor, " experts"]
    norms: Float[Tensor, " experts"]
    gated_norms: Float[Tensor, " experts"]
    contributions: Float[Tensor, " experts"]

    @property
    def logits(self) -> Float[Tensor, "tokens experts"]:
        """Logits of the router, without biases."""
        return F.linear(self.hidden.float(), self.mixture.router.float())

    @torch.no_grad()
    def outputs(self, expert: int) -> Float[Tensor, "tokens width"]:
        """Output of an expert for all tokens, routed to it or not."""
        found: Tensor = self.mixture.experts[expert](self.hidden)
        return found


class MixtureRecorder:
    """Recorder of the evidence while a block runs on batches of calibration tokens."""

    def __init__(self, mixture: Mixture, block: nn.Module) -> None:
        self._mixture, self._block = mixture, block
        self._hidden: list[Tensor] = []
        self._sums = torch.zeros(
            len(SUMS), mixture.n_experts, dtype=torch.float64, device=mixture.router.device
        )
        self._ran: list[tuple[int, Tensor, Tensor, Tensor]] = []
        self._routed: Tensor | None = None
        self._given: Tensor | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Context in which the block's runs are recorded."""
        with ExitStack() as hooks:
            for index, expert in enumerate(self._mixture.experts):
                hooks.callback(expert.register_forward_hook(self._after_expert(index)).remove)
            of_experts = self._mixture.experts.register_forward_hook(self._after_experts)
            hooks.callback(of_experts.remove)
            hooks.callback(self._mixture.module.register_forward_pre_hook(self._before).remove)
            hooks.callback(self._mixture.module.register_forward_hook(self._after_mixture).remove)
            hooks.callback(self._block.register_forward_hook(self._after_block).remove)
            yield

    @property
    def evidence(self) -> ExpertEvidence:
        """Sums of all batches until now."""
        return ExpertEvidence(self._mixture, torch.cat(self._hidden), *self._sums)

    def _before(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._hidden.append(args[0].reshape(-1, args[0].shape[-1]))

    def _after_expert(self, index: int) -> Any:
        def record(module: Expert, args: tuple[Tensor, ...], output: Tensor) -> None:
            if module.tokens is not None and module.routing is not None:
                norms = output.double().norm(dim=-1)
                self._ran.append((index, module.tokens, module.routing.double(), norms))

        return record

    def _after_experts(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        self._routed = self._mixture.experts.summed(output)

    def _after_mixture(self, module: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
        self._given = output[0] if isinstance(output, tuple) else output

    def _after_block(self, module: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
        assert self._routed is not None, "the block has run its mixture"
        assert self._given is not None
        after = output[0] if isinstance(output, tuple) else output
        after, given, routed = (
            value.reshape(self._routed.shape).double() for value in (after, self._given, self._routed)
        )
        before = after - given  # without shared experts
        turned = (1 - F.cosine_similarity(before, before + routed, dim=-1)).clamp_min(0)
        for index, tokens, routing, norms in self._ran:
            gated = routing * norms
            used = routing != 0
            values = (used, routing, norms * used, gated, gated * turned[tokens])
            self._sums[:, index] += torch.stack([value.double().sum() for value in values])
        self._ran.clear()
