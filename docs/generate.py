"""Pages of the reference that are written from the code: commands, settings, the Python interface.

The site's configuration calls `write`; the pages are built, not kept.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, get_args

import typer
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from secateur.search import cli
from secateur.search.board.settings import BoardSettings
from secateur.search.controllers.registry import CONTROLLERS
from secateur.search.executors.registry import EXECUTORS
from secateur.search.settings.settings import Settings
from secateur.spaces.registry import SPACES

KINDS: dict[str, Mapping[str, Any]] = {"space": SPACES, "controller": CONTROLLERS, "executor": EXECUTORS}
_SECTION = re.compile(r"^(Args|Returns|Raises|Attributes|Yields):$", re.MULTILINE)


def write(directory: Path) -> None:
    """Write the pages into a directory."""
    pages = {"options.md": commands(), "keys.md": settings(), "functions.md": python()}
    for name, lines in pages.items():
        text = "\n".join(lines) + "\n"
        path = directory / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


# --- commands ---


def command_line() -> Any:
    """The command line as an object."""
    return typer.main.get_command(cli._app())


def commands() -> Iterator[str]:
    """Page of all commands with their arguments and options."""
    yield "# Options of all commands\n"
    yield "Written from the program. `secateur COMMAND --help` shows the same. Results go to stdout, progress and"
    yield "errors to stderr; `--json` gives one document for programs. [Commands](commands.md) has the exit statuses.\n"
    for name, command in command_line().commands.items():
        context = typer.Context(command, info_name=f"secateur {name}")
        yield f"## {name}\n"
        yield "```text\n" + command.get_usage(context).removeprefix("Usage: ") + "\n```\n"
        yield f"{escaped(command.help or '')}\n"
        yield "| argument or option | | default |\n|---|---|---|"
        for parameter in command.params:
            yield _parameter(parameter)
        yield ""


def _parameter(parameter: Any) -> str:
    default, is_option = parameter.default, parameter.param_type_name == "option"
    shown = "" if default in (None, False, ()) or callable(default) or default is ... else f"`{default}`"
    metavar = (parameter.metavar or "") if is_option else parameter.metavar or parameter.name.upper()
    names = f"{', '.join(parameter.opts)} {metavar}".strip() if is_option else metavar
    return f"| `{cell(names)}` | {cell(parameter.help or '')} | {shown} |"


# --- settings ---


def settings() -> Iterator[str]:
    """Page of all keys of the settings."""
    yield "# Keys of the settings\n"
    yield "Written from the code that reads them. Every key has a default; `-o KEY.PATH=VALUE` overrides one; an"
    yield "unknown key is an error that names the nearest known one. `settings.yaml` of a run has all keys.\n"
    yield from _section("", Settings, skip=tuple(KINDS))
    for section, rows in KINDS.items():
        for kind, row in rows.items():
            yield from _section(f"{section}: {{kind: {kind}}}", row.settings)
    yield from _section("bench", BoardSettings)


def _section(title: str, model: type[BaseModel], skip: tuple[str, ...] = (), path: str = "") -> Iterator[str]:
    """Table of a section's keys, then those of the sections in it."""
    intro, described = parts_of(model)
    yield f"## {'`' + title + '`' if title else 'Top level'}\n"
    if title:
        yield f"{escaped(intro)}\n"
    yield "| key | values | default | |\n|---|---|---|---|"
    nested: list[tuple[str, type[BaseModel]]] = []
    for name, field in model.model_fields.items():
        if name == "kind" or name in skip:
            continue
        inner = next((m for m in _models(field.annotation)), None)
        if inner is not None:
            nested.append((name, inner))
        kind, text = cell(_kind(field.annotation)), cell(described.get(name, ""))
        yield f"| `{name}` | {kind} | {cell(_default(field))} | {text} |"
    yield ""
    for name, inner in nested:
        below = f"{path or title}.{name}" if title else name
        if below.count(".") < 3 and inner is not model:
            yield from _section(below, inner, path=below)


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    for part in (annotation, *get_args(annotation)):
        if inspect.isclass(part) and issubclass(part, BaseModel):
            yield part


