"""YAML and JSON of limited size and depth: what somebody else wrote must not take memory or time without end."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import yaml

from secateur.spaces.plain_files import check_plain

# Limits of a text, with aliases written out.
MAX_BYTES, MAX_VALUES, MAX_LEVELS, MAX_DIGITS = 1_000_000, 10_000, 64, 300
_TOO_LARGE = f"more than {MAX_VALUES:,} values or {MAX_LEVELS} levels"

_CONTROL = re.compile(
    r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|.)?|[\x00-\x08\x0b-\x1f\x7f-\x9f]"
)
_MERGE = "tag:yaml.org,2002:merge"

Shown = Callable[[str, int], str]
"""Cuts a text to a number of characters, for a message."""


def cut(text: str, most: int) -> str:
    """Text for a message, without its middle if it is long."""
    return text if len(text) <= most else f"{text[: most * 2 // 3]}...{text[len(text) - most // 3 + 3 :]}"


def without_controls(text: str) -> str:
    """Text without the codes that colour or move a terminal's output; line ends stay."""
    return _CONTROL.sub("", text)


class _Loader(yaml.SafeLoader):
    """Safe loader that refuses repeated keys, and reads 1e6 as a number, which YAML 1.1 takes for text."""

    def __init__(self, stream: str, shown: Shown) -> None:
        super().__init__(stream)
        self._shown = shown
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
        own = [key for key, _ in node.value if key.tag != _MERGE]
        keys = [self.construct_object(key, deep=True) for key in own]
        for i, key_node in enumerate(own):
            if keys[i] in keys[:i]:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {self._shown(repr(keys[i]), 60)} twice",
                    problem_mark=key_node.start_mark,
                )
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """Number; 0123 and 1:30, which YAML 1.1 reads to the base 8 and 60, are refused."""
        value = int(super().construct_yaml_int(node))
        if re.fullmatch(r"[-+]?0[0-9_]+", node.value) or ":" in node.value:
            base = 60 if ":" in node.value else 8
            raise yaml.MarkedYAMLError(
                problem=f"{node.value}, which YAML reads as {value} (base {base}); write a decimal number without "
                "leading zeros, or a text in quotes",
                problem_mark=node.start_mark,
            )
        return value


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse_yaml(text: str, origin: str, shown: Shown = cut) -> Any:
    """Plain value of a YAML text, JSON included.

    Args:
        origin: where the text comes from, for errors.
        shown: cuts what messages repeat of the text.

    Raises:
        ValueError: with line and column, if the text is no YAML, or too large.
    """
    if len(text) > MAX_BYTES:
        raise ValueError(f"Expected at most {MAX_BYTES:,} characters in {origin}, got {len(text):,}.")
    try:
        return _Loader(text, shown).get_single_data()  # a safe loader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = shown(error.problem or "none", 200) + place
    except (LookupError, AttributeError, OverflowError):  # as PyYAML's constructors raise them
        problem = "a value that does not fit its tag"
    except (yaml.YAMLError, ValueError, TypeError) as error:
        problem = shown(" ".join(str(error).split()), 200)
    raise ValueError(f"Expected YAML in {origin}, got {problem}.")


def read_text(path: Path, what: str) -> str:
    """UTF-8 text of a file.

    Args:
        what: the file is, for errors, such as "a settings file".

    Raises:
        ValueError: if the file can't be read, or is too large.
    """
    check_plain(path)
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        text = content[:MAX_BYTES].decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"Expected UTF-8 text in {path}, got other bytes. Is it {what}?") from None
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ValueError(f"Expected {what} that can be read, got {path}: {reason}. Check the path.") from None
    if len(content) > MAX_BYTES:
        raise ValueError(f"Expected at most {MAX_BYTES:,} bytes in {path}, got more. Is it {what}?")
    return text
