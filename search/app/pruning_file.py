"""One way to prune as a file: what recipes and candidates of searches have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import Field, ValidationError

from secateur.search.errors import UsageError
from secateur.search.settings.problems import problems
from secateur.spaces.section import Section

if TYPE_CHECKING:
    from secateur.pruners.models.anatomy import Anatomy

CALIBRATION = "docs"
"""The text that a known recipe calibrates on, unless another is named."""


class PruningFile(Section, ABC):
    """One way to prune, as a file that a person reads, edits and runs on any model that it fits.

    Args:
        seed: of whatever is drawn: calibration windows, clusters, the noise of methods that have some.
        moe_all_experts: statistics of routed experts are of all calibration tokens.
    """

    seed: int = Field(default=0, ge=0)
    moe_all_experts: bool = False

    @property
    @abstractmethod
    def settings(self) -> Any:
        """Settings of its pruner."""

    @property
    @abstractmethod
    def form(self) -> Mapping[str, Any]:
        """Form that `Pruner.fitted` turns into the configuration of a model."""

    @property
    @abstractmethod
    def text(self) -> str:
        """One line that identifies it."""

    @property
    @abstractmethod
    def calibration_text(self) -> str:
        """Source of the calibration text."""

    @property
    def calibration_windows(self) -> tuple[int, int] | None:
        """Tokens in all and of a window; None where the form chooses its own windows."""
        return None

    @property
    def calibrated_on(self) -> tuple[int, int]:
        """Calibration tokens in all and of a window, whoever chooses the windows."""
        if self.calibration_windows is not None:
            return self.calibration_windows
        chosen = self.form["calibration"]
        return chosen["samples"] * chosen["length"], chosen["length"]

    @property
    def window_lengths(self) -> tuple[int, ...]:
        """Tokens of its calibration windows."""
        if self.calibration_windows is not None:
            return self.calibration_windows[1:]
        chosen = self.form.get("calibration")
        return (chosen["length"],) if isinstance(chosen, Mapping) and "length" in chosen else ()

    @property
    def texts(self) -> Mapping[str, str]:
        """Sources that the form chooses calibration windows from, by name."""
        return {}

    @property
    def contrast_text(self) -> str | None:
        """Source of a second calibration text, where the form does not choose its windows; None: there is none."""
        return None

    @property
    def sequential(self) -> bool:
        """True if statistics of a block come from already pruned blocks."""
        return False

    @property
    def is_smaller(self) -> bool:
        """True if it removes structure."""
        from secateur.pruners.pruner import pruner_class

        return pruner_class(self.settings).is_smaller(self.settings)

    @abstractmethod
    def with_sparsity(self, sparsity: float) -> PruningFile:
        """The same at another sparsity.

        Raises:
            UsageError: if it is out of range, or fixed.
        """

    @abstractmethod
    def check(self) -> None:
        """Raise a ValueError for what fits no model; called before one is loaded."""

    def check_form(self, form: str | None) -> None:
        """Raise a ValueError for an export format that it can't be saved in; called before a model is loaded."""
        from secateur.pruners.pruner import pruner_class

        formats = pruner_class(self.settings).formats(self.settings)
        if form not in (None, "any", *formats):
            raise UsageError(
                f"Expected a format out of {', '.join(formats)}, got {form!r}. See `secateur list formats`."
            )

    @abstractmethod
    def check_model(self, anatomy: Anatomy) -> None:
        """Raise a ValueError for what does not fit this model."""


File = TypeVar("File", bound=PruningFile)


def checked(kind: type[File], raw: Mapping[str, Any]) -> File:
    """The file with this content.

    Raises:
        UsageError: in one line, with the first of the problems.
    """
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        raise UsageError(problems(error, kind)[0]) from error
