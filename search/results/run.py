"""Run to read from: its study with its settings, without torch and without the model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from secateur.search.controller import Trial
from secateur.search.errors import UsageError
from secateur.search.files import T, checked
from secateur.search.loop.notes import read_notes
from secateur.search.results.front import comparable, non_dominated
from secateur.search.results.pick import Bound, pick, pick_number
from secateur.search.results.shares import removed_shares
from secateur.search.settings.evaluator import LatencySettings
from secateur.search.settings.settings import Settings, settings_from
from secateur.search.study.about import ABOUT, BOARD
from secateur.search.study.study import MEASUREMENTS, SETTINGS, Study
from secateur.spaces.measurement import Fidelity, Measurement
from secateur.spaces.plain_files import check_no_link
from secateur.spaces.registry import SPACES
from secateur.spaces.shape import ModelShape, Prunable
from secateur.spaces.space import Space

MOST_NAMED = 8
"""Experts that a note names."""


def notes_of_facts(facts: Mapping[str, Any]) -> tuple[str, ...]:
    """Lines about a model that is to be pruned, from a run's record; records of old lack some facts."""
    return notes_on_model(
        facts.get("zeros", 0.0), facts.get("parameters", ()), facts.get("starved_experts", {})
    )


def notes_on_model(
    zeros: float, parameters: Sequence[Mapping[str, Any]], starved: Mapping[str, int] | None = None
) -> tuple[str, ...]:
    """Lines about a model that is to be pruned.

    Args:
        zeros: share of its prunable weights.
        parameters: of its blocks, rows as a run's record has them.
        starved: calibration tokens of experts that get too few, by full name.
    """
    found = []
    unknown = [row for row in parameters if row["state"] == "not understood"]
    if unknown:
        found.append(
            f"Not understood, and left as they are: {sum(row['share'] for row in unknown):.2%} of the parameters of "
            f"the blocks ({', '.join(row['name'] for row in unknown)})."
        )
    if zeros >= 5e-5:
        found.append(
            f"{zeros:.2%} of the dense model's prunable weights are zeros already; its sparsity of 0 leaves them out."
        )
    if starved:
        named = [f"{name} ({n})" for name, n in sorted(starved.items(), key=lambda pair: pair[1])]
        more = f", and {len(named) - MOST_NAMED} more" if len(named) > MOST_NAMED else ""
        found.append(
            f"Experts that few calibration tokens are routed to, whose statistics are mostly chance: "
            f"{', '.join(named[:MOST_NAMED])}{more}. Use more calibration tokens, or `evaluator.moe_all_experts`."
        )
    return tuple(found)


@dataclass(frozen=True)
class _Parameters:
    """Row of a run's account of parameters, as far as it is shown."""

    state: str
    name: str
    share: float


