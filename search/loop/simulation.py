"""Simulation of a search: the proposals of its controller, told made-up losses, to count what would be measured."""

from __future__ import annotations

import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from secateur.search.budget import Budget
from secateur.search.controller import Controller, Proposal, Trial
from secateur.search.loop.ledger import Ledger
from secateur.spaces.measurement import Effects, Fidelity, Measurement
from secateur.spaces.space import SeparableSpace, Space

MOST_SECONDS = 2.0
MOST_PROPOSALS = 512
"""A simulation ends here, and what follows is taken to go on alike."""


@dataclass(frozen=True)
class Simulation:
    """Jobs of a simulated search.

    Args:
        jobs: candidates that are measured together, with their fidelity; the baselines first.
        share: simulated part of the budget, in (0, 1].
    """

    jobs: list[tuple[Fidelity, list[Any]]] = field(default_factory=list)
    share: float = 1.0


def simulate(
    space: Space[Any],
    controller: Controller,
    budget: Budget,
    fidelity: Fidelity,
    batch: int,
    objectives: Sequence[str] = (),
) -> Simulation:
    """Jobs that a search in rounds would have.

    Args:
        space: of the candidates.
        controller: a new one, which is used up.
        budget: of the search; of one in minutes the first proposals stand for all.
        fidelity: of the baselines.
        batch: proposals a round.
        objectives: values that the controller looks for, besides the losses.
    """
    ledger, jobs, n_told, known = Ledger(budget), [], 0, set[tuple[str, str]]()
    first = [Proposal(candidate, fidelity) for candidate in space.baselines().values()]
    started, share = time.perf_counter(), 1.0
    rounds = [first]
    while True:
        for proposals in rounds:
            ledger.add(proposals)
            new = {p.key: p for p in proposals if p.key not in known}
            known |= new.keys()
            for each in dict.fromkeys(p.fidelity for p in proposals):
                group = [p.candidate for p in new.values() if p.fidelity == each]
                jobs += [(each, group[i : i + batch]) for i in range(0, len(group), batch)]
            trials = [Trial(n_told + i, _made_up(space, p, objectives)) for i, p in enumerate(proposals)]
            n_told += len(trials)
            if trials:
                controller.tell(trials)
                ledger.tell(trials)
        if time.perf_counter() - started > MOST_SECONDS or n_told > MOST_PROPOSALS:
            share = min(1.0, budget.share(ledger.spent))
            break
        if ledger.used_up or ledger.reason is not None:
            break
        proposals = controller.ask(batch)
        if not proposals:
            break
        rounds = [ledger.affordable(proposals, controller.refuse)]
    return Simulation(jobs, share or 1.0)


def _made_up(space: Space[Any], proposal: Proposal, objectives: Sequence[str]) -> Measurement:
    """A measurement whose loss is a number drawn by the candidate's text; its costs are real."""
    text, fidelity = proposal.key[0], proposal.fidelity
    loss = (1 + zlib.crc32(f"{text} {fidelity.text}".encode())) / 2**32
    costs: Mapping[str, float] = space.cost(proposal.candidate)
    values = {"loss": loss, "kl": loss, "ce": loss, **costs}
    values = {**dict.fromkeys(objectives, loss), **values}
    effects = _made_up_effects(space) if fidelity.part == "gradient" else None
    return Measurement(text, fidelity, values, n_tokens=fidelity.total_tokens, effects=effects)


def _made_up_effects(space: Space[Any]) -> Effects:
    """Effects that grow with what is removed, more in one slot than in another."""
    if not isinstance(space, SeparableSpace):
        raise TypeError(f"Expected a separable space for gradients, got {type(space).__name__}.")
    rows = [
        [(1 + zlib.crc32(name.encode()) / 2**32) * space.share(slot, x) for x in space.options(slot)]
        for slot, name in enumerate(space.slots)
    ]
    first = tuple(tuple(0.01 * x for x in row) for row in rows)
    return Effects(first, tuple(tuple(0.1 * x**2 for x in row) for row in rows))
