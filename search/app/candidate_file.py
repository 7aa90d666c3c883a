"""Candidate of a search as a file, in a form that fits other models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import Field, field_validator

from secateur.search.app.pruning_file import CALIBRATION, PruningFile, checked
from secateur.search.errors import UsageError
from secateur.spaces.names import nearest
from secateur.spaces.registry import SPACES
from secateur.spaces.section import Section
from secateur.spaces.space_settings import SpaceSettings

if TYPE_CHECKING:
    from secateur.pruners.models.anatomy import Anatomy
    from secateur.pruners.pruner import Pruner


class CalibrationData(Section):
    """Calibration data of a candidate.

    Args:
        text: source of the text.
        tokens: tokens in all.
        window: tokens of a window.
        contrast: source of a second text, for a method over two; None: there is none.
    """

    text: str = CALIBRATION
    tokens: int = Field(gt=0)
    window: int = Field(gt=1)
    contrast: str | None = Field(default=None, min_length=1)


class CandidateFile(PruningFile):
    """A candidate of any other space, in a form that fits other models: units by relative depth and role.

    A candidate ``{uniform: 0.3}`` is the uniform one of that target, in a space of architectures.

    Args:
        space: settings of the space, with its `kind`.
        candidate: form of the candidate, see `Space.portable`.
        calibration: data that its statistics are collected on.
    """

    space: dict[str, Any]
    candidate: dict[str, Any]
    calibration: CalibrationData

    @field_validator("space")
    @classmethod
    def _check_space(cls, raw: dict[str, Any]) -> dict[str, Any]:
        kind = raw.get("kind")
        if not isinstance(kind, str) or kind not in SPACES:
            raise ValueError(f"Expected `kind` of a space, got {kind!r}.{nearest(str(kind), SPACES)}")
        return SPACES[kind].settings.model_validate(raw).model_dump(mode="json")

    @property
    def settings(self) -> SpaceSettings:
        return SPACES[self.space["kind"]].settings.model_validate(self.space)

    @property
    def form(self) -> Mapping[str, Any]:
        return self.candidate

    @property
    def text(self) -> str:
        return f"{self.space['kind']}: {json.dumps(self.candidate, sort_keys=True)}"

    @property
    def calibration_text(self) -> str:
        return self.calibration.text

    @property
    def calibration_windows(self) -> tuple[int, int]:
        return self.calibration.tokens, self.calibration.window

    @property
    def contrast_text(self) -> str | None:
        return self.calibration.contrast

    @property
    def sequential(self) -> bool:
        return self.settings.export_statistics == "sequential"

    def with_sparsity(self, sparsity: float) -> CandidateFile:
        if "uniform" in self.candidate:
            return checked(CandidateFile, self.model_dump() | {"candidate": {"uniform": sparsity}})
        if "blocks" in self.candidate:
            raise UsageError(
                "Expected no `--sparsity` with a file whose blocks have their own shares, got "
                f"{sparsity}. Search at this sparsity, or prune by a recipe."
            )
        return checked(CandidateFile, self.model_dump() | {"space": {**self.space, "target": sparsity}})

    def check(self) -> None:
        self._pruner.check_settings(self.settings)

    def check_model(self, anatomy: Anatomy) -> None:
        self._pruner.check_model(self.settings, anatomy)

    @property
    def _pruner(self) -> type[Pruner]:
        from secateur.pruners.pruner import pruner_class

        return pruner_class(self.settings)