class Run:
    """Study with its settings, space, front and baselines.

    Args:
        study: open for reading or writing.
    """

    def __init__(self, study: Study) -> None:
        self.study = study
        self._n_checked = study.n_unchanged  # trials whose candidates are of the space
        self._front: tuple[int, list[Trial]] = 0, []  # of so many trials

    @cached_property
    def settings(self) -> Settings:
        """Settings that the run was last continued with.

        Raises:
            UsageError: if they are no search's.
        """
        if BOARD in self.study.about.identity:
            raise UsageError(
                f"Expected the run of a search, got a board of methods in {self.study.directory}. Its tables are "
                "in it; `secateur bench` continues it."
            )
        try:
            settings = settings_from(self.study.settings)
        except UsageError as error:
            raise UsageError(f"In {self.study.directory / SETTINGS}: {error}") from None
        folders = self.study.about.facts.get("folders", [])  # runs of old have none
        return settings.found_from(Path(str(folder)) for folder in folders)

    @property
    def objectives(self) -> tuple[str, ...]:
        return self.settings.objectives

    @property
    def fidelity(self) -> Fidelity:
        """Fidelity of comparisons: the largest of the search."""
        return self.settings.evaluator.compared

    @property
    def report_directory(self) -> Path:
        """Directory of the report and its pictures, which may be missing.

        Raises:
            OSError: if it is a link, see `check_no_link`.
        """
        directory = self.study.directory / "report"
        check_no_link(directory)
        return directory

    @property
    def baselines(self) -> dict[str, Trial]:
        """Measured baselines by name: ``dense``, ``uniform@...`` and further ones."""
        found = {
            name: self.study.lookup((text, self.fidelity.text))
            for name, text in self.study.about.baselines.items()
        }
        return {name: trial for name, trial in found.items() if trial is not None}

    @cached_property
    def shape(self) -> ModelShape:
        """Shape of the dense model, with the run's latency table if it has one."""
        return self.described("facts.shape", ModelShape)

    @cached_property
    def linears(self) -> list[Prunable]:
        return self.described("facts.shape.linears", list[Prunable])

    @cached_property
    def model_notes(self) -> tuple[str, ...]:
        """Lines about the dense model that its numbers don't tell, see `notes_on_model`."""
        rows = self.described("facts.parameters", list[_Parameters], [])  # runs of old have none of these
        zeros = self.described("facts.zeros", float, 0.0)
        starved = self.described("facts.starved_experts", dict[str, int], {})
        return notes_on_model(zeros, [vars(row) for row in rows], starved)

    def described(self, place: str, kind: type[T], absent: T | None = None) -> T:
        """Value in the study's description, by its dotted place.

        Args:
            place: such as ``facts.shape``.
            kind: the types that it must have.
            absent: for a study without it; None: it has to be there.

        Raises:
            UsageError: if it is of other types.
        """
        value: Any = vars(self.study.about)
        for key in place.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        if value is None and absent is not None:
            return absent
        return checked(json.dumps(value), kind, f"`{place}` in {self.study.directory / ABOUT}")

    @cached_property
    def space(self) -> Space[Any]:
        """Space of the candidates, from the shape kept in the study."""
        settings, linears, shape = self.settings.space, self.linears, self.shape
        try:
            return SPACES[settings.kind].build(settings, linears, shape)
        except (ValueError, LookupError, ArithmeticError) as error:
            where = f"{SETTINGS} and {ABOUT} in {self.study.directory}"
            raise UsageError(f"Expected {where} to fit each other, got: {error} Restore the files.") from None

    def candidate(self, trial: Trial) -> Any:
        """Candidate of a trial; one that is none of the space is a `UsageError` with its line."""
        space, text = self.space, trial.measurement.candidate
        try:
            return space.parse(text)
        except ValueError as error:
            path = self.study.directory / MEASUREMENTS
            lines = enumerate(path.read_bytes().splitlines(), start=1)
            number = next(i for i, line in lines if json.loads(line)["candidate"] == text)
            raise UsageError(
                f"Expected a candidate of the run's space in line {number} of {path}, got {text[:40]!r}: {error} "
                f"Restore the line, or remove it (`secateur doctor RUN --repair`)."
            ) from None

    def check(self) -> None:
        """Raise a UsageError, with its line, for a candidate in the study that is none of the space.

        Lines that are as their driver wrote them need no check, nor do those that were checked before.
        """
        new = self.study.trials[self._n_checked :]
        for trial in {trial.measurement.candidate: trial for trial in new}.values():
            self.candidate(trial)
        self._n_checked += len(new)

    def trials(self) -> list[Trial]:
        """Feasible trials at the largest search fidelity."""
        return comparable(self.study.trials, self.fidelity)

    def front(self) -> list[Trial]:
        """Front of the trials, baselines included, each of a candidate of the space."""
        n_trials, front = self._front
        if n_trials != len(self.study.trials):
            front = non_dominated(self.study.trials, self.objectives, self.fidelity)
            for trial in front:
                self.candidate(trial)
            self._front = len(self.study.trials), front
        return list(front)

    def test_of(self, trial: Trial) -> Measurement | None:
        """Measurement of the same candidate on the test part, if there is one."""
        found = self.study.lookup((trial.measurement.candidate, self.settings.evaluator.test_fidelity.text))
        return None if found is None else found.measurement

    def recovered_of(self, trial: Trial) -> Measurement | None:
        """Test measurement of the same candidate after recovery; of several the one with the most training."""
        text, fidelities = trial.measurement.candidate, self.study.fidelities
        found = [self.study.lookup((text, f.text)) for f in fidelities if f.part == "recovered"]
        same = [t.measurement for t in found if t is not None]
        return max(same, key=lambda m: m.fidelity.n_tokens, default=None)

    @property
    def notes(self) -> dict[str, float]:
        """Notes of the controller, see `Controller.notes`; empty if there are none."""
        return read_notes(self.study.directory, self.settings.controller.kind)

    def as_searched(self, trials: Sequence[Trial]) -> list[Trial]:
        """Trials of the same candidates, each once, at the fidelity of the front where there is one."""
        found = {t.measurement.candidate: t for t in trials}
        shown = {text: self.study.lookup((text, self.fidelity.text)) for text in found}
        return [shown[text] or trial for text, trial in found.items()]

    def pick(self, bounds: Sequence[Bound] = (), number: int | None = None) -> Trial:
        """Best trial within the bounds, or the trial with the number.

        Raises:
            UsageError: if there is none; the nearest is named.
        """
        trials, dense = self.study.trials, self.study.about.baselines.get("dense")
        latency = self.settings.evaluator.latency or LatencySettings()
        bounds = [bound.where_first_is(latency.batches[0]) for bound in bounds]
        found = pick(trials, bounds, dense, self.fidelity) if number is None else pick_number(trials, number)
        self.candidate(found)
        return found

    def values_of(self, trial: Trial) -> dict[str, float | None]:
        """Values of a trial for display: None where the candidate has no such cost."""
        absent = self.stand_ins(trial)
        return {n: None if n in absent else value for n, value in trial.measurement.values.items()}

    def stand_ins(self, trial: Trial) -> frozenset[str]:
        """Names of costs that the candidate does not have, see `Space.stand_ins`."""
        return self.space.stand_ins.get(trial.measurement.candidate, frozenset())

    @property
    def structured(self) -> bool:
        """True if candidates are structured: removed parts are neither stored nor computed."""
        return bool(self.shape.blocks)

    def removed(self, trial: Trial) -> dict[str, float] | None:
        """Removed shares of a structured candidate, see `removed_shares`; None of others, and where not known."""
        if not self.structured or self.stand_ins(trial):
            return None
        return removed_shares(trial.measurement.values, self.shape.n_params)

    def allocation(self, trial: Trial) -> dict[str, float]:
        """Share of each linear that is zeroed or cut, by its full name.

        Empty where the share is known only after pruning, as of recipes.
        """
        config = self.space.config(self.candidate(trial))
        if "blocks" in config:
            return _cut_shares(config["blocks"], self.shape, config.get("hidden", 0), self.linears)
        return dict(config["sparsity"]) if isinstance(config["sparsity"], Mapping) else {}


def _cut_shares(
    kept: Sequence[Mapping[str, int]], shape: ModelShape, hidden: int, linears: Sequence[Prunable]
) -> dict[str, float]:
    """Cut share of each linear, which is the same for all linears of a sub-layer; of query heads the mean."""
    parts = []
    for after, before, narrow in zip(kept, shape.blocks, shape.at(hidden).blocks, strict=True):
        fewer = before.n_queries - after.get("queries", before.n_queries)
        group = narrow.group_params - fewer * narrow.query_params
        attention = after["kv_groups"] * group / max(before.n_kv_groups * before.group_params, 1)
        mlp = after["ffn"] * narrow.channel_params / max(before.ffn_width * before.channel_params, 1)
        parts.append({"attention": attention, "mlp": mlp})
    kinds = {"recurrent": "attention", "experts": "mlp"}
    return {x.name: 1 - parts[x.block][kinds.get(x.sublayer, x.sublayer)] for x in linears}


def open_run(directory: str | Path) -> Run:
    """Run to read from.

    Raises:
        UsageError: if the directory holds no study, or a damaged one.
    """
    run = Run(Study.open(directory))
    run.check()
    return run
