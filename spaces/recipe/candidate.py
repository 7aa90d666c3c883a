"""Candidates of the space `recipe`: all settings of a pruning run in one line of text."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from secateur.spaces.recipe.form import completed

DENSE = "dense"
_HEADS = {
    "calibration": "sources",
    "metric": "name",
    "allocation": "rule",
    "schedule": "step",
    "repair": "",
}
"""First key of each section in the text, whose name is omitted; a schedule may be without it."""
_NUMBER = re.compile(r"-?\d{1,18}(\.\d{1,18})?(e-?\d{1,3})?", re.ASCII)


@dataclass(frozen=True)
class Recipe:
    """A recipe, or the dense model, by its text; made by `Recipe.of` or `Recipe.parse`.

    The text lists the sections in order, with their applicable parameters: ``recipe: structure 0.2 |
    calibration docs:1; samples=32; length=128; choose=random; subset=3 | metric wanda_sp | allocation uniform |
    repair bias``.
    """

    text: str

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Recipe:
        """Recipe of a plain form; missing keys have the defaults of `form.completed`.

        Raises:
            ValueError: if the form is invalid.
        """
        whole = completed(plain)
        sections = [f"recipe: {whole['unit']} {_text(whole['sparsity'])}"]
        for section, head in _HEADS.items():
            if section in whole:
                held = whole[section] if head else {"": whole[section]}
                first = [_text(held[head])] if head in held else []
                more = [f"{key}={_text(value)}" for key, value in held.items() if key != head]
                sections.append(f"{section} {'; '.join([*first, *more])}")
        return cls(" | ".join(sections))

    @classmethod
    def parse(cls, text: str) -> Recipe:
        """Recipe, or the dense model, of a canonical text.

        Raises:
            ValueError: if it is not the text of a recipe.
        """
        if text == DENSE:
            return cls(DENSE)
        plain = _read(text)
        recipe = None if plain is None else cls.of(plain)
        if recipe is None or recipe.text != text:
            raise ValueError(
                f"Expected a recipe such as 'recipe: structure 0.2 | calibration docs:1; samples=32 | ...', got "
                f"{text[:80]!r}."
            )
        return recipe

    @property
    def is_dense(self) -> bool:
        return self.text == DENSE

    @property
    def plain(self) -> dict[str, Any]:
        """Plain form, a new mapping each time.

        Raises:
            ValueError: for the dense model, which has none.
        """
        plain = _read(self.text)
        if plain is None:
            raise ValueError(f"Expected a recipe, got {self.text!r}, which has no plain form.")
        return plain

    @cached_property
    def sparsity(self) -> float:
        return 0.0 if self.is_dense else float(self.plain["sparsity"])


def _read(text: str) -> dict[str, Any] | None:
    """Unchecked plain form of a text; None if it has another format."""
    first, *sections = text.split(" | ")
    start = re.fullmatch(r"recipe: (\w+) (\S+)", first, re.ASCII)
    if start is None or not _NUMBER.fullmatch(start[2]):
        return None
    plain: dict[str, Any] = {"unit": start[1], "sparsity": _value(start[2])}
    for section in sections:
        name, _, body = section.partition(" ")
        head, *others = body.split("; ")
        if name == "schedule" and "=" in head:
            head, others = "", [head, *others]
        pairs = [other.partition("=") for other in others]
        if name not in _HEADS or name in plain or not all(sign for _, sign, _ in pairs):
            return None
        if len({key for key, _, _ in pairs}) < len(pairs):
            return None
        read = {key: value for key, _, value in pairs}
        if head or name != "schedule":
            read = {_HEADS[name]: head} | read
        held = {key: _READERS.get(key, _value)(value) for key, value in read.items()}
        plain[name] = held if _HEADS[name] else held[""]
        if not _HEADS[name] and len(held) > 1:
            return None
    return plain


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ",".join(f"{key}:{_text(held)}" for key, held in value.items())
    if isinstance(value, list | tuple):
        return ",".join(_text(held) for held in value)
    return value if isinstance(value, str) else f"{value:.10g}"


def _value(text: str) -> int | float | str:
    if not _NUMBER.fullmatch(text):
        return text
    value = float(text)
    return int(value) if value.is_integer() else value


def _list(text: str) -> list[Any]:
    return [_value(held) for held in text.split(",")]


def _mapping(text: str) -> dict[str, Any]:
    pairs = [held.rpartition(":") for held in text.split(",")]
    return {key: _value(value) for key, _, value in pairs}


_READERS: dict[str, Callable[[str], Any]] = {
    "name": str,
    "rule": str,
    "sources": _mapping,
    "weights": _mapping,
    "quantiles": _list,
    "clusters": _list,
}
"""Parsers of values other than single numbers and names of options."""
