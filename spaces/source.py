"""Hash of a function's source and of what it uses in its module, for the identity of what was computed by it."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache
from types import ModuleType
from typing import Any

PLAIN = (int, float, complex, str, bytes, bool, type(None))


@cache
def source_sha256(found: Any) -> str:
    """Hash of a function, a class or a plain value, and of the names of its module that it uses, however far.

    Comments, docstrings, annotations and layout do not count. Of what comes from other modules the name alone counts:
    another version of a package is named in a run's record.

    Args:
        found: hashable.
    """
    parts: dict[str, str] = {}
    _collect("", found, parts)
    return hashlib.sha256("\n".join(f"{key}: {parts[key]}" for key in sorted(parts)).encode()).hexdigest()


def _collect(name: str, value: Any, parts: dict[str, str], home: str | None = None) -> None:
    """Add the text of a value, and those of what it uses in the module `home`, by name; None: the value's own."""
    if name in parts:
        return
    value = inspect.unwrap(value) if callable(value) else value
    if isinstance(value, ModuleType):
        parts[name] = f"module {value.__name__}"
        return
    is_code = inspect.isfunction(value) or inspect.isclass(value)
    if not is_code:
        parts[name] = _plain(value)
        return
    module = value.__module__
    home = module if home is None else home
    if module != home:
        parts[name] = f"{module}:{value.__qualname__}"
        return
    tree = _tree(value)
    parts[name] = repr(value.__code__.co_code) if tree is None and inspect.isfunction(value) else ""
    if tree is None:
        return
    parts[name] = ast.unparse(tree)
    for used, held in _used(value, tree):
        _collect(used, held, parts, home)


def _tree(value: Any) -> ast.AST | None:
    """Syntax tree of the source, without docstrings and annotations; None where there is no source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(value)))
    except (OSError, TypeError, SyntaxError):  # made at run time, or a lambda within a longer statement
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            node.annotation = None
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.returns = None
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            has_text = ast.get_docstring(node, clean=False) is not None
            node.body = (node.body[1:] if has_text else node.body) or [ast.Pass()]
    return tree


def _used(value: Any, tree: ast.AST) -> Iterator[tuple[str, Any]]:
    """Names that the source uses, with what they stand for now: of the module, or of an enclosing function."""
    outer: dict[str, Any] = {}
    if inspect.isfunction(value):
        outer = value.__globals__ | dict(inspect.getclosurevars(value).nonlocals)
    elif (module := inspect.getmodule(value)) is not None:
        outer = vars(module)
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    yield from ((name, outer[name]) for name in sorted(names) if name in outer)


def _plain(value: Any) -> str:
    """Text of a value that is the same in every process: plain values and their containers; of others the type."""
    if isinstance(value, PLAIN):
        return repr(value)
    if isinstance(value, tuple | list):
        return f"{type(value).__name__}({', '.join(map(_plain, value))})"
    if isinstance(value, dict):
        return f"dict({', '.join(sorted(f'{_plain(k)}: {_plain(v)}' for k, v in value.items()))})"
    if isinstance(value, set | frozenset):
        return f"set({', '.join(sorted(map(_plain, value)))})"
    fields = dataclasses.fields(value) if dataclasses.is_dataclass(value) else ()
    held = ", ".join(f"{field.name}={_plain(getattr(value, field.name))}" for field in fields)
    return f"{type(value).__module__}.{type(value).__qualname__}({held})"
