"""What all sections of the settings have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from pydantic import AfterValidator, BaseModel, ConfigDict, model_validator
from pydantic_core import PydanticKnownError


class Section(BaseModel):
    """Frozen, without unknown keys, and with numbers where numbers belong."""

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


def one_of(names: Callable[[], Iterable[str]]) -> AfterValidator:
    """Of a field of text: one of some names, which installed packages may add to."""

    def check(value: str) -> str:
        known = list(names())
        if value not in known:
            *others, last = map(repr, known)
            expected = f"{', '.join(others)} or {last}" if others else last
            raise PydanticKnownError("literal_error", {"expected": expected})
        return value

    return AfterValidator(check)
