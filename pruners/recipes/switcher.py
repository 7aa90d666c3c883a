"""How recipes turn into weights: decided over the whole dense model, then switched block by block."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from secateur.pruners.recipes.blocks import decide_blocks
from secateur.pruners.recipes.context import Basis
from secateur.pruners.recipes.live import LiveBlock
from secateur.pruners.recipes.plan import DENSE, Decision
from secateur.pruners.recipes.units import decide_units
from secateur.pruners.recipes.weights import decide_weights
from secateur.pruners.stores.block_files import LevelStoreError
from secateur.pruners.switching import InfeasibleError

N_DECISIONS = 64
"""So many decisions are remembered, those asked for last."""

# By the unit of the recipe.
DECIDE: dict[str, Callable[[Basis, Mapping[str, Any]], Decision]] = {
    "weights": decide_weights,
    "structure": decide_units,
    "blocks": decide_blocks,
}


class RecipeSwitcher:
    """Switches blocks to what recipes make of them.

    All statistics are those of the dense model: a recipe is decided while the model is dense, and what it makes of a
    block depends on nothing but the recipe.

    Args:
        basis: made from the live, dense model.
        unit: of the recipes.
    """

    def __init__(self, basis: Basis, unit: str) -> None:
        self._basis = basis
        self._decide = DECIDE[unit]
        layouts = [None] * len(basis.anatomy.blocks) if unit == "weights" else basis.layouts
        self._live = [
            LiveBlock(block, layout) for block, layout in zip(basis.anatomy.blocks, layouts, strict=True)
        ]
        self._now: list[Hashable] = [DENSE] * len(self._live)
        self._decisions: dict[str, Decision] = {}
        self._of_keys: dict[tuple[int, Hashable], Decision] = {}

    def decide(self, config: Mapping[str, Any]) -> Decision | None:
        """What a recipe comes to, decided once; None for the dense model.

        The model must be dense, unless the recipe was decided lately.

        Raises:
            InfeasibleError: if it can't be carried out, with the reason.
            LevelStoreError: if there is no room for statistics.
        """
        if not config["sparsity"]:
            return None
        name = json.dumps(config, sort_keys=True)
        decision = self._decisions.pop(name, None) or self._new(config)
        self._decisions[name] = decision  # the last one is the one used last
        return decision

    def keys(self, config: Mapping[str, Any]) -> Sequence[Hashable]:
        """See `Decision.keys`.

        Raises:
            InfeasibleError: as `decide` does.
        """
        decision = self.decide(config)
        if decision is None:
            return [DENSE] * len(self._live)
        self._of_keys |= dict.fromkeys(enumerate(decision.keys), decision)
        return decision.keys

    def cost(self, config: Mapping[str, Any]) -> Mapping[str, float] | None:
        """Exact counts; None for the dense model, which its space knows.

        Raises:
            InfeasibleError: as `decide` does.
        """
        decision = self.decide(config)
        return None if decision is None else decision.costs

    def apply(self, block: int, key: Hashable) -> None:
        """Make the live block what the key says, by reference."""
        if self._now[block] == key:
            return
        self._live[block].restore()
        if key != DENSE:
            self._of_keys[block, key].change(self._live[block])
        self._now[block] = key

    def release(self, block: int) -> None:
        """See `Copies.release`."""
        self.apply(block, DENSE)

    def restore(self) -> None:
        """The dense model again, with the same tensors."""
        for block in range(len(self._live)):
            self.release(block)
        self._of_keys.clear()

    def _forget(self) -> None:
        """Let go of earlier batches' decisions, of all but a few and of those with statistics that are held no more.

        Mapped files keep their disk.
        """
        under_way = set(map(id, self._of_keys.values()))
        earlier = [name for name, decision in self._decisions.items() if id(decision) not in under_way]
        for place, name in enumerate(reversed(earlier)):
            if place >= N_DECISIONS or not self._basis.holds(json.loads(name)["calibration"]):
                del self._decisions[name]

    def _new(self, config: Mapping[str, Any]) -> Decision:
        self._forget()
        try:
            return self._decide(self._basis, config)
        except LevelStoreError:
            raise
        except ValueError as error:
            raise InfeasibleError(str(error)) from error
