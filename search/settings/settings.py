"""Settings of a search: strict YAML with defaults and overrides."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    Field,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from secateur.search.budget import Budget
from secateur.search.controllers.local_model import curvature_fidelity
from secateur.search.controllers.registry import CONTROLLERS
from secateur.search.errors import UsageError
from secateur.search.executors.registry import EXECUTORS
from secateur.search.files import parse_yaml, read_yaml
from secateur.search.mirror.address import FORM, masked, masked_address, readable
from secateur.search.objectives import objective
from secateur.search.settings.evaluator import MEASURES, EvaluatorSettings
from secateur.search.settings.problems import problems, validated
from secateur.search.tracking.trackers import TrackerName
from secateur.spaces.measurement import MARGIN, TASK
from secateur.spaces.names import nearest
from secateur.spaces.registry import SPACES
from secateur.spaces.section import Section
from secateur.spaces.space_settings import SpaceSettings
from secateur.spaces.streaming import Stream

# Sections whose keys depend on their `kind`, with the kind that is meant where none is given.
REGISTRIES: dict[str, tuple[Mapping[str, Any], str]] = {
    "space": (SPACES, "allocation"),
    "controller": (CONTROLLERS, "evolution"),
    "executor": (EXECUTORS, "local"),
}


@dataclass(frozen=True)
class _Origin:
    """Origin of settings; equal settings are equal whatever theirs.

    Args:
        folders: that relative paths are looked for in.
    """

    folders: tuple[Path, ...] = field(default=(), compare=False)


class Settings(Section):
    """Settings of a search, made by `load_settings` or `settings_from`, which know the kinds of sections.

    Args:
        model: ``tiny``, a hub id, a local directory, or a .gguf file.
        dtype: of the model's weights; ``auto`` as stored.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ..., or ``spread``: by blocks over all GPUs.
        trust_remote_code: run code that comes with the model or its tasks.
        stream: ``always``: statistics and levels block by block from the model's files, whose weights are never all in
            memory; ``never``: from the whole model; ``auto``: streamed where the whole does not fit by the forecast, or
            is large beside the free memory. The weights are the same. In ``recover``, likewise, the teacher.
        compile: ``always``: blocks of candidates run by `torch.compile`, in spaces that zero weights; the numbers then
            differ by rounding, as between devices.
        space: section of a space, by ``kind``.
        controller: section of a controller, by ``kind``.
        evaluator: loss, data and fidelities of measurements.
        objectives: names of values, in the order of tables.
        executor: section of an executor, by ``kind``.
        budget: limits of the search.
        storage: address of a database that mirrors the study, such as ``postgresql://...`` with ``${NAMES}`` of
            environment variables; None for a journal file in the run.
        track: experiment tracker that trials are logged to, ``tensorboard``, ``mlflow``, ``wandb`` or ``trackio``, or a
            list of them.
        seed: of the controller's proposals, and of all that has no seed of its own: see `data_seed`.
    """

    model: str = Field(default="tiny", min_length=1)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    trust_remote_code: bool = False
    stream: Stream = "auto"
    compile: Literal["never", "always"] = "never"
    space: Any  # the settings model of its kind, as the two others below
    controller: Any
    evaluator: EvaluatorSettings = EvaluatorSettings()
    objectives: tuple[str, ...] = Field(default=("loss", "params"), min_length=1)
    executor: Any
    budget: Budget = Budget(evaluations=300)
    storage: str | None = None
    track: TrackerName | tuple[TrackerName, ...] = ()
    seed: int = Field(default=0, ge=0)
    _renamed: tuple[str, ...] = PrivateAttr(default=())
    _origin: _Origin = PrivateAttr(default=_Origin())

    @field_validator("executor")
    @classmethod
    def _size_rounds(cls, executor: Any, info: ValidationInfo) -> Any:
        """Batch of the executor, by default that of the space."""
        space = info.data.get("space")  # a plain section if it was refused
        batch = space.batch if isinstance(space, SpaceSettings) else None
        given = batch is None or "batch" in executor.model_fields_set
        return executor if given else executor.model_copy(update={"batch": batch})

    @field_validator("storage", mode="before")
    @classmethod
    def _check_storage(cls, address: Any) -> Any:
        if address is None or (isinstance(address, str) and re.fullmatch(r"(?s).*://.*|\$\{\w+\}", address)):
            return address
        raise ValueError(f"Expected `storage` such as {FORM}, got {readable(masked_address(repr(address)))}.")

    @field_validator("objectives")
    @classmethod
    def _check_objectives(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            objective(name)  # refuses an unknown one
        if len(set(names)) < len(names):
            raise ValueError(f"Expected each of `objectives` once, got {list(names)}.")
        return names

    @model_validator(mode="after")
    def _check_tasks(self) -> Settings:
        task = next(iter(self.task_values), None)
        if task is None:
            return self
        if self.evaluator.tasks is None:
            raise ValueError(
                f"Expected `evaluator.tasks` with the directory of its files for {task}, got nothing."
            )
        if self.evaluator.training is not None:
            raise ValueError(
                f"Expected no `evaluator.training` beside {task}, which is measured without. Leave one of them out."
            )
        has_cases = isinstance(self.space, SpaceSettings) and self.space.cases  # a plain section if refused
        if has_cases and self.evaluator.loss.startswith(MARGIN):
            raise ValueError(
                f"Expected no `space.also` beside the loss {self.evaluator.loss}, which only one model has. Leave one "
                f"of them out."
            )
        return self

    @property
    def renamed_keys(self) -> tuple[str, ...]:
        """One line for each key that was given by its former name."""
        return self._renamed

    @property
    def folders(self) -> tuple[Path, ...]:
        """Folders that relative paths are looked for in: the settings file's, then the one the search began in."""
        return self._origin.folders

    def found_from(self, folders: Iterable[Path]) -> Settings:
        """The settings, with relative paths that are looked for in these folders."""
        self._origin = _Origin(tuple(dict.fromkeys(folder.absolute() for folder in folders)))
        return self

    @property
    def optimised(self) -> tuple[str, ...]:
        """Objectives of the search and those of the controller's own."""
        return (*self.objectives, *(getattr(self.controller, "objectives", None) or ()))

    @property
    def measures(self) -> tuple[str, ...]:
        """Measures besides ``kl`` and ``ce``, in the order of `MEASURES`: the evaluator's own, the loss, objectives."""
        wanted = (*self.evaluator.measures, self.evaluator.loss, *self.optimised)
        return tuple(name for name in MEASURES if name in wanted)

    @property
    def data_seed(self) -> int:
        """Seed of the evaluator: its own, or that of the search."""
        return self.seed if self.evaluator.seed is None else self.evaluator.seed

    @property
    def training_seed(self) -> int:
        """Seed of light training: its own, or the evaluator's."""
        of = self.evaluator.training
        return self.data_seed if of is None or of.seed is None else of.seed

    @property
    def trackers(self) -> tuple[TrackerName, ...]:
        """Names in `track`, each once."""
        return (self.track,) if isinstance(self.track, str) else tuple(dict.fromkeys(self.track))

    @property
    def task_values(self) -> tuple[str, ...]:
        """Optimised values that come from tasks, and a margin that is the loss."""
        return tuple(x for x in (*self.optimised, self.evaluator.loss) if x.startswith((TASK, MARGIN)))


