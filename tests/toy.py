"""A space and an evaluator small enough to know everything about, for tests of what is around them."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from secateur.search.budget import Budget
from secateur.search.controller import Controller, Proposal, Trial
from secateur.search.executor import Executor, Job, WorkerStatus
from secateur.search.executors.local import LocalExecutor, LocalSettings
from secateur.search.loop.loop import Search
from secateur.search.study.about import About
from secateur.search.study.study import Study
from secateur.spaces.measurement import Fidelity, Measurement
from secateur.spaces.space import SeparableSpace


@dataclass(frozen=True)
class Bits:
    """A candidate: which slots are pruned."""

    text: str


class OneMax(SeparableSpace[Bits]):
    """Prune exactly `n_pruned` of `n` slots; slot i costs i + 1 when it is pruned, so the best are the first."""

    def __init__(self, n: int = 8, n_pruned: tuple[int, ...] = (4,)) -> None:
        self.n = n
        self.n_pruned = n_pruned

    @property
    def targets(self) -> tuple[float, ...]:
        return tuple(k / self.n for k in self.n_pruned)

    @property
    def slots(self) -> tuple[str, ...]:
        return tuple(f"slot{i}" for i in range(self.n))

    def parse(self, text: str) -> Bits:
        if len(text) != self.n or set(text) - {"0", "1"}:
            raise ValueError(f"Expected {self.n} bits, got {text!r}.")
        return Bits(text)

    def baselines(self) -> dict[str, Bits]:
        uniform = {f"uniform@{k / self.n:g}": Bits("0" * (self.n - k) + "1" * k) for k in self.n_pruned}
        return {"dense": Bits("0" * self.n), **uniform}

    def target_of(self, candidate: Bits) -> int | None:
        n_pruned = candidate.text.count("1")
        return self.n_pruned.index(n_pruned) if n_pruned in self.n_pruned else None

    def sample(self, rng: np.random.Generator, target: int) -> Bits:
        bits = np.zeros(self.n, dtype=int)
        bits[rng.permutation(self.n)[: self.n_pruned[target]]] = 1
        return self.assemble(bits.tolist())

    def mutate(self, candidate: Bits, rng: np.random.Generator) -> Bits:
        bits = np.array(self.disassemble(candidate))
        one, zero = rng.choice(np.flatnonzero(bits)), rng.choice(np.flatnonzero(bits == 0))
        bits[one], bits[zero] = 0, 1
        return self.assemble(bits.tolist())

    def crossover(self, first: Bits, second: Bits, rng: np.random.Generator) -> Bits:
        return first

    def repair(self, candidate: Bits, target: int, rng: np.random.Generator) -> Bits:
        return candidate if self.target_of(candidate) == target else self.sample(rng, target)

    def cost(self, candidate: Bits) -> Mapping[str, float]:
        return {"params": float(candidate.text.count("0")), "sparsity": candidate.text.count("1") / self.n}

    def config(self, candidate: Bits) -> Mapping[str, Any]:
        return {"bits": candidate.text}

    def options(self, slot: int) -> Sequence[int]:
        return (0, 1)

    def usage(self, slot: int, option: int) -> int:
        return option

    def share(self, slot: int, option: int) -> float:
        return float(option)

    def usage_bounds(self, target: int) -> tuple[int, int]:
        return self.n_pruned[target], self.n_pruned[target]

    def assemble(self, options: Sequence[int]) -> Bits:
        return Bits("".join(map(str, options)))

    def disassemble(self, candidate: Bits) -> tuple[int, ...]:
        return tuple(map(int, candidate.text))


def toy_loss(text: str) -> float:
    """Loss of the candidate: the sum of the costs of what is pruned."""
    return sum(i + 1.0 for i, bit in enumerate(text) if bit == "1") / 100


class ToyEvaluator:
    """Measures `toy_loss`, deterministically; ``11...`` is infeasible. Keeps what it was given in `calls`.

    Args:
        space: counts costs.
        die_at: kill this process, without warning, in the batch that holds the evaluation with this number.
        seconds: reported for each evaluation.
    """

    def __init__(self, space: OneMax, die_at: int | None = None, seconds: float = 0.25) -> None:
        self.space = space
        self.die_at = die_at
        self.seconds = seconds
        self.calls: list[tuple[tuple[str, ...], Fidelity]] = []

    @property
    def n_evaluations(self) -> int:
        return sum(len(candidates) for candidates, _ in self.calls)

    def evaluate(self, candidates: Sequence[str], fidelity: Fidelity) -> list[Measurement]:
        self.calls.append((tuple(candidates), fidelity))
        if self.die_at is not None and self.n_evaluations > self.die_at:
            os.kill(os.getpid(), 9)
        return [self._one(text, fidelity) for text in candidates]

    def _one(self, text: str, fidelity: Fidelity) -> Measurement:
        if text.startswith("11"):
            return Measurement(text, fidelity, infeasible="begins with 11", seconds=self.seconds)
        values = {"loss": toy_loss(text) + 1 / fidelity.n_tokens, **self.space.cost(self.space.parse(text))}
        return Measurement(text, fidelity, values, n_tokens=fidelity.n_tokens, seconds=self.seconds)


@dataclass(frozen=True)
class Ready:
    """A worker that was set up elsewhere."""

    evaluator: ToyEvaluator
    directories: tuple[Path, ...] = ()

    def __call__(self, directories: Sequence[Path]) -> ToyEvaluator:
        return self.evaluator


class Pool(Executor):
    """Several workers in this process, whose jobs end in a random order.

    Args:
        evaluator: of all of them.
        n_workers: jobs at a time.
        seed: of the order.
        break_at: raise a `BrokenPipeError` in place of handing back the result with this number.
    """

    def __init__(
        self, evaluator: ToyEvaluator, n_workers: int = 4, seed: int = 0, break_at: int = -1
    ) -> None:
        self.evaluator = evaluator
        self.n_workers = n_workers
        self.break_at = break_at
        self.n_done = 0
        self.most_pending = 0
        self.jobs: list[Job] = []
        self.rng = np.random.default_rng(seed)

    @property
    def n_free(self) -> int:
        return self.n_workers - len(self.jobs)

    @property
    def n_pending(self) -> int:
        return len(self.jobs)

    @property
    def job_size(self) -> int:
        return 2

    @property
    def worker_status(self) -> WorkerStatus:
        return WorkerStatus(self.n_workers, len(self.jobs))

    def submit(self, job: Job) -> None:
        assert self.n_free
        self.jobs.append(job)
        self.most_pending = max(self.most_pending, len(self.jobs))

    def wait(self) -> list[tuple[Job, list[Measurement]]]:
        if self.n_done == self.break_at:
            raise BrokenPipeError
        self.n_done += 1
        job = self.jobs.pop(self.rng.integers(len(self.jobs)))
        return [(job, self.evaluator.evaluate(job.candidates, job.fidelity))]

    def close(self) -> None:
        self.jobs.clear()


class ToyController(Controller):
    """A climber over two fidelities whose every proposal depends on everything that it was told.

    Odd proposals are at the large fidelity, every third is random, and repetitions happen.
    """

    def __init__(self, space: OneMax, fidelities: Sequence[int], seed: int = 0) -> None:
        self.space = space
        self.small, self.large = Fidelity("search", fidelities[0]), Fidelity("search", fidelities[-1])
        self.seed = seed
        self.history: list[tuple[int, str]] = []  # as told, in order
        self.n_asked = 0
        self.best: tuple[float, str] | None = None

    def ask(self, n: int) -> list[Proposal]:
        self.n_asked += 1
        rng = np.random.default_rng([self.seed, self.n_asked, len(self.history)])
        parent = self.space.parse(self.best[1]) if self.best else self.space.sample(rng, 0)
        proposals = []
        for i in range(n):
            parent_or_new = self.space.mutate(parent, rng) if i % 3 else self.space.sample(rng, 0)
            proposals.append(Proposal(parent_or_new, self.large if i % 2 else self.small))
        return proposals

    def tell(self, trials: Sequence[Trial]) -> None:
        for trial in trials:
            m = trial.measurement
            self.history.append((trial.number, m.candidate))
            if (
                m.fidelity == self.large
                and m.infeasible is None
                and self.space.target_of(Bits(m.candidate)) == 0
            ):
                self.best = min(self.best or (np.inf, ""), (m.values["loss"], m.candidate))


SMALL, LARGE = Fidelity("search", 64), Fidelity("search", 256)
ABOUT = About(identity={"model": "toy", "space": {"kind": "onemax", "n": 10}}, baselines={"dense": "0" * 10})
SPACE = OneMax(10, (5,))


def measurement(i: int, fidelity: Fidelity = SMALL) -> Measurement:
    params = 10.0 - i if i < 10 else 1 / i
    return Measurement(f"c{i}", fidelity, {"loss": i / 7, "params": params}, n_tokens=64, seconds=0.1 + i)


def start(directory: Path, about: About = ABOUT) -> Study:
    return Study.open_or_create(directory, {"model": "toy"}, about)


def search(
    directory: Path,
    budget: Budget,
    *,
    evaluator: ToyEvaluator | None = None,
    controller: Controller | None = None,
    batch: int = 6,
    observers: tuple = (),
    on_ready: Callable[[Search], None] = lambda loop: None,
):
    """One run of the toy search; returns the outcome, the study, the controller and the evaluator."""
    evaluator = evaluator or ToyEvaluator(SPACE)
    controller = controller or ToyController(SPACE, (64, 256), seed=3)
    setup = Ready(evaluator)
    with start(directory) as study, LocalExecutor(LocalSettings(), setup) as executor:
        loop = Search(
            study, SPACE.baselines(), controller, executor, budget, LARGE, batch=batch, observers=observers
        )
        on_ready(loop)
        return loop.run(), study, controller, evaluator


def search_pool(
    directory: Path,
    budget: Budget,
    pool: Pool,
    controller: Controller,
    *,
    deterministic: bool = False,
    about: Mapping[str, Any] = MappingProxyType({"controller": "toy"}),
    on_ready: Callable[[Search], None] = lambda loop: None,
):
    """One run of the toy search over several workers; returns the outcome and the study."""
    with start(directory) as study:
        asks = None if deterministic else study.asks(about)
        loop = Search(study, SPACE.baselines(), controller, pool, budget, LARGE, batch=6, asks=asks)
        on_ready(loop)
        return loop.run(), study


CHILD = """
    import sys
    sys.path[:0] = {path!r}
    from pathlib import Path
    from tests.toy import *
    directory = Path({directory!r})
"""


def child(code: str, directory: Path) -> subprocess.Popen:
    paths = [str(Path(__file__).parent.parent), *filter(None, sys.path)]
    head = textwrap.dedent(CHILD).format(path=paths, directory=str(directory))
    return subprocess.Popen([sys.executable, "-c", head + textwrap.dedent(code)])
