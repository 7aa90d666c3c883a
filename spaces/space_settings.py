"""Settings of a space: the section ``space`` of the settings, and what everybody asks of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from secateur.spaces.section import Section


class SpaceSettings(Section):
    """Settings of one space; a space overrides what applies to it. Each has `kind` and `targets`."""

    batch: ClassVar[int | None] = None
    """Candidates a round where the executor's section names none; None: the executor's default."""

    changeable: ClassVar[tuple[str, ...]] = ("target", "statistics")
    """Keys that may change when a search is continued; the latter is for exports."""

    @property
    def cases(self) -> Sequence[Any]:
        """Further models, sparsities and patterns that each candidate is measured at; see `at`."""
        return ()

    def at(self, case: Any) -> SpaceSettings:
        """The settings of one of `cases` alone; None: of the main one."""
        raise NotImplementedError

    @property
    def texts(self) -> Mapping[str, str]:
        """Sources of text that candidates calibrate on, by name; ``""``: the evaluator's calibration set."""
        return {}

    @property
    def n_text_tokens(self) -> int:
        """Tokens of each of `texts`, at most."""
        return 0

    @property
    def files(self) -> Mapping[str, Path]:
        """Files that measurements depend on, by what they are."""
        return {}

    @property
    def has_proxy(self) -> bool:
        """Whether losses can be foretold without a forward pass."""
        return False

    @property
    def counts(self) -> str:
        """The cost that targets are shares of, where it is another than weights."""
        return ""

    @property
    def export_format(self) -> str:
        """Format that candidates were restricted to; ``any``: none."""
        return "any"

    @property
    def export_statistics(self) -> str | None:
        """Statistics of an export, ``sequential`` or ``dense``; None: dense alone."""
        return None