def _kind(annotation: Any) -> str:
    text = (
        annotation.__name__ if inspect.isclass(annotation) and not get_args(annotation) else str(annotation)
    )
    text = re.sub(r"\b(?:[a-z_]+\.)+(?=[A-Za-z_])", "", text)
    text = re.sub(r"Literal\[([^\]]*)\]", r"\1", text)
    text = re.sub(r"Annotated\[(.*?), .*\]", r"\1", text)
    text = text.replace("NoneType", "null").replace("None", "null")
    return f"`{text}`" if len(text) < 90 else "see the description"


def _default(field: Any) -> str:
    value = field.get_default(call_default_factory=False)
    if value is PydanticUndefined or value is None or isinstance(value, BaseModel):
        return (
            "see below" if isinstance(value, BaseModel) else ("" if value is PydanticUndefined else "`null`")
        )
    text = (
        str(list(value) if isinstance(value, tuple) else value)
        .replace("True", "true")
        .replace("False", "false")
    )
    return f"`{text}`" if len(text) < 60 else "see the code"


def parts_of(documented: Any) -> tuple[str, dict[str, str]]:
    """First paragraphs of a docstring, and the descriptions of its `Args` by name, base classes' included."""
    intro, described = "", dict[str, str]()
    bases = reversed(inspect.getmro(documented)) if inspect.isclass(documented) else [documented]
    for base in bases:
        text = inspect.cleandoc(base.__doc__ or "") if base.__doc__ else ""
        if not text or base in (object, BaseModel):
            continue
        pieces = _SECTION.split(text)
        intro = pieces[0].strip()
        for name, body in zip(pieces[1::2], pieces[2::2], strict=True):
            if name in ("Args", "Attributes"):
                described |= _described(body)
    return intro, described


def _described(body: str) -> dict[str, str]:
    """Descriptions by name; one entry may name several."""
    found: dict[str, str] = {}
    lines = [line for line in body.splitlines() if line.strip()]
    least = min((len(line) - len(line.lstrip()) for line in lines), default=0)
    names: list[str] = []
    for line in lines:
        start = re.match(r"([\w, ]+): (.*)", line[least:]) if not line[least:].startswith(" ") else None
        if start is not None:
            names = [name.strip() for name in start[1].split(",")]
            found |= dict.fromkeys(names, start[2])
        elif names:
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
    return found


# --- Python ---


def python() -> Iterator[str]:
    """Page of the functions and classes for people who import the library."""
    module = import_module("secateur.search.app")
    try:
        whole = import_module("secateur")
        module = whole if getattr(whole, "__all__", None) else module
    except ImportError:
        pass
    yield "# Functions and classes\n"
    yield f"Written from the docstrings of `{module.__name__}`.\n"
    for name in module.__all__:
        found = getattr(module, name)
        if inspect.ismodule(found):  # `secateur.search` is a room, too
            found = getattr(import_module("secateur.api"), name)
        if callable(found):
            yield f"## {name}\n"
            yield from _callable(f"{module.__name__}.{name}", found)
        if inspect.isclass(found):
            for key, method in vars(found).items():
                if inspect.isfunction(method) and not key.startswith("_"):
                    yield f"### {name}.{key}\n"
                    yield from _callable(f"{name}.{key}", method)


def _callable(name: str, found: Any) -> Iterator[str]:
    try:
        signature = re.sub(r"'([^']*)'", r"\1", str(inspect.signature(found)))
        signature = re.sub(r"<(?:function|class|object) '?([\w.]+)[^>]*>", r"\1", signature)
    except ValueError:
        signature = "(...)"
    yield f"```text\n{name}{signature}\n```\n"
    text = inspect.cleandoc(found.__doc__ or "")
    pieces = _SECTION.split(text)
    yield f"{escaped(pieces[0].strip())}\n"
    for title, body in zip(pieces[1::2], pieces[2::2], strict=True):
        yield f"*{title}*\n"
        if title in ("Args", "Attributes", "Raises"):
            yield from (f"- `{key}`: {escaped(value)}" for key, value in _described(body).items())
        else:
            yield escaped(" ".join(body.split()))
        yield ""


def escaped(text: str) -> str:
    """Text of a docstring as Markdown: its double backticks mark code, and angle brackets are no markup."""
    text = text.replace("``", "`")
    return re.sub(r"(`[^`]*`)|([<>*_\[\]])", lambda m: m[1] or "\\" + m[2], text)


def cell(text: str) -> str:
    """Text in a cell of a table."""
    text = " ".join(escaped(text).split())
    return text.replace("|", "\\|")
