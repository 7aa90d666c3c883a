"""The checker of types while tests run: beartype, which sees a function inside another one once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from beartype import beartype

_inner: dict[object, Callable[..., Any]] = {}


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its annotations checked at every call.

    Jaxtyping hands over one that only takes the arguments. Where the real one is made anew at every call of another,
    those are alike but for their annotations' text, and compiling a check of them takes longer than most tests.
    """
    if "<locals>" not in function.__qualname__:
        return beartype(function)
    hints = tuple((name, repr(hint)) for name, hint in function.__annotations__.items())
    key = (function.__module__, function.__qualname__, function.__code__.co_varnames, hints)
    if key not in _inner:
        _inner[key] = beartype(function)
    return _inner[key]
