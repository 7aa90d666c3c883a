"""Registries of built-in rows and of plug-ins, which installed packages add by entry points."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

GROUPS = tuple(f"secateur.{name}" for name in ("methods", "spaces", "controllers", "executors", "formats"))
"""Groups of entry points."""


@cache
def resolve(path: str) -> Any:
    """Object at ``module:name``; its module is imported at the first call.

    Raises:
        ValueError: if the path has another form, or there is no such object.
        ImportError: if the module can't be imported.
    """
    module, _, name = path.partition(":")
    if not module or not name:
        raise ValueError(f"Expected a path `module:name`, got {path!r}.")
    found: Any = import_module(module)
    for part in name.split("."):
        if not hasattr(found, part):
            raise ValueError(f"Expected `{name}` in the module {module}, got none at {path!r}.")
        found = getattr(found, part)
    return found


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of a registry.

    Args:
        origin: distribution and version of a plug-in, such as ``my-metric 0.1``; empty for built-in rows.
    """

    origin: str = ""

    def keys(self, name: str) -> tuple[str, ...]:
        """Keys of the row in the registry; `name` is that of its entry point."""
        return (name,)

    def check_beside(self, others: Mapping[str, Any]) -> None:
        """Raise a ValueError if the row conflicts with existing ones."""


R = TypeVar("R", bound=Row)
_left_out: list[str] = []


def left_out() -> tuple[str, ...]:
    """A line for each entry point that was left out, of the registries that were read so far."""
    return tuple(_left_out)


class Registry(Mapping[str, R], Generic[R]):
    """Rows by name: the built-in ones, then plug-ins by the names of their entry points, read at first use.

    An entry point names a row, or a function without arguments that returns one. A broken one is skipped, with a line
    in `problems`.

    Args:
        group: of the entry points.
        kind: class of the rows.
        ours: built-in rows.
    """

    def __init__(self, group: str, kind: type[R], ours: Mapping[str, R]) -> None:
        self.group, self._kind, self._ours = group, kind, ours

    def __getitem__(self, name: str) -> R:
        return self._read[0][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._read[0])

    def __len__(self) -> int:
        return len(self._read[0])

    @property
    def problems(self) -> tuple[str, ...]:
        """One line for each skipped entry point."""
        return self._read[1]

    @cached_property
    def _read(self) -> tuple[dict[str, R], tuple[str, ...]]:
        rows, problems = dict(self._ours), []
        for point in points(self.group):
            try:
                row = self._row(point)
                keys = row.keys(point.name)
                taken = [key for key in keys if key in rows]
                if taken:
                    raise ValueError(f"Expected a new name, got {taken[0]!r}. Rename it.")
                row.check_beside(rows)
            except (Exception, SystemExit) as error:  # noqa: BLE001  # other people's modules may raise anything
                why = " ".join(str(error).split()) or "no reason given"
                problems.append(
                    f"Left out {point.name!r} of {self.group} [at {origin_of(point)}]: {type(error).__name__}: {why}"
                )
            else:
                rows |= dict.fromkeys(keys, row)
        _left_out.extend(problems)
        return rows, tuple(problems)

    def _row(self, point: EntryPoint) -> R:
        found = point.load()
        if not isinstance(found, Row) and callable(found):
            found = found()
        if not isinstance(found, self._kind):
            raise TypeError(
                f"Expected `{point.value}` to be a {self._kind.__name__} or to return one, got "
                f"{type(found).__name__}."
            )
        return replace(found, origin=origin_of(point))


def points(group: str) -> list[EntryPoint]:
    """Entry points of a group, sorted by name."""
    return sorted(entry_points(group=group), key=lambda point: (point.name, point.value))


def origin_of(point: EntryPoint) -> str:
    """Distribution and version of an entry point."""
    return f"{point.dist.name} {point.dist.version}" if point.dist else point.value
