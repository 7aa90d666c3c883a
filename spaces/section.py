"""Base class of the sections of the settings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticKnownError


class Section(BaseModel):
    """Frozen model without unknown keys, with numbers where numbers belong.

    `renamed` holds former names of keys, which are still accepted: ``{"old": "new"}``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    renamed: ClassVar[Mapping[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _check_raw(cls, raw: Any) -> Any:
        """Replace former names, and refuse true and false where a number belongs: they would count as 1 and 0."""
        if not isinstance(raw, dict):
            return raw
        for old, new in cls.renamed.items():
            if old in raw and new in raw:
                raise ValueError(f"Expected `{new}` or its former name `{old}`, got both. Remove `{old}`.")
        raw = {cls.renamed.get(name, name): value for name, value in raw.items()}
        for name, value in raw.items():
            field = cls.model_fields.get(name)
            known = field is None or bool in (field.annotation, *get_args(field.annotation))
            if isinstance(value, bool) and not known:
                raise ValueError(f"Expected `{name}` to be no switch, got {str(value).lower()}.")
        return raw


def one_of(
    names: Callable[[], Iterable[str]], also: Callable[[str], bool] = lambda name: False
) -> AfterValidator:
    """Validator of a text field: one of some names, which installed packages may add to, or any that `also` permits."""

    def check(value: str) -> str:
        known = list(names())
        if value not in known and not also(value):
            *others, last = map(repr, known)
            expected = f"{', '.join(others)} or {last}" if others else last
            raise PydanticKnownError("literal_error", {"expected": expected})
        return value

    return AfterValidator(check)
