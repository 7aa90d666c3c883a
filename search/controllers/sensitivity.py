"""The controller `sensitivity`: every slot measured alone, then the best combination."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from secateur.search.controller import Proposal
from secateur.search.controllers.knapsack import Array
from secateur.search.controllers.local_model import curvature_fidelity, quadratic
from secateur.search.controllers.procedure import (
    Key,
    ProcedureController,
    SearchProcedure,
    check_fidelities,
    fidelity_of,
)
from secateur.search.controllers.separable import check_separable, complete, solve, with_free_slots
from secateur.spaces.measurement import Effects, Fidelity
from secateur.spaces.section import Section
from secateur.spaces.space import SeparableSpace, Space


class SensitivitySettings(Section):
    """Settings of the controller `sensitivity`.

    Args:
        levels: shares of a slot (sparsities) at which it is measured alone, each rounded to the nearest option; the
            other options are interpolated. None: every option. One or two levels near the target usually suffice
            and are many times cheaper.
        n_tokens: fidelity of the measurements; None: the smallest. Of the curvature: any whole windows; None: 2,048, or
            what is nearest among the fidelities.
        by: measured ``loss`` of each slot alone, or the ``curvature`` of the loss around the reference: one forward and
            one backward pass foretell every option of every slot, and nothing else is measured. `levels` is then not
            used.
        around: reference in which one slot at a time is changed: the ``dense`` model, once for all targets, or the
            ``uniform`` candidate of each target, which measures slots in a pruned model.
    """

    kind: Literal["sensitivity"] = "sensitivity"
    levels: list[Annotated[float, Field(gt=0, le=1)]] | None = Field(default=None, min_length=1)
    n_tokens: int | None = None
    by: Literal["loss", "curvature"] = "loss"
    around: Literal["dense", "uniform"] = "dense"


class SensitivityProcedure:
    """Sensitivity analysis; `sensitivity` runs it alone, `evolution` may start with it.

    An additive model: the loss of a candidate is the reference's plus the sum over slots of the differences measured
    for each slot alone. `complete` makes each slot's differences monotone and interpolates options that were not
    measured; `solve` then finds the best candidate of each target.

    Args:
        effects: those measured so far, by their proposals, see `ProcedureController`.

    Raises:
        ValueError: if `n_tokens` names no fidelity, or `levels` select no option of some slot.
    """

    def __init__(
        self,
        space: SeparableSpace[Any],
        fidelities: Sequence[Fidelity],
        settings: SensitivitySettings,
        effects: Mapping[Key, Effects],
    ) -> None:
        self._space = space
        self._settings = settings
        self._effects = effects
        self._by_curvature = settings.by == "curvature"
        of = curvature_fidelity if self._by_curvature else fidelity_of
        self._fidelity = of(fidelities, settings.n_tokens)
        self._shares = [
            np.array([space.share(slot, option) for option in space.options(slot)])
            for slot in range(len(space.slots))
        ]
        self._references = self._find_references()
        alone = (lambda reference: []) if self._by_curvature else self._find_alone
        self._alone = {reference: alone(reference) for reference in self._references}
        self.solutions: dict[int, list[Any]] = {}  # target -> candidates, at the end of the procedure
        self.foretold: dict[int, tuple[list[Array], float]] = {}
        """Losses by slot and option over the reference's, and the reference's loss, by target, at the end."""

    @property
    def n_measurements(self) -> int:
        """Number of measurements, references included."""
        return sum(1 + len(alone) for alone in self._alone.values())

    def run(self) -> SearchProcedure:
        """Measure and fill `solutions`; none for a target whose reference is infeasible."""
        for reference, targets in self._references.items():
            alone = self._alone[reference]
            candidates = [self._space.assemble(reference)]
            candidates += [self._replaced(reference, slot, index) for slot, index in alone]
            proposals = [Proposal(candidate, self._fidelity) for candidate in candidates]
            losses = yield proposals
            if math.isfinite(losses[0]):
                if self._by_curvature:
                    curves = quadratic(self._effects[proposals[0].key])
                else:
                    curves = self._curves(reference, dict(zip(alone, losses[1:], strict=True)), losses[0])
                for target in targets:
                    self.foretold[target] = curves, losses[0]
                    if (candidate := solve(self._space, curves, target)) is not None:
                        self.solutions[target] = with_free_slots(self._space, candidate)

    def _find_references(self) -> dict[tuple[int, ...], list[int]]:
        """Options of each reference, with its targets."""
        baselines, n_targets = self._space.baselines(), len(self._space.targets)
        uniform = list(baselines)[1 : 1 + n_targets]
        references: dict[tuple[int, ...], list[int]] = {}
        for target, name in enumerate(["dense"] * n_targets if self._settings.around == "dense" else uniform):
            options = self._space.disassemble(baselines[name])
            references.setdefault(options, []).append(target)
        return references

    def _find_alone(self, reference: tuple[int, ...]) -> list[tuple[int, int]]:
        """(slot, index of an option) of each measurement."""
        found = []
        for slot, shares in enumerate(self._shares):
            if not shares[-1]:
                continue  # removes nothing, see `with_free_slots`
            if self._settings.levels is None:
                near = list(range(len(shares)))
            else:
                near = sorted({int(np.abs(shares - x).argmin()) for x in self._settings.levels})
            chosen = [index for index in near if index != self._index(slot, reference[slot])]
            if not chosen:
                raise ValueError(
                    f"Expected `levels` to name an option besides the reference's, got {self._settings.levels} "
                    f"at {self._space.slots[slot]}. Its options are {shares.tolist()}."
                )
            found += [(slot, index) for index in chosen]
        return found

    def _index(self, slot: int, option: int) -> int:
        return list(self._space.options(slot)).index(option)

    def _replaced(self, reference: tuple[int, ...], slot: int, index: int) -> Any:
        """The reference with another option in one slot."""
        option = self._space.options(slot)[index]
        return self._space.assemble((*reference[:slot], option, *reference[slot + 1 :]))

    def _curves(
        self, reference: tuple[int, ...], losses: dict[tuple[int, int], float], base: float
    ) -> list[Array]:
        """Difference of loss of each slot and option; infinite from the first infeasible option on."""
        curves = []
        for slot, shares in enumerate(self._shares):
            anchor = self._index(slot, reference[slot])
            measured = {index: loss - base for (s, index), loss in losses.items() if s == slot}
            finite = {index: x for index, x in measured.items() if math.isfinite(x)}
            curve = complete(shares, finite, anchor)
            bad = [index for index in measured if index not in finite]
            above = min((index for index in bad if index > anchor), default=len(shares))
            below = max((index for index in bad if index < anchor), default=-1)
            curve[above:] = math.inf
            curve[: below + 1] = math.inf
            curves.append(curve)
        return curves


class Sensitivity(ProcedureController):
    """Sensitivity of every slot alone, then the best combination for each target.

    An additive model as in SPDY (arXiv 2202.04290), but with measured losses of the whole model in place of layer
    errors, and a MILP where dynamic programming does not apply. Cheap for many targets: measurements around the dense
    model serve all of them. It ignores interactions between slots; `evolution` can improve on its solutions. Each
    solution is proposed with every repair of the space.
    """

    ending = "every slot and the best combinations by them are measured"

    def __init__(
        self,
        space: Space[Any],
        fidelities: Sequence[Fidelity],
        seed: int,  # unused
        settings: SensitivitySettings,
        objective: str = "loss",
    ) -> None:
        super().__init__(objective)
        self._largest = check_fidelities(fidelities)[-1]
        self._sensitivity = SensitivityProcedure(
            check_separable(space, "sensitivity"), fidelities, settings, self.effects
        )
        self._open(self._procedure())

    @property
    def n_measurements(self) -> int:
        return self._sensitivity.n_measurements + 1

    def _procedure(self) -> SearchProcedure:
        yield from self._sensitivity.run()
        solutions = self._sensitivity.solutions.values()
        yield [Proposal(candidate, self._largest) for candidate in chain.from_iterable(solutions)]