def load_settings(path: str | Path | None = None, overrides: Sequence[str] = ()) -> Settings:
    """Settings from a file and from the command line.

    Args:
        path: YAML file; None stands for an empty one.
        overrides: ``key.path=value``, the value in YAML; later ones win.

    Raises:
        UsageError: in one line, with the first of the problems.
    """
    raw = None if path is None else read_yaml(Path(path))
    raw = {} if raw is None else raw
    if not isinstance(raw, dict):
        raise UsageError(f"Expected keys and values in {path}, got {type(raw).__name__}. See the README.")
    for override in overrides:
        set_key(raw, override)
    settings = settings_from(raw)
    return settings if path is None else settings.found_from([Path(path).parent, Path.cwd()])


def settings_from(raw: Mapping[str, Any]) -> Settings:
    """Settings from a plain mapping, as in a settings file.

    Raises:
        UsageError: in one line, with the first of the problems.
    """
    values, lines, renamed = dict(raw), list[str](), list[str]()
    for name, (registry, kind) in REGISTRIES.items():
        section = values[name] if name in values else _usual(name, values)
        if isinstance(section, BaseModel):
            continue
        values[name], found = section_of(name, section, registry, kind)
        lines += found
        renamed += [
            f"`{name}.{old}` is called `{name}.{new}` now; the former name is still accepted."
            for old, new in values[name].renamed.items()
            if old in section
        ]
    settings = validated(Settings, values, lines)
    settings._renamed = tuple(renamed)
    return settings.found_from([Path.cwd()])


