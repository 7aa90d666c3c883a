"""Cache of recently made values, up to a limit of bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Recent(Generic[T]):
    """Cache of the values used last: tensors, nested mappings of them, or objects with `nbytes`.

    Args:
        limit_bytes: of all values; the one used last is kept whatever its size.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._kept: OrderedDict[Hashable, T] = OrderedDict()
        self._n_bytes = 0

    def get(self, key: Hashable, make: Callable[[], T], *, first_to_go: bool = False) -> T:
        """The value under this key, made if it is missing.

        Args:
            first_to_go: evict it before all others, so that it is kept while there is room to spare.
        """
        if key not in self._kept:
            made = make()  # which may use the cache
            self.put(key, made, first_to_go=first_to_go)
            return made
        self._kept.move_to_end(key, last=not first_to_go)
        return self._kept[key]

    def put(self, key: Hashable, value: T, *, first_to_go: bool = False) -> None:
        """Keep a value under this key, in place of an older one."""
        self.take(key)
        self._kept[key] = value
        self._kept.move_to_end(key, last=not first_to_go)
        self._n_bytes += n_bytes(value)
        while self._n_bytes > self._limit and len(self._kept) > 1:
            self._n_bytes -= n_bytes(self._kept.popitem(last=False)[1])

    def clear(self) -> None:
        """Remove all values."""
        self._kept.clear()
        self._n_bytes = 0

    def take(self, key: Hashable) -> T | None:
        """Remove the value and return it; None if it is missing."""
        value = self._kept.pop(key, None)
        self._n_bytes -= n_bytes(value)
        return value


def n_bytes(value: Any) -> int:
    """Size of all tensors in nested mappings; other values count nothing."""
    if isinstance(value, Mapping):
        return sum(map(n_bytes, value.values()))
    return int(getattr(value, "nbytes", 0))
