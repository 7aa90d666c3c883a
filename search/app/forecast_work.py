"""Work of a search that is foreseen: its steps, with their tokens and times."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from secateur.search.budget import Budget
from secateur.search.controllers.registry import CONTROLLERS
from secateur.search.loop.simulation import Simulation, simulate
from secateur.search.settings.settings import Settings
from secateur.spaces.forecast import Work
from secateur.spaces.measurement import Fidelity, Part
from secateur.spaces.space import SeparableSpace

if TYPE_CHECKING:
    from secateur.evaluators.forecast.prospect import Prospect
    from secateur.evaluators.forecast.speed import Speed


@dataclass(frozen=True)
class SearchWork:
    """Work of a search, from a simulated one where its controller learns from losses alone.

    Args:
        settings: of the search.
        of: its model, space and pruner, without memory.
        n_workers: processes that measure candidates.
        n_builders: processes that build blocks of the level store, see `spread_over_workers`.
    """

    settings: Settings
    of: Prospect
    n_workers: int
    n_builders: int

    @cached_property
    def simulated(self) -> Simulation | None:
        """Jobs of the search; None where its controller learns from more than losses."""
        settings, of = self.settings, self.of
        row, fidelities = CONTROLLERS[settings.controller.kind], of.plan.fidelities[:-1]
        if row.screens(settings.controller) or (
            of.plan.curvature is not None and not isinstance(of.space, SeparableSpace)
        ):
            return None
        more: dict[str, Any] = {"objectives": settings.objectives} if row.multi_objective else {}
        controller = row.build(of.space, fidelities, settings.seed, settings.controller, **more)
        batch = settings.executor.batch
        return simulate(of.space, controller, settings.budget, fidelities[-1], batch, settings.optimised)

    @cached_property
    def shared(self) -> Any:
        """Work of the simulated jobs with blocks shared, see `shared_work`; None where there are none."""
        from secateur.evaluators.forecast.sharing import shared_work

        of = self.of
        if self.simulated is None:
            return None
        with of.outline.shapes:
            pruner = of.pruner()
            dtype, fidelities = of.outline.dtype, of.plan.fidelities[:-1]
            return shared_work(self.simulated.jobs, pruner, of.plan.window, fidelities, dtype.itemsize)

    @property
    def sizes(self) -> dict[Part, int]:
        """Tokens of the largest fidelity of each part."""
        search, test = self.of.plan.fidelities[-2:]
        return {"search": search.n_tokens, "test": test.n_tokens}

    @property
    def trains(self) -> bool:
        """True if blocks are passed backward: for gradients, or in training."""
        return self.of.plan.training is not None or bool(self.of.pruner().gradients)

    def steps(self, speed: Speed | None) -> Iterator[Work]:
        """Steps of the search.

        Args:
            speed: of this machine; None: without times.
        """
        from secateur.evaluators.forecast.speed import block_shares

        of, sizes = self.of, self.sizes
        shares = block_shares(of.anatomy, of.plan.window)
        stack = sum(shares)
        n_bytes = sum(x.nbytes for x in of.anatomy.model.parameters())
        read = None if speed is None else 2 * speed.read * n_bytes
        yield Work("loading", read, 0, "weights are read, converted and checked", "dtype")
        yield from self._levels(speed, stack)
        n_dense = sum(sizes.values())
        dense = None if speed is None else n_dense * (stack * speed.block + speed.teacher)
        yield Work("dense side of the loss", dense, n_dense, "search and test text", "evaluator.fidelities")
        yield self._evaluations(speed, shares)
        n_tested = len(of.space.baselines()) + len(of.space.targets)
        tested = n_tested * sizes["test"]
        seconds = None if speed is None else tested * (stack * speed.block + speed.loss) / self.n_workers
        why = f"baselines, and one of the front a target: {n_tested}"
        yield Work("test", seconds, tested, why, "evaluator.test_tokens")

    def _levels(self, speed: Speed | None, stack: float) -> Iterator[Work]:
        """Statistics and levels; of those that are spread, until the last range of blocks is done.

        Its worker passes the blocks before it without statistics.
        """
        of, n = self.of, self.n_builders
        n_tokens, by = of.plan.calibration_tokens, f", a range each of {n} workers" if n > 1 else ""
        watched = levels = None
        if speed is not None:
            passed = (1 - 1 / n) * stack * speed.block if speed.watched else 0.0
            watched = n_tokens * (passed + stack * (speed.watched or 0.0) / n)
            if of.pruner().gradients:
                watched += n_tokens * speed.training(stack)
            levels = None if speed.levels is None else speed.levels * stack / n
        why = f"calibration tokens, block by block{by}"
        yield Work("statistics", watched, n_tokens, why, "evaluator.calibration_tokens")
        yield Work("levels", levels, 0, f"made and written for each block{by}", "space.step, space.metric")

    def _evaluations(self, speed: Speed | None, shares: Sequence[float]) -> Work:
        """All evaluations of the search."""
        budget, simulated, worked = self.settings.budget, self.simulated, self.shared
        setting = "budget, evaluator.fidelities"
        if simulated is None or worked is None:
            n_all = most_tokens(budget, self.of.plan.fidelities[:-1], len(self.of.space.baselines()))
            seconds = None
            if speed is not None:
                seconds = n_all * (sum(shares) * speed.block + speed.loss) / self.n_workers
            why = "the budget at the largest fidelity"
            return Work("evaluations", self._within(seconds), n_all, why, setting)
        n_all = sum(fidelity.total_tokens * len(found) for fidelity, found in simulated.jobs)
        n_evaluations = sum(len(found) for _, found in simulated.jobs)
        seconds = None if speed is None else self._seconds(speed, simulated, shares)
        saved = 1 - sum(worked.block_tokens.values()) / max(1, worked.head_tokens * len(shares))
        n = n_evaluations / simulated.share
        why = f"{n:,.0f} measurements in a simulated search, {max(saved, 0):.0%} of the blocks shared"
        return Work("evaluations", self._within(seconds), round(n_all / simulated.share), why, setting)

    def _seconds(self, speed: Speed, simulated: Simulation, shares: Sequence[float]) -> float:
        """Time of the simulated jobs, by all workers."""
        worked, smaller = self.shared, self._macs_share([x for _, found in simulated.jobs for x in found])
        inside = sum(n * shares[block] for block, n in worked.block_tokens.items()) * speed.block * smaller
        seconds = inside + worked.head_tokens * speed.loss + worked.switches * (speed.switch or 0.0)
        trained = sum(fidelity.n_trained * len(found) for fidelity, found in simulated.jobs)
        of = self.of.plan.training
        seconds += trained * speed.training(sum(shares), teacher=of is not None and of.loss == "kl")
        return float(seconds / (simulated.share * self.n_workers))

    def _within(self, seconds: float | None) -> float | None:
        """The time, no longer than the budget's minutes."""
        minutes = self.settings.budget.minutes
        if minutes is None:
            return seconds
        limit = 60 * minutes / self.n_workers
        return limit if seconds is None else min(limit, seconds)

    def _macs_share(self, candidates: Sequence[Any]) -> float:
        """Mean share of the dense model's multiply-accumulates that candidates have."""
        space = self.of.space
        if not self.of.dense.shape.blocks or not candidates:
            return 1.0
        dense = space.cost(space.baselines()["dense"]).get("macs")
        found = [space.cost(x).get("macs") for x in candidates]
        return sum(found) / len(found) / dense if dense and None not in found else 1.0


def most_tokens(budget: Budget, fidelities: Sequence[Fidelity], n_baselines: int) -> int:
    """Largest number of tokens that the budget allows, baselines included."""
    largest = max(fidelity.total_tokens for fidelity in fidelities)
    given = [budget.tokens] if budget.tokens is not None else []
    if budget.evaluations is not None:
        given.append(budget.evaluations * largest)
    return max(min(given, default=0), n_baselines * largest)
