"""Files of a run: strict YAML, texts written whole or not at all, and the error for a full disk."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from secateur.search.errors import DISK_FULL, NO_ROOM, UsageError
from secateur.search.mirror.address import readable
from secateur.spaces import limited_text
from secateur.spaces.plain_files import check_plain
from secateur.spaces.whole_file import whole_file

T = TypeVar("T")


def parse_yaml(text: str, origin: str) -> Any:
    """Plain value of a YAML text, see `limited_text.parse_yaml`; errors hide passwords.

    Raises:
        UsageError: with line and column, if the text is no YAML, or too large.
    """
    try:
        return limited_text.parse_yaml(text, origin, readable)
    except ValueError as error:
        raise UsageError(str(error)) from None


def read_yaml(path: Path) -> Any:
    """Plain value of a YAML file.

    Raises:
        UsageError: if the file can't be read, is too large or no YAML.
    """
    try:
        text = limited_text.read_text(path, "a settings file")
    except ValueError as error:
        raise UsageError(str(error)) from None
    return parse_yaml(text, str(path))


def checked(source: Path | str, kind: type[T], what: str) -> T:
    """Value of a JSON file or text that has exactly the types of a kind, such as a dataclass.

    Raises:
        UsageError: with the place of the first wrong one; the text itself is not shown.
    """
    try:
        if isinstance(source, Path):
            check_plain(source)
        json = source.read_bytes() if isinstance(source, Path) else source
        return TypeAdapter(kind).validate_json(json, strict=True)
    except OSError as error:
        raise UsageError(f"Expected {what}, got {error!r}.") from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = f" at `{'.'.join(map(str, first['loc']))}`" if first["loc"] else ""
        raise UsageError(f"Expected {what}, got an error{place}: {first['msg']}. Restore the file.") from None


def dump_yaml(value: Any) -> str:
    """YAML text of a plain value, with the keys in their order."""
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)


class StudyWriteError(UsageError):
    """Full disk: the measurements that were written are safe, and the study can be continued."""

    status = NO_ROOM


def no_room(error: OSError, path: Path, safe: str) -> OSError | StudyWriteError:
    """Error to raise from a failed write: a `StudyWriteError` where the disk is full, else one that names the file.

    Never the error itself, which would become its own cause.
    """
    if error.errno not in DISK_FULL:
        return OSError(error.errno, error.strerror or str(error), str(path))
    reason = os.strerror(error.errno or 0).lower()
    return StudyWriteError(
        f"Expected room on the disk for {path}, got: {reason}. Free some and run the same command: {safe}."
    )


def replace_file(path: Path, text: str) -> None:
    """Write a text file whole or not at all, flushed to the disk; an equal one is left alone.

    Raises:
        StudyWriteError: if the disk is full.
        OSError: if it can't be written for another reason.
    """
    with contextlib.suppress(FileNotFoundError, UnicodeDecodeError):
        if path.read_text(encoding="utf-8") == text:
            return
    try:
        with whole_file(path) as new, new.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise no_room(error, path, "nothing was changed") from error
