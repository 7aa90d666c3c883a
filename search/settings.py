"""Settings of a search: read strictly, completed with defaults, kept in the run."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from secateur.search.controllers.registry import CONTROLLERS
from secateur.search.errors import UsageError, nearest
from secateur.search.executors.registry import EXECUTORS
from secateur.search.mirror.address import FORM
from secateur.search.objectives import OBJECTIVES
from secateur.search.problems import problems
from secateur.search.yaml_file import parse_yaml, read_yaml
from secateur.spaces.registry import SPACES

if TYPE_CHECKING:
    from secateur.search.study import Spent

# Sections whose keys depend on their `kind`, with the kind that is meant where none is given.
_REGISTRIES: dict[str, tuple[Mapping[str, Any], str]] = {
    "space": (SPACES, "allocation"),
    "controller": (CONTROLLERS, "evolution"),
    "executor": (EXECUTORS, "local"),
}


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _no_switches_for_numbers(cls, raw: Any) -> Any:
        """Refuse true and false where a number belongs: they would count as 1 and 0."""
        for name, value in raw.items() if isinstance(raw, dict) else ():
            field = cls.model_fields.get(name)
            if isinstance(value, bool) and field is not None and field.annotation is not bool:
                raise ValueError(f"Expected `{name}` to be no switch, got {str(value).lower()}.")
        return raw


class DataSettings(_Section):
    """Where text comes from: ``docs``, a file, a directory, or a hub dataset. The three sets are disjoint.

    Args:
        calibration: statistics of the dense model are taken here.
        search: controllers see losses on this.
        test: only the final numbers are measured here.
    """

    calibration: str = "docs"
    search: str = "docs"
    test: str = "docs"


class EvaluatorSettings(_Section):
    """What a measurement is.

    Args:
        loss: ``kl`` to the dense model or ``ce``, both in nats per token.
        data: sources of text.
        window: tokens that the model sees at once.
        calibration_tokens: size of the calibration set, a multiple of the window.
        test_tokens: size of the test measurements, a multiple of the window.
        fidelities: tokens of search measurements, ascending multiples of the window; nested.
        seed: which windows are drawn, and the noise of the metric ``random``.
    """

    loss: Literal["kl", "ce"] = "kl"
    data: DataSettings = DataSettings()
    window: int = Field(default=512, gt=1)
    calibration_tokens: int = Field(default=16384, gt=0)
    test_tokens: int = Field(default=8192, gt=0)
    fidelities: tuple[int, ...] = Field(default=(2048, 8192, 32768), min_length=1)
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _check(self) -> EvaluatorSettings:
        if any(a >= b for a, b in zip(self.fidelities, self.fidelities[1:], strict=False)):
            raise ValueError(f"Expected `fidelities` to ascend, got {list(self.fidelities)}.")
        for name in ("calibration_tokens", "test_tokens", "fidelities"):
            value = getattr(self, name)
            for n_tokens in value if isinstance(value, tuple) else (value,):
                if n_tokens <= 0 or n_tokens % self.window:
                    near = max(1, round(n_tokens / self.window)) * self.window
                    raise ValueError(
                        f"Expected `{name}` in whole windows of {self.window} tokens, got {n_tokens}. "
                        f"Use {near}, or change `evaluator.window`."
                    )
        return self


class Budget(_Section):
    """When a search ends: as soon as one of the limits is reached.

    Args:
        evaluations: distinct search measurements, baselines included.
        tokens: tokens evaluated for them.
        minutes: time spent on them, summed over workers.
    """

    evaluations: int | None = Field(default=None, gt=0)
    tokens: int | None = Field(default=None, gt=0)
    minutes: float | None = Field(default=None, gt=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _check(self) -> Budget:
        if self.evaluations is None and self.tokens is None and self.minutes is None:
            raise ValueError("Expected `budget` to limit evaluations, tokens or minutes, got no limit.")
        return self

    def share(self, spent: Spent) -> float:
        """The largest share of a limit that was spent."""
        pairs = (
            (spent.evaluations, self.evaluations),
            (spent.tokens, self.tokens),
            (spent.seconds / 60, self.minutes),
        )
        return max(used / limit for used, limit in pairs if limit is not None)


class Settings(_Section):
    """Everything that a search is given. Made by `load_settings` or `settings_from`, which know the kinds.

    Args:
        model: ``tiny``, a hub id, a local directory, or a .gguf file.
        dtype: of the model's weights; ``auto`` as stored.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ...
        trust_remote_code: run code that comes with the model.
        space: section of a space, by ``kind``.
        controller: section of a controller, by ``kind``.
        evaluator: what a measurement is.
        objectives: names of values, the first ones first in tables.
        executor: section of an executor, by ``kind``.
        budget: when the search ends.
        storage: address of a database that mirrors the study, such as ``postgresql://...`` with ``${NAMES}`` of
            environment variables; None for a journal file in the run.
        seed: of the controller: which candidates are proposed.
    """

    model: str = Field(default="tiny", min_length=1)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    trust_remote_code: bool = False
    space: Any  # the settings model of its kind, as the two others below
    controller: Any
    evaluator: EvaluatorSettings = EvaluatorSettings()
    objectives: tuple[str, ...] = Field(default=("loss", "params"), min_length=1)
    executor: Any
    budget: Budget = Budget(evaluations=300)
    storage: str | None = None
    seed: int = Field(default=0, ge=0)

    @field_validator("storage")
    @classmethod
    def _check_storage(cls, address: str | None) -> str | None:
        if address is not None and "://" not in address and not re.fullmatch(r"\$\{\w+\}", address):
            raise ValueError(f"Expected `storage` such as {FORM}, got {address!r}.")
        return address

    @field_validator("objectives")
    @classmethod
    def _check_objectives(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in OBJECTIVES:
                raise ValueError(f"Expected known `objectives`, got {name!r}.{nearest(name, OBJECTIVES)}")
        if len(set(names)) < len(names):
            raise ValueError(f"Expected each of `objectives` once, got {list(names)}.")
        return names


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
        _override(raw, override)
    return settings_from(raw)


def settings_from(raw: Mapping[str, Any]) -> Settings:
    """Settings from a plain mapping, as in a settings file.

    Raises:
        UsageError: in one line, with the first of the problems.
    """
    values, lines = dict(raw), list[str]()
    for name, (registry, kind) in _REGISTRIES.items():
        section = values.get(name, {})
        if isinstance(section, BaseModel):
            continue
        values[name], found = _section(name, section, registry, kind)
        lines += found
    try:
        settings = Settings.model_validate(values)
    except ValidationError as error:
        lines += problems(error, Settings)
    if lines:
        more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
        raise UsageError(lines[0] + more)
    return settings


def resolved(settings: Settings) -> dict[str, Any]:
    """All settings, defaults included, as plain values for YAML; `settings_from` is its inverse."""
    return settings.model_dump(mode="json")


def identity(settings: Settings) -> dict[str, Any]:
    """The settings that measurements depend on: under others they can't be compared.

    Budget, controller and its seed, executor, device, objectives, storage, target and fidelities may change when a
    search is continued.
    """
    values = resolved(settings)
    exported = ("target", "calibration")  # the second one is how an export prunes
    space = {key: value for key, value in values["space"].items() if key not in exported}
    passing = ("fidelities", "test_tokens")  # a measurement names its own number of tokens
    evaluator = {key: value for key, value in values["evaluator"].items() if key not in passing}
    kept = {key: values[key] for key in ("model", "dtype", "trust_remote_code")}
    return kept | {"space": space, "evaluator": evaluator}


def _section(name: str, raw: Any, registry: Mapping[str, Any], default: str) -> tuple[BaseModel, list[str]]:
    """The section by its kind, and what is wrong with it."""
    if not isinstance(raw, Mapping):
        return _Section(), [f"Expected `{name}` to be a mapping such as {{kind: {default}}}, got {raw!r}."]
    kind = raw.get("kind", default)
    if not isinstance(kind, str) or kind not in registry:
        hint = nearest(str(kind), registry)
        return _Section(), [f"Expected a known `{name}.kind`, got {kind!r}.{hint}"]
    model: type[BaseModel] = registry[kind].settings
    try:
        return model.model_validate({**raw, "kind": kind}), []
    except ValidationError as error:
        return _Section(), problems(error, model, [name])


def _override(raw: dict[str, Any], override: str) -> None:
    """Set one key of a nested mapping, in place."""
    path, equals, value = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise UsageError(f"Expected an override such as budget.evaluations=600, got {override!r}.")
    for i, key in enumerate(keys[:-1]):
        inner: Any = raw.setdefault(key, {})
        if not isinstance(inner, dict):
            place = ".".join(keys[: i + 1])
            raise UsageError(f"Expected `{place}` to hold keys, for {override!r}, got {inner!r}.")
        raw = inner
    raw[keys[-1]] = parse_yaml(value, repr(override))
