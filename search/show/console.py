"""Console of the commands: results on stdout, progress and one line per error on stderr, exit statuses."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import typer

from secateur.search.errors import (
    DISK_FULL,
    DONE,
    FAILED,
    INTERRUPTED,
    NO_ROOM,
    WRONG_USE,
    UsageError,
    ran_out_of_memory,
)
from secateur.search.mirror.address import masked
from secateur.spaces.limited_text import cut, without_controls
from secateur.spaces.plugins import left_out

if TYPE_CHECKING:
    from secateur.search.settings.settings import Settings
    from secateur.search.show.display import Display

LONGEST = 1400  # characters of a line
MEMORY = "`secateur plan` shows what takes it; a smaller window or `--stream always` takes less."
# Base class of typer's own errors: click's or a copy of it, depending on typer's version.
_TyperError = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


def run_command(command: Callable[[], None]) -> int:
    """Run a command and return its exit status, whatever it raises.

    Tracebacks are printed only if ``SECATEUR_DEBUG`` is set; those of unexpected errors otherwise go to a file. A
    closed pipe, as in ``| head``, is no error.
    """
    try:
        command()
        sys.stdout.flush()
    except typer.Exit as ending:
        return ending.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more
        return DONE
    except KeyboardInterrupt:
        complain("Interrupted. What was measured is safe; the same command continues.")
        return INTERRUPTED
    except Exception as error:  # noqa: BLE001  # every error becomes one line
        return _failed(error)
    return DONE


def _failed(error: Exception) -> int:
    """Print an error in one line and return its exit status."""
    if os.environ.get("SECATEUR_DEBUG"):
        traceback.print_exception(error)
    if isinstance(error, _TyperError):
        complain(f"{error.format_message()} See `secateur --help`, or `--help` of the command.")  # type: ignore[attr-defined]
        return WRONG_USE
    if _is_wrong_use(error) or type(error).__module__.startswith("secateur."):  # written for users
        complain(str(error))
        for line in left_out():  # the reason that a name is unknown
            complain(line, "warning")
    elif isinstance(error, OSError):
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        complain(f"Expected to read and write files, got: {what}.")
    elif ran_out_of_memory(error):
        said = str(error).partition("\n")[0].rstrip(".") or "none left"
        complain(f"Expected enough memory, got: {said}. {MEMORY}")
    else:
        complain(f"{type(error).__name__}: {error}. This is a bug. {_keep_traceback(error)}")
    if _is_disk_full(error):
        return NO_ROOM
    if isinstance(error, UsageError):
        return error.status
    return WRONG_USE if _is_wrong_use(error) else FAILED


def _is_wrong_use(error: Exception) -> bool:
    """True if another command, file or setting avoids the error.

    True for `UsageError` and for the errors of other packages, which do not know the command line: their subclasses
    of ValueError, and plain ones that state what was expected.
    """
    if isinstance(error, UsageError):
        return True
    ours = type(error).__module__.startswith("secateur.")
    return isinstance(error, ValueError) and (ours or str(error).startswith(("Expected ", "Unknown ")))


def _is_disk_full(error: BaseException | None) -> bool:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            return True
        seen.add(id(error))
        error = error.__cause__
    return False


def _keep_traceback(error: Exception) -> str:
    """Write the traceback to a file and return a sentence that names it."""
    text = masked("".join(traceback.format_exception(error)))
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="secateur-", suffix=".traceback", delete=False, encoding="utf-8"
        ) as file:
            file.write(text)
    except OSError:
        return "Set SECATEUR_DEBUG=1 to see its traceback."
    return f"Its traceback is in {file.name}."


def complain(message: str, kind: str = "error") -> None:
    """Print one line on stderr, without its middle if it repeats something endless."""
    line = cut(" ".join(without_controls(masked(message)).split()), LONGEST)
    print(f"secateur: {kind}: {line}", file=sys.stderr, flush=True)  # noqa: T201


def show(text: str = "") -> None:
    """Print lines on stdout."""
    print(text)  # noqa: T201


def show_line(line: str) -> None:
    """Print a line on stdout and flush it."""
    print(line, flush=True)  # noqa: T201


def show_json(document: Any) -> None:
    """Print the one JSON document of a command with ``--json``."""
    show(json.dumps(document, indent=1, allow_nan=False))


def show_facts(facts: Mapping[str, str]) -> None:
    """Print names and values, one pair a line."""
    width = max((len(name) for name in facts), default=0)
    for name, value in facts.items():
        show(f"  {name.ljust(width)}  {value}")


def open_display(settings: Settings | None = None) -> Display:
    """Display of progress on stderr."""
    from rich.console import Console

    from secateur.search.show.display import Display

    return Display(Console(stderr=True, highlight=False), settings)
