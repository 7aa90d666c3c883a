"""Live mixture of a block, cut to some of its experts or removed by reference, and restored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from secateur.pruners.models.cutting import LiveSublayer, Piece, unchanged
from secateur.pruners.models.layout import MixtureLayout, Returns, SublayerLayout
from secateur.pruners.models.mixture import LiveMixture


class LiveExperts:
    """One mixture of a live model, whole when this object is made."""

    def __init__(self, layout: MixtureLayout) -> None:
        self._layout = layout
        self._mixture = LiveMixture(layout.mixture)
        self._shared = None if layout.shared is None else LiveSublayer(layout.shared)
        self._data = [(p, p.data) for module in layout.modules for p in module.parameters(recurse=False)]
        self._patched: list[nn.Module] = []

    def cut(
        self,
        kept: Sequence[int],
        weights: Mapping[str, Tensor],
        shared: tuple[int, Mapping[str, Piece]] | None = None,
    ) -> None:
        """Use these experts alone from now on, see `LiveMixture.cut`.

        Args:
            kept: numbers of routed experts.
            weights: of theirs that change.
            shared: number of channels that the shared experts keep, with their weights; None: they stay.
        """
        self.restore()
        self._mixture.cut(kept, weights)
        if shared is not None:
            assert self._shared is not None, "checked with the block"
            self._shared.cut(*shared)

    def remove(self) -> None:
        """Make it a zero, shared experts included: empty parameters, norms that do nothing."""
        self.restore()
        for norm in self._layout.norms:
            self._patch(norm, unchanged)
        self._patch(self._layout.owner, self._layout.returns.nothing)
        for module in self._layout.beside:
            self._patch(module, Returns().nothing)
        for parameter, data in self._data:
            parameter.data = data.new_empty((0,) * data.ndim)

    def restore(self) -> None:
        """Put the same tensors back into the same parameters."""
        for parameter, data in self._data:
            parameter.data = data
        self._mixture.restore()
        if self._shared is not None:
            self._shared.restore()
        for module in self._patched:
            del module.forward
        self._patched.clear()

    def empty_others(self) -> None:
        """Free the memory of the experts that are cut away now, for good."""
        for index, expert in enumerate(self._layout.mixture.experts):
            if index not in self._layout.mixture.experts.kept:
                for parameter in expert.parameters():
                    parameter.data = parameter.data.new_empty((0,) * parameter.data.ndim)

    def _patch(self, module: nn.Module, forward: Any) -> None:
        module.forward = forward
        self._patched.append(module)


def live_part(layout: SublayerLayout | MixtureLayout) -> LiveSublayer | LiveExperts:
    """The live sub-layer of a layout, whole now."""
    return LiveSublayer(layout) if isinstance(layout, SublayerLayout) else LiveExperts(layout)
