"""Recovery stage: longer training of picked trials, measured at the fidelity ``recovered`` of the study.

``RUN/recovered/<trial>-<tokens>/`` then holds the model and ``recovery.json`` with its training settings and losses.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from typing import Any, Literal

from pydantic import Field, ValidationError

from secateur.search.controller import Trial
from secateur.search.errors import UsageError
from secateur.search.files import replace_file
from secateur.search.recovery.tuning import Trained
from secateur.search.settings.problems import problems
from secateur.search.study.study import Study
from secateur.spaces.measurement import Fidelity, Measurement
from secateur.spaces.section import Section

DIRECTORY, RECORD = "recovered", "recovery.json"


class RecoverySettings(Section):
    """Settings of recovery; see `evaluators.training.settings.Training`.

    Args:
        address: of a Ray cluster; None for one of the command's own.
    """

    method: Literal["lora", "full", "norms", "spp", "scale_lora", "perp", "slope", "last", "merged"] = "lora"
    loss: Literal["kl", "ce", "reconstruct"] = "kl"
    tokens: int = Field(default=65536, gt=0)
    batch: int = Field(default=4, gt=0)
    lr: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    rank: int = Field(default=16, gt=0)
    seed: int = Field(default=0, ge=0)
    data: Literal["all", "paser"] = "all"
    share: float = Field(default=0.2, gt=0, le=1)
    address: str | None = None

    @property
    def training(self) -> dict[str, Any]:
        """The arguments of a `Training`."""
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
    """Outcome of recovering one picked trial.

    Args:
        trial: its number.
        directory: of the model and its record; None if there is none.
        measurement: on the test part, at the fidelity ``recovered``; None if there is none.
        note: reason for no measurement, or that it existed already; "" if it is new.
    """

    trial: int
    directory: Path | None
    measurement: Measurement | None
    note: str = ""


Train = Callable[[Sequence[int]], Mapping[int, Trained]]
"""Trains the trials with these numbers."""

Finish = Callable[[int, Path, Path], tuple[Mapping[str, Mapping[str, float]], Mapping[str, float]]]
"""Measures and saves a model, given the number of its trial, the directory of its last checkpoint and one for the
model: losses by text and export, and the values of the measurement."""


class Stage:
    """Recovery of picked trials of a study, with a record and a measurement of each.

    Args:
        study: open for writing.
        trials: picked ones, of distinct candidates.
        training: plain settings that determine the training.
        n_test_tokens: tokens of the recovered models' test measurement, for the record.
    """

    def __init__(
        self, study: Study, trials: Sequence[Trial], training: Mapping[str, Any], n_test_tokens: int
    ) -> None:
        self._study = study
        self._training = dict(training)
        self._n_test_tokens = n_test_tokens
        self._fidelity = Fidelity("recovered", training["tokens"])
        self._picked = {trial.number: trial.measurement.candidate for trial in trials}
        self._known = {
            number: study.lookup((text, self._fidelity.text)) for number, text in self._picked.items()
        }
        for number, known in self._known.items():
            if known is not None:
                self._check_training(number)

    @property
    def experiment(self) -> Path:
        """Directory of the training runs, one for each set of trials and training settings."""
        about = json.dumps([sorted(self._picked.values()), self._training], sort_keys=True)
        name = f"tune-{hashlib.sha256(about.encode()).hexdigest()[:12]}"
        return (self._study.directory / DIRECTORY / name).absolute()

    def directory(self, number: int) -> Path:
        """Directory of a trial's recovered model and its record."""
        return self._study.directory / DIRECTORY / f"{number}-{self._fidelity.n_tokens}"

    def run(self, train: Train, finish: Finish) -> list[Recovered]:
        """Recover the missing trials.

        Raises:
            StudyWriteError: if the disk is full. The same call continues, as after any other exception.
        """
        missing = [number for number, known in self._known.items() if known is None]
        ended = train(missing) if missing else {}
        results = []
        for number, known in self._known.items():
            if known is not None:
                done = Recovered(number, self.directory(number), known.measurement, "was there already")
            else:
                done = self._keep(number, ended[number], finish)
            results.append(done)
        if all(result.measurement is not None for result in results):
            rmtree(self.experiment, ignore_errors=True)  # kept after failures, for its logs
        return results

    def _keep(self, number: int, trained: Trained, finish: Finish) -> Recovered:
        if trained.reason is not None or trained.state is None:
            return Recovered(number, None, None, trained.reason or "failed before its first checkpoint")
        directory = self.directory(number)
        directory.mkdir(parents=True, exist_ok=True)
        measured, values = finish(number, trained.state, directory / "model")
        record = {
            "trial": number,
            "candidate": self._picked[number],
            "fidelity": self._fidelity.text,
            "recipe": self._training,
            "measured": {name: dict(losses) for name, losses in measured.items()},
            "course": [dict(point) for point in trained.course],
            "seconds": trained.seconds,
        }
        # Before the measurement, so that each recovered trial of the study has a record.
        replace_file(directory / RECORD, json.dumps(record, indent=1) + "\n")
        measurement = Measurement(
            self._picked[number],
            self._fidelity,
            values,
            seed=self._training["seed"],
            n_tokens=self._n_test_tokens,
            seconds=trained.seconds,
            worker="recover",
        )
        self._study.append([measurement])
        return Recovered(number, directory, measurement)

    def _check_training(self, number: int) -> None:
        """Refuse other settings with as many tokens, which would be the same fidelity of the study."""
        path = self.directory(number) / RECORD
        try:
            there = dict(json.loads(path.read_text(encoding="utf-8"))["recipe"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            there = {}
        changed = [name for name, value in self._training.items() if there.get(name) != value]
        if changed:
            was = ", ".join(f"{name} {there.get(name, 'unknown')}" for name in changed)
            raise UsageError(
                f"Expected the recipe that trial {number} was recovered with at {self._fidelity.n_tokens:,} tokens "
                f"({was}), got another. Use it, or another number of tokens."
            )
