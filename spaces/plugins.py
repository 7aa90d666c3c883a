"""Parts named by a path, ``module:name``, imported at first use."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any


@cache
def resolve(path: str) -> Any:
    """The object at ``module:name``; its module is imported at the first call.

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