def resolved(settings: Settings) -> dict[str, Any]:
    """Settings with defaults as plain values for YAML; `settings_from` is the inverse."""
    return settings.model_dump(mode="json")


def identity(settings: Settings) -> dict[str, Any]:
    """Settings that measurements depend on; those of other values can't be compared.

    Budget, controller and its seed, executor, device, objectives, storage, fidelities, and the target where candidates
    name theirs, may change when a search is continued.
    """
    values, of = resolved(settings), settings.space
    former = {new: old for old, new in of.renamed.items()}  # studies from before have those
    space = {former.get(key, key): x for key, x in values["space"].items() if key not in of.no_identity}
    space |= of.fixed
    # A measurement names its own number of tokens; the BOS token that windows begin with, and whether experts saw all
    # calibration tokens, are among the contents.
    passing = ("fidelities", "test_tokens", "bos", "moe_all_experts", "allow_long_windows")
    evaluator = {key: value for key, value in values["evaluator"].items() if key not in passing}
    training = evaluator.pop("training")
    for optional in ("latency", "tasks"):  # absent in studies from before there were such sections
        if evaluator[optional] is None:
            del evaluator[optional]
    evaluator["seed"] = settings.data_seed
    del evaluator["measures"]
    if settings.measures:  # likewise
        evaluator["measures"] = list(settings.measures)
    if training is not None:
        evaluator["training"] = {key: x for key, x in training.items() if key not in ("tokens", "seed")}
        if settings.training_seed != settings.data_seed:  # likewise
            evaluator["training"]["seed"] = settings.training_seed
    kept = {key: values[key] for key in ("model", "dtype", "trust_remote_code")}
    return kept | {"space": space, "evaluator": evaluator}


def _usual(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Section that is meant where none is given; of the controller by the space, and by whether there are gradients."""
    space = values.get("space")
    if name != "controller" or not isinstance(space, SpaceSettings) or not space.by_gradients:
        return {}
    try:
        of = EvaluatorSettings.model_validate(values.get("evaluator", {}))
    except ValidationError:  # named later
        return {}
    curvature = curvature_fidelity(of.search_fidelities, None).n_tokens
    measured = of.loss in ("kl", "ce") and of.training is None and curvature <= of.calibration_tokens
    return {"kind": "evolution", "start": "trust_region"} if measured else {}


def section_of(name: str, raw: Any, registry: Mapping[str, Any], default: str) -> tuple[BaseModel, list[str]]:
    """Section of the settings by its kind, and its errors in a line each."""
    if not isinstance(raw, Mapping):
        expected = f"a mapping such as {{kind: {default}}}"
        return Section(), [f"Expected `{name}` to be {expected}, got {readable(repr(raw))}."]
    kind = raw.get("kind", default)
    if not isinstance(kind, str) or kind not in registry:
        hint = nearest(str(kind), registry)
        return Section(), [f"Expected a known `{name}.kind`, got {readable(repr(kind))}.{hint}"]
    model: type[BaseModel] = registry[kind].settings
    try:
        return model.model_validate({**raw, "kind": kind}), []
    except ValidationError as error:
        return Section(), problems(error, model, [name])


def set_key(raw: dict[str, Any], override: str) -> None:
    """Set one key of a nested mapping, in place: ``key.path=value``, the value in YAML.

    Raises:
        UsageError: if it has another form, or a key on its path holds a value.
    """
    path, equals, value = override.partition("=")
    keys, hidden = path.strip().split("."), masked_address if path.startswith("storage") else masked
    origin = readable(hidden(repr(override)))
    if not equals or not all(keys):
        raise UsageError(f"Expected an override such as budget.evaluations=600, got {origin}.")
    for i, key in enumerate(keys[:-1]):
        inner: Any = raw.setdefault(key, {})
        if not isinstance(inner, dict):
            place = ".".join(keys[: i + 1])
            given = readable(hidden(repr(inner)))
            raise UsageError(f"Expected `{place}` to hold keys, for {origin}, got {given}.")
        raw = inner
    raw[keys[-1]] = parse_yaml(value, origin)
