"""Settings of a board: models, methods and shares that are measured, and on what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from secateur.search.executors.registry import EXECUTORS
from secateur.search.settings.problems import validated
from secateur.search.settings.settings import section_of, set_key
from secateur.spaces.measurement import Fidelity
from secateur.spaces.method import UNITS, Unit
from secateur.spaces.names import nearest
from secateur.spaces.recipe.known import KNOWN
from secateur.spaces.section import Section

ALL: Literal["all"] = "all"
SHARES = ("weights=0.5", "structure=0.2", "blocks=0.2", "experts=0.25")

Calibration = Literal["equal", "published"]
"""Calibration data of a method: as many tokens as every other, or its own published number."""

FREE = ("models", "methods", "sparsities", "calibration", "seeds", "executor")
"""Keys that say which cells there are and who measures them; the others a cell's values depend on."""


class BoardSettings(Section):
    """Settings of a board, made by `board_settings`, which knows the kinds of executors.

    Args:
        models: each ``tiny``, a hub id, a directory or a .gguf file.
        methods: names of published recipes, or ``all``.
        sparsities: shares to remove, each of all units (``0.5``) or of one (``weights=0.5``).
        calibration: ``equal`` tokens for all methods, ``published`` for each its own number, or both.
        calibration_text: source of the calibration windows.
        contrast_text: source of a second calibration text, for methods over two; None: they are refused.
        calibration_tokens: of every method at ``equal``.
        calibration_window: tokens of its windows.
        text: sources of the texts to measure on; the loss is that of the first.
        tokens: of each, a multiple of `window`.
        window: tokens that a model sees at once.
        bos: begin windows with the tokenizer's BOS token; ``auto``: where it does so by itself.
        allow_long_windows: permit windows longer than the model's positions, where these are not learned.
        seeds: of the calibration windows, and of whatever a method draws; one that does neither is measured once.
        tasks: names of tasks that all models answer.
        task_dir: directory of their files.
        samples: of each task; None: all.
        dtype, device, trust_remote_code: how models are loaded.
        executor: section of an executor, by ``kind``.
    """

    models: tuple[str, ...] = Field(min_length=1)
    methods: tuple[str, ...] | Literal["all"] = ALL
    sparsities: tuple[str, ...] = Field(default=SHARES, min_length=1)
    calibration: tuple[Calibration, ...] = Field(default=("equal",), min_length=1)
    calibration_text: str = "docs"
    contrast_text: str | None = Field(default=None, min_length=1)
    calibration_tokens: int = Field(default=4096, gt=0)
    calibration_window: int = Field(default=128, gt=1)
    text: tuple[str, ...] = Field(default=("docs",), min_length=1)
    tokens: int = Field(default=8192, gt=0)
    window: int = Field(default=512, gt=1)
    bos: bool | Literal["auto"] = "auto"
    allow_long_windows: bool = False
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    tasks: tuple[str, ...] = ()
    task_dir: str | None = None
    samples: int | None = Field(default=None, gt=0)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"
    trust_remote_code: bool = False
    executor: Any

    @field_validator("methods")
    @classmethod
    def _check_methods(cls, names: tuple[str, ...] | str) -> tuple[str, ...] | str:
        for name in names if isinstance(names, tuple) else ():
            if name not in KNOWN:
                raise ValueError(
                    f"Expected `methods` that `secateur list recipes` shows, or all, got {name!r}."
                    f"{nearest(name, KNOWN)}"
                )
        return names

    @field_validator("sparsities")
    @classmethod
    def _check_sparsities(cls, shares: tuple[str, ...]) -> tuple[str, ...]:
        for share in shares:
            _share_of(share)
        return shares

    @model_validator(mode="after")
    def _check(self) -> BoardSettings:
        for name in ("models", "methods", "sparsities", "calibration", "text", "seeds", "tasks"):
            values = getattr(self, name)
            if isinstance(values, tuple) and len(set(values)) < len(values):
                raise ValueError(f"Expected each of `{name}` once, got {', '.join(map(str, values))}.")
        pairs = (("tokens", "window"), ("calibration_tokens", "calibration_window"))
        for name, window in pairs:
            if getattr(self, name) % getattr(self, window):
                raise ValueError(
                    f"Expected `{name}` to be a multiple of `{window}`, {getattr(self, window)}, got "
                    f"{getattr(self, name)}."
                )
        if self.tasks and self.task_dir is None:
            raise ValueError(f"Expected `task_dir` with the files of {', '.join(self.tasks)}, got nothing.")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """Methods, in the order of their table."""
        return tuple(name for name in KNOWN if self.methods == ALL or name in self.methods)

    @property
    def fidelity(self) -> Fidelity:
        """Of the measurements."""
        return Fidelity("test", self.tokens)

    def shares(self, unit: Unit) -> tuple[float, ...]:
        """Shares that methods of a unit remove, in their order, each once."""
        pairs = map(_share_of, self.sparsities)
        return tuple(dict.fromkeys(share for of, share in pairs if of in (None, unit)))


def _share_of(text: str) -> tuple[Unit | None, float]:
    """Unit, None for all, and share of a text such as ``weights=0.5``."""
    name, equals, number = text.rpartition("=")
    unit = next((unit for unit in UNITS if unit == name), None)
    try:
        share = float(number)
    except ValueError:
        share = 0.0
    if not 0 < share < 1 or (equals and unit is None):
        raise ValueError(
            f"Expected `sparsities` within (0, 1), such as 0.5 or weights=0.5 (of {', '.join(get_args(Unit))}), got "
            f"{text!r}."
        )
    return unit, share


def board_settings(raw: Mapping[str, Any], overrides: Sequence[str] = ()) -> BoardSettings:
    """Settings of a board from plain values.

    Args:
        raw: as in a settings file.
        overrides: ``key.path=value``, the value in YAML; later ones win.

    Raises:
        UsageError: in one line, with the first of the problems.
    """
    values = dict(raw)
    for override in overrides:
        set_key(values, override)
    values["executor"], lines = section_of("executor", values.get("executor", {}), EXECUTORS, "local")
    return validated(BoardSettings, values, lines)


def workers_words(workers: int | None) -> list[str]:
    """Overrides for so many workers of a Ray; none for None."""
    return [] if workers is None else ["executor.kind=ray", f"executor.workers={workers}"]


def identity(settings: BoardSettings) -> dict[str, Any]:
    """Settings that the values of a cell depend on; the others may change when a board is continued."""
    free = (
        {*FREE, "contrast_text"} if settings.contrast_text is None else set(FREE)
    )  # as before there was one
    return settings.model_dump(mode="json", exclude=free)


def model_label(name: str) -> str:
    """A model, or a text, without the folders that it is in."""
    return Path(name).name or name
