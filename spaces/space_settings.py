"""Base class of the settings of a space, the section ``space``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from secateur.spaces.section import Section


class SpaceSettings(Section):
    """Settings of one space, with `kind` and `targets`; spaces override the defaults below."""

    batch: ClassVar[int | None] = None
    """Default number of candidates a round; None: that of the executor."""

    changeable: ClassVar[tuple[str, ...]] = ("target", "statistics")
    """Keys that may change when a search is continued; `statistics` only affects exports."""

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

    @property
    def n_text_tokens(self) -> int:
        """Largest number of tokens of each text."""
        return 0

    @property
    def files(self) -> Mapping[str, Path]:
        """Files that measurements depend on, by purpose."""
        return {}

    @property
    def has_proxy(self) -> bool:
        """Whether the space has a proxy for the loss."""
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
        """Default statistics of exports, ``sequential`` or ``dense``; None: only dense ones are possible."""
        return None
