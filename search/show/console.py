"""How a command ends: results on stdout, an error as one line on stderr, an exit status."""

from __future__ import annotations

import errno
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import typer

from secateur.search.errors import UsageError
from secateur.search.mirror.address import masked

DONE, FAILED, WRONG_USE, INTERRUPTED = 0, 1, 2, 130
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What typer's own errors descend from; depending on its version the class is click's or its own copy.
_TyperError = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


def run_command(command: Callable[[], None]) -> int:
    """Run a command to its end, whatever that is, and give its exit status.

    A traceback is shown only if ``SECATEUR_DEBUG`` is set; one of an unexpected error is otherwise kept in a file.
    A reader that went away, as in ``| head``, is no error.
    """
    try:
        command()
        sys.stdout.flush()
    except typer.Exit as ending:
        return ending.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the interpreter's own last flush
        return DONE
    except KeyboardInterrupt:
        complain("Interrupted. What was measured is safe; the same command continues.")
        return INTERRUPTED
    except Exception as error:  # noqa: BLE001  # the end of the line for all of them
        return _failed(error)
    return DONE


def _failed(error: Exception) -> int:
    """Report an error in one line; the exit status for it."""
    if os.environ.get("SECATEUR_DEBUG"):
        traceback.print_exception(error)
    if isinstance(error, _TyperError):
        complain(f"{error.format_message()} See `secateur --help`, or `--help` of the command.")  # type: ignore[attr-defined]
        return WRONG_USE
    if _is_ours(error):
        complain(str(error))
    elif isinstance(error, OSError):
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        complain(f"Expected to read and write files, got: {what}.")
    else:
        complain(f"{type(error).__name__}: {error}. This is a bug. {_keep_traceback(error)}")
    return WRONG_USE if _is_wrong_use(error) or _is_disk_full(error) else FAILED


def _is_ours(error: Exception) -> bool:
    """Whether the message was made to be shown as it is."""
    return _is_wrong_use(error) or type(error).__module__.startswith("secateur.")


def _is_wrong_use(error: Exception) -> bool:
    """Whether a person can mend it by another command, file or setting.

    Besides `UsageError` these are the errors of other rooms, which know nothing of the command line: their own
    subclasses of ValueError, and plain ones that say what was expected.
    """
    if isinstance(error, UsageError):
        return True
    ours = type(error).__module__.startswith("secateur.")
    return isinstance(error, ValueError) and (ours or str(error).startswith(("Expected ", "Unknown ")))


def _is_disk_full(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in _DISK_FULL:
            return True
        error = error.__cause__
    return False


def _keep_traceback(error: Exception) -> str:
    """Write the traceback to a file; where it is, for people."""
    text = "".join(traceback.format_exception(error))
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="secateur-", suffix=".traceback", delete=False, encoding="utf-8"
        ) as file:
            file.write(text)
    except OSError:
        return "Set SECATEUR_DEBUG=1 to see its traceback."
    return f"Its traceback is in {file.name}."


def complain(message: str, kind: str = "error") -> None:
    """One line on stderr."""
    print(f"secateur: {kind}: {' '.join(masked(message).split())}", file=sys.stderr, flush=True)  # noqa: T201


def show(text: str = "") -> None:
    """Lines on stdout."""
    print(text)  # noqa: T201


def show_line(line: str) -> None:
    """A line on stdout that a reader sees at once."""
    print(line, flush=True)  # noqa: T201


def show_json(document: Any) -> None:
    """The one JSON document that a command with ``--json`` prints."""
    show(json.dumps(document, indent=1, allow_nan=False))
