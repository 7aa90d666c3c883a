"""Base class of the settings of a space, the section ``space``, and its key ``target``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, Field, model_validator

from secateur.spaces.section import Section


class SpaceSettings(Section):
    """Settings of one space, with `kind` and `targets`; spaces override the defaults below."""

    batch: ClassVar[int | None] = None
    """Default number of candidates a round; None: that of the executor."""

    changeable: ClassVar[tuple[str, ...]] = ("target", "statistics")
    """Keys that may change when a search is continued; `statistics` only affects exports, unless `fixed` says more."""

    @property
    def fixed(self) -> Mapping[str, Any]:
        """Values that measurements depend on although their keys are `changeable`."""
        return {}

    later: ClassVar[tuple[str, ...]] = ()
    """Keys that studies from before lack."""

    by_model: ClassVar[tuple[str, ...]] = ()
    """Keys that, left out, depend on the model and its device: settled when it is loaded, and kept by a run."""

    @property
    def no_identity(self) -> frozenset[str]:
        """Keys that are no part of a search's identity: changeable ones, and those of `later` at their defaults."""
        fields = type(self).model_fields
        unused = {key for key in self.later if getattr(self, key) == fields[key].default}
        return frozenset(self.changeable) | unused

    @property
    def by_gradients(self) -> bool:
        """True if a search starts with `trust_region` where its settings name no controller."""
        return False

    @property
    def stages_left(self) -> int:
        """Number of further stages, each around what the one before found, see `refined`."""
        return 0

    def refined(self, found: Mapping[str, float]) -> SpaceSettings:
        """Settings of the next stage, around the found share of each linear."""
        raise NotImplementedError(f"The space of {type(self).__name__} has no finer levels.")

    @property
    def cases(self) -> Sequence[Any]:
        """Further models, sparsities and patterns on which candidates are measured, see `at`."""
        return ()

    def at(self, case: Any) -> SpaceSettings:
        """Settings of one of `cases` alone; None: of the main case."""
        raise NotImplementedError

    @property
    def texts(self) -> Mapping[str, str]:
        """Calibration texts of candidates, by name; ``""``: the evaluator's calibration set."""
        return {}

    def located(self, locate: Callable[[str], str], locate_text: Callable[[str], str]) -> SpaceSettings:
        """Settings with the paths of files and of text sources as they are found."""
        return self

    @property
    def window_lengths(self) -> tuple[int, ...]:
        """Tokens of windows that candidates choose, beside those of the evaluator."""
        return ()

    @property
    def n_text_tokens(self) -> int:
        """Largest number of tokens of each text."""
        return 0

    @property
    def files(self) -> Mapping[str, Path]:
        """Files that measurements depend on, by purpose."""
        return {}

    @property
    def method_names(self) -> tuple[str, ...]:
        """Names of metrics, importances and further methods that candidates may have."""
        return ()

    @property
    def has_proxy(self) -> bool:
        """True if the space has a proxy for the loss."""
        return False

    @property
    def counts(self) -> str:
        """Cost that targets are shares of, if it is not the number of weights; else empty."""
        return ""

    @property
    def export_format(self) -> str:
        """Export format that candidates are restricted to; ``any``: none."""
        return "any"

    @property
    def export_statistics(self) -> str | None:
        """Default statistics of exports: ``sequential``, or those of the search: ``dense`` or ``expected``.

        None: only dense ones are possible.
        """
        return None


class Range(Section):
    """Targets ``low``, ``low + step``, ... up to ``high``, both ends included."""

    low: float
    high: float
    step: float = Field(default=0.05, gt=0)

    @model_validator(mode="after")
    def _check(self) -> Range:
        if not 0 <= self.low <= self.high <= 1:
            raise ValueError(
                f"Expected `target` with 0 <= `low` <= `high` <= 1, got low {self.low} and high {self.high}."
            )
        return self

    @property
    def values(self) -> tuple[float, ...]:
        low, high, step = (Fraction(str(x)) for x in (self.low, self.high, self.step))
        return tuple(float(low + i * step) for i in range(math.floor((high - low) / step) + 1))


def _checked(target: float | list[float] | Range) -> float | list[float] | Range:
    values = target if isinstance(target, list) else targets_of(target)
    if not values:
        raise ValueError("Expected `target` to hold at least one sparsity, got an empty list.")
    for value in values:
        if not 0 <= value <= 1:
            raise ValueError(f"Expected `target` within [0, 1], got {value}. It is the fraction to remove.")
    return target


Target = Annotated[float | list[float] | Range, AfterValidator(_checked)]


def targets_of(target: Target) -> tuple[float, ...]:
    """The targets in ascending order."""
    if isinstance(target, Range):
        return target.values
    return tuple(sorted(set(target))) if isinstance(target, list) else (target,)
