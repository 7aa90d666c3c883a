"""Check of task files before lm-eval reads them: no code, and no paths that leave their directory."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import yaml

from secateur.spaces.plain_files import check_plain

LOADER = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader  # as lm-eval, to read the same
PATHS = ("include", "use_prompt", "dataset_path", "data_files", "data_dir", "cache_dir")
INTERNAL = re.compile(r"\{[{%][^%}]*\.\s*__")  # the sandbox for templates stops the rest
TRUST = "Set `trust_remote_code` (`--trust-remote-code`) if you have read the task files and trust them."


def check_task_files(directory: Path, *, trusted: bool) -> None:
    """Raise a ValueError, with file and line, for code (unless trusted) and for paths that leave the directory."""
    root = directory.resolve()
    check_plain(*root.rglob("*"))
    files = [path.resolve() for path in root.rglob("*.yaml")]
    for file in files:  # which grows by those that are included
        for key, node in _scalars(file):
            value, base = node.value, file.parent if key == "include" else root
            code = "!function " if node.tag == "!function" else ""
            where = f"{code}{value!r} ({os.path.relpath(file, root)}, line {node.start_mark.line + 1})"
            path = Path(os.path.normpath(base / value))  # as written: links are followed
            if key in PATHS and (not path.is_relative_to(root) or re.search("^~|::|://", value)):
                raise ValueError(f"Expected `{key}` within the directory, got {where}. Copy it there.")
            script = key == "metric" and ("/" in value or (root / value).exists())
            if not trusted and (code or script or INTERNAL.search(value)):
                raise ValueError(f"Expected task files without code, got {where}. {TRUST}")
            files += [path.resolve()] if key == "include" and path.resolve() not in files else []


def _scalars(file: Path) -> Iterator[tuple[str, yaml.ScalarNode]]:
    """The scalars of a file with the keys that they are under; all within one of `PATHS` are under that."""
    try:
        nodes: list[tuple[str, yaml.Node | None]] = [("", yaml.compose(file.read_bytes(), Loader=LOADER))]
    except (yaml.YAMLError, OSError):  # lm-eval passes over it
        return
    for key, node in nodes:  # which grows by those below
        if isinstance(node, yaml.ScalarNode):
            yield key, node
        elif isinstance(node, yaml.SequenceNode):
            nodes += [(key, child) for child in node.value if (key, child) not in nodes]  # an alias once
        elif isinstance(node, yaml.MappingNode):
            below = [(key if key in PATHS else str(name.value), child) for name, child in node.value]
            nodes += [pair for pair in below if pair not in nodes] + [("", name) for name, _ in node.value]
