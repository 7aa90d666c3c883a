"""YAML as people mean it: repeated keys are an error, and 1e6 is a number."""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from secateur.search.errors import UsageError


class _Loader(yaml.SafeLoader):
    """Safe loader without YAML 1.1's surprises."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for (key_node, _), i in zip(node.value, range(len(keys)), strict=True):
            if keys[i] in keys[:i]:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {keys[i]!r} twice", problem_mark=key_node.start_mark
                )
        return super().construct_mapping(node, deep)


# YAML 1.1 takes 1e6 and 1e-3 for text.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def parse_yaml(text: str, origin: str) -> Any:
    """The plain value that the text describes.

    Args:
        text: YAML.
        origin: where the text comes from, for errors.

    Raises:
        UsageError: with line and column, if the text is no YAML.
    """
    try:
        return yaml.load(text, _Loader)  # a safe loader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UsageError(f"Expected YAML in {origin}, got {error.problem}{place}.") from None
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise UsageError(f"Expected YAML in {origin}, got {' '.join(str(error).split())}.") from None


def read_yaml(path: Path) -> Any:
    """The plain value in a YAML file.

    Raises:
        UsageError: if the file can't be read or is no YAML.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UsageError(f"Expected UTF-8 text in {path}, got other bytes. Is it a settings file?") from None
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UsageError(
            f"Expected a readable settings file, got {path}: {reason}. Check the path."
        ) from None
    return parse_yaml(text, str(path))


def dump_yaml(value: Any) -> str:
    """YAML of a plain value, keys in their own order."""
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True)
