"""Files of a run: strict YAML, texts written whole or not at all, and the error for a full disk."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from secateur.search.errors import DISK_FULL, UsageError
from secateur.search.mirror.address import readable
from secateur.spaces.whole_file import whole_file

# Limits of a YAML text, with aliases written out.
MAX_BYTES, MAX_VALUES, MAX_LEVELS, MAX_DIGITS = 1_000_000, 10_000, 64, 300
_TOO_LARGE = f"more than {MAX_VALUES:,} values or {MAX_LEVELS} levels"

T = TypeVar("T")


class _Loader(yaml.SafeLoader):
    """Safe loader that refuses repeated keys, and reads 1e6 as a number, which YAML 1.1 takes for text."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._level = self._deepest = self._n_values = 0
        self._sizes: dict[yaml.Node, tuple[int, int]] = {}  # values and levels of finished nodes

    def compose_node(self, parent: yaml.Node | None, index: int) -> Any:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        (n_values, levels), before, deepest = (1, 1), self._n_values, self._deepest
        if isinstance(event, yaml.AliasEvent) and event.anchor in self.anchors:  # no size: it holds itself
            n_values, levels = self._sizes.get(self.anchors[event.anchor], (MAX_VALUES, 1))
        self._n_values, self._deepest = before + n_values, self._level + levels
        if self._n_values > MAX_VALUES or self._deepest > MAX_LEVELS:
            raise yaml.MarkedYAMLError(problem=_TOO_LARGE, problem_mark=event.start_mark)
        self._level += 1
        node: Any = super().compose_node(parent, index)
        self._level -= 1
        self._sizes.setdefault(node, (self._n_values - before, self._deepest - self._level))
        self._deepest = max(deepest, self._deepest)
        if node.tag.endswith((":int", ":float")) and len(node.value) > MAX_DIGITS:
            raise yaml.MarkedYAMLError(problem="a number that long", problem_mark=event.start_mark)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for (key_node, _), i in zip(node.value, range(len(keys)), strict=True):
            if keys[i] in keys[:i]:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {readable(repr(keys[i]))} twice", problem_mark=key_node.start_mark
                )
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse_yaml(text: str, origin: str) -> Any:
    """Plain value of a YAML text.

    Args:
        origin: where the text comes from, for errors.

    Raises:
        UsageError: with line and column, if the text is no YAML.
    """
    try:
        return yaml.load(text, _Loader)  # a safe loader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = readable(error.problem or "none", 200) + place
    except (LookupError, AttributeError, OverflowError):  # as PyYAML's constructors raise them
        problem = "a value that does not fit its tag"
    except (yaml.YAMLError, ValueError, TypeError) as error:
        problem = readable(" ".join(str(error).split()), 200)
    raise UsageError(f"Expected YAML in {origin}, got {problem}.")


def read_yaml(path: Path) -> Any:
    """Plain value of a YAML file.

    Raises:
        UsageError: if the file can't be read or is no YAML.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        text = content[:MAX_BYTES].decode("utf-8")
    except UnicodeDecodeError:
        raise UsageError(f"Expected UTF-8 text in {path}, got other bytes. Is it a settings file?") from None
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UsageError(
            f"Expected a readable settings file, got {path}: {reason}. Check the path."
        ) from None
    if len(content) > MAX_BYTES:
        raise UsageError(f"Expected at most {MAX_BYTES:,} bytes in {path}, got more. Is it a settings file?")
    return parse_yaml(text, str(path))


def checked(source: Path | str, kind: type[T], what: str) -> T:
    """Value of a JSON file or text that has exactly the types of a kind, such as a dataclass.

    Raises:
        UsageError: with the place of the first wrong one; the text itself is not shown.
    """
    try:
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
