"""Errors in settings, one line each."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from secateur.search.errors import UsageError
from secateur.search.mirror.address import readable
from secateur.spaces.names import nearest

_COMMA = " YAML reads 0,5 as text, and as two values within braces or brackets: write 0.5."


Found = TypeVar("Found", bound=BaseModel)


def problems(error: ValidationError, model: type[BaseModel], prefix: Sequence[str] = ()) -> list[str]:
    """One line for each key at fault of a model at a path (`prefix`) of the settings, in the model's order."""
    by_path: dict[str, list[tuple[ErrorDetails, _Place]]] = {}
    for detail in error.errors(include_url=False):
        place = _locate(model, detail["loc"], prefix)
        by_path.setdefault(place.path, []).append((detail, place))
    deepest = [path for path in by_path if not any(other.startswith(path + ".") for other in by_path)]
    return [_line(by_path[path]) for path in deepest]


def validated(model: type[Found], values: Mapping[str, Any], before: Sequence[str] = ()) -> Found:
    """Settings of a pydantic model.

    Args:
        model: of the settings.
        values: by key.
        before: problems that were found before, a line each.

    Raises:
        UsageError: in one line, with the first of the problems.
    """
    lines, found = list(before), None
    try:
        found = model.model_validate(values)
    except ValidationError as error:
        lines += problems(error, model)
    if found is None or lines:
        more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
        raise UsageError(lines[0] + more)
    return found


@dataclass(frozen=True)
class _Place:
    """Place of a key: its path, and the model of its section (for a whole section: its own)."""

    holder: type[BaseModel]
    section: str
    path: str


def _locate(root: type[BaseModel], loc: Sequence[int | str], prefix: Sequence[str]) -> _Place:
    """Place of a key, without pydantic's marks for members of unions."""
    holder, section, path = root, list(prefix), list(prefix)
    keys = [str(key) for key in loc]
    while keys:
        path.append(keys.pop(0))
        field = holder.model_fields.get(path[-1])
        if field is None:
            break
        models = {model.__name__: model for model in _models(field.annotation)}
        members = [x for x in get_args(field.annotation) if x not in (NoneType, ...)] or [field.annotation]
        if members == list(models.values()):  # a section, perhaps one that may be left out, or several
            holder = members[0]
            path += [keys.pop(0)] if keys and keys[0].isdecimal() else []
        elif member := next(
            (m for name, m in models.items() if keys and re.search(rf"\b{name}\b", keys[0])), None
        ):
            holder = member
            keys.pop(0)
        else:
            path += [key for key in keys[:2] if key.isdecimal()]  # an index, perhaps after a mark
            break
        section = list(path)
    return _Place(holder, ".".join(section), ".".join(path))


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for member in get_args(annotation):
        yield from _models(member)


def _line(found: Sequence[tuple[ErrorDetails, _Place]]) -> str:
    """Line for one key's errors; a value may break the rule of each member of a union."""
    for detail, place in found:
        if detail["type"] == "value_error":  # our own message
            return _with_section(readable(detail["msg"].removeprefix("Value error, "), 600), place)
        if detail["type"] == "extra_forbidden":
            key = readable(repr(place.path.rpartition(".")[2]))
            section = f"`{place.section}`" if place.section else "the settings"
            return f"Expected a known key in {section}, got {key}.{nearest(key[1:-1], place.holder.model_fields)}"
    detail, place = found[0]
    if detail["type"] == "missing":
        return f"Expected `{place.path}`, got nothing."
    if detail["type"] == "invalid_key":
        section = f"`{place.section}`" if place.section else "the settings"
        given = readable(repr(detail["input"]))
        return f"Expected names as keys in {section}, got {given}.{_COMMA}"
    rules = dict.fromkeys(_rule(detail["msg"]) for detail, _ in found)
    given = readable(repr(detail["input"]))
    comma = _COMMA if re.fullmatch(r"'\d+,\d+'", given) else ""
    return f"Expected `{place.path}` to {' or '.join(rules).replace(' or be ', ' or ')}, got {given}.{comma}"


def _rule(message: str) -> str:
    """Pydantic's "Input should be greater than 0, unable ..." as "be greater than 0"."""
    rule = re.sub(r"^\w+ should ", "", message)
    rule = re.split(r", unable| after validation|, got ", rule)[0]
    rule = re.sub(r"\ba valid (tuple|list)", "a list", rule)
    return re.sub(r"\ba valid dictionary.*", "a mapping", rule)


def _with_section(message: str, place: _Place) -> str:
    """Message with the full path of the key that it names first."""
    name = re.search(r"`(\w+)`", message)
    if name is None or not place.section:
        return message
    if name[1] in place.holder.model_fields:
        return message.replace(name[0], f"`{place.section}.{name[1]}`", 1)
    return message.replace(name[0], f"`{place.path}`", 1) if place.path.endswith("." + name[1]) else message
