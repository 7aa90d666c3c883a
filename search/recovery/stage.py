"""The recovery stage: picked trials are trained for longer, and join the study at the fidelity ``recovered``.

``RUN/recovered/<trial>-<tokens>/`` then holds the model and ``recovery.json`` with the recipe and the course.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import Field, ValidationError

from secateur.search.controller import Trial
from secateur.search.errors import UsageError
from secateur.search.files import replace_file
from secateur.search.recovery.tuning import Trained, forget
from secateur.search.settings.problems import problems
from secateur.search.study.study import Study
from secateur.spaces.measurement import Fidelity, Measurement
from secateur.spaces.section import Section

DIRECTORY, RECORD = "recovered", "recovery.json"


class RecoverySettings(Section):
    """How models are recovered; see `evaluators.training.Recipe`.

    Args:
        method: what learns: ``lora``, ``full`` or ``norms``.
        loss: ``kl``, distillation from the dense model, or ``ce``.
        tokens: trained on, of the calibration text, repetitions counted; whole batches.
        batch: windows a step.
        lr: largest learning rate; None for the method's own.
        rank: of ``lora``.
        seed: order of the windows.
        address: of a Ray cluster; None for one of the command's own.
    """

    method: Literal["lora", "full", "norms"] = "lora"
    loss: Literal["kl", "ce"] = "kl"
    tokens: int = Field(default=65536, gt=0)
    batch: int = Field(default=4, gt=0)
    lr: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    rank: int = Field(default=16, gt=0)
    seed: int = Field(default=0, ge=0)
    address: str | None = None

    @property
    def recipe(self) -> dict[str, Any]:
        """The arguments of a `Recipe`."""
        return self.model_dump(exclude={"address"})


def recovery_settings(**raw: Any) -> RecoverySettings:
    """Settings from plain values.

    Raises:
        UsageError: in one line, with the first of the problems.
    """
    try:
        return RecoverySettings.model_validate(raw)
    except ValidationError as error:
        raise UsageError(problems(error, RecoverySettings)[0]) from None


@dataclass(frozen=True)
class Recovered:
    """What became of one picked trial.

    Args:
        trial: its number.
        directory: of the model and its record; None if there is none.
        measurement: on the test part, at the fidelity ``recovered``; None if there is none.
        note: why there is none, or that it was there already; "" if it is new.
    """

    trial: int
    directory: Path | None
    measurement: Measurement | None
    note: str = ""


class Finished(Protocol):
    """A model that was saved; see `evaluators.recovery.RecoveredModel`."""

    @property
    def measured(self) -> Mapping[str, Mapping[str, float]]:
        """Losses by what they were measured on."""
        ...

    @property
    def values(self) -> Mapping[str, float]:
        """Values of the measurement."""
        ...


class Stage:
    """Recovers trials of a study and keeps what comes out.

    Args:
        study: open for writing.
        trials: that were picked, distinct candidates.
        recipe: plain values; equal ones mean the same training.
        n_test_tokens: that the recovered models are measured on, for the record.
    """

    def __init__(
        self, study: Study, trials: Sequence[Trial], recipe: Mapping[str, Any], n_test_tokens: int
    ) -> None:
        self._study = study
        self._recipe = dict(recipe)
        self._n_test_tokens = n_test_tokens
        self._fidelity = Fidelity("recovered", recipe["tokens"])
        self._picked = {trial.number: trial.measurement.candidate for trial in trials}
        self._known = {number: self._lookup(number) for number in self._picked}
        for number, known in self._known.items():
            if known is not None:
                self._check_recipe(number)

    @property
    def missing(self) -> list[int]:
        """Numbers of the trials that are still to be recovered."""
        return [number for number, known in self._known.items() if known is None]

    @property
    def experiment(self) -> Path:
        """Directory of the training runs: another one for other trials or another recipe."""
        about = json.dumps([sorted(self._picked.values()), self._recipe], sort_keys=True)
        name = f"tune-{hashlib.sha256(about.encode()).hexdigest()[:12]}"
        return (self._study.directory / DIRECTORY / name).absolute()

    def directory(self, number: int) -> Path:
        """Where the model of a trial and its record are kept."""
        return self._study.directory / DIRECTORY / f"{number}-{self._fidelity.n_tokens}"

    def run(
        self,
        train: Callable[[Sequence[int]], Mapping[int, Trained]],
        finish: Callable[[int, Path, Path], Finished],
    ) -> list[Recovered]:
        """Recover what is missing.

        Args:
            train: the trials with these numbers.
            finish: given a number, the directory of its last checkpoint and one for the model: measure and save.

        Raises:
            StudyWriteError: if the disk is full. The same call continues, as after any other exception.
        """
        ended = train(self.missing) if self.missing else {}
        results = []
        for number, known in self._known.items():
            if known is not None:
                done = Recovered(number, self.directory(number), known.measurement, "was there already")
            else:
                done = self._keep(number, ended[number], finish)
            results.append(done)
        if all(result.measurement is not None for result in results):
            forget(self.experiment)  # with failures it is kept: it says what happened
        return results

    def _keep(
        self, number: int, trained: Trained, finish: Callable[[int, Path, Path], Finished]
    ) -> Recovered:
        if trained.reason is not None or trained.state is None:
            return Recovered(number, None, None, trained.reason or "failed before its first checkpoint")
        directory = self.directory(number)
        directory.mkdir(parents=True, exist_ok=True)
        finished = finish(number, trained.state, directory / "model")
        record = {
            "trial": number,
            "candidate": self._picked[number],
            "fidelity": self._fidelity.text,
            "recipe": self._recipe,
            "measured": {name: dict(losses) for name, losses in finished.measured.items()},
            "course": [dict(point) for point in trained.course],
            "seconds": trained.seconds,
        }
        # Before the measurement, so that each recovered trial of the study has a record.
        replace_file(directory / RECORD, json.dumps(record, indent=1) + "\n")
        measurement = Measurement(
            self._picked[number],
            self._fidelity,
            finished.values,
            seed=self._recipe["seed"],
            n_tokens=self._n_test_tokens,
            seconds=trained.seconds,
            worker="recover",
        )
        self._study.append([measurement])
        return Recovered(number, directory, measurement)

    def _lookup(self, number: int) -> Trial | None:
        return self._study.lookup((self._picked[number], self._fidelity.text))

    def _check_recipe(self, number: int) -> None:
        """Refuse another training of as many tokens: the study could not tell the two apart."""
        path = self.directory(number) / RECORD
        try:
            there = json.loads(path.read_text(encoding="utf-8"))["recipe"]
        except (OSError, ValueError, KeyError, TypeError):
            there = {}
        changed = [name for name, value in self._recipe.items() if there.get(name) != value]
        if changed:
            was = ", ".join(f"{name} {there.get(name, 'unknown')}" for name in changed)
            raise UsageError(
                f"Expected the recipe that trial {number} was recovered with at {self._fidelity.n_tokens:,} tokens "
                f"({was}), got another. Use it, or another number of tokens."
            )
