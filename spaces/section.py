"""What all sections of the settings have in common."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator


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
