"""Description of a study, ``study.json``: identity, baselines and facts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from secateur.search.errors import UsageError
from secateur.search.files import checked
from secateur.search.study.lock import RunLock
from secateur.search.study.state import LOG, STATE
from secateur.spaces.plain_files import check_plain

FORMAT = 1
ABOUT = "study.json"
BOARD = "board"
"""Key of the settings in the identity of a board of methods, which is no search."""


@dataclass(frozen=True)
class About:
    """Description of a study.

    Args:
        identity: plain nested values that measurements depend on: see `settings.identity`, and with it
            fingerprints of the model and the data. A study is continued only with the same ones.
        baselines: canonical texts of the baselines by name, ``dense`` among them.
        facts: plain values worth keeping, such as versions; they may differ when the study is continued.
    """

    identity: Mapping[str, Any]
    baselines: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


def read_about(directory: Path) -> About:
    """Description of the study in the directory.

    Raises:
        UsageError: if its file is damaged, or of another format.
    """
    check_plain(*directory.iterdir())  # all that is read from here on
    path = directory / ABOUT
    what = f"the description of a study in {path}"
    version = checked(path, dict[str, Any], what).get("format")
    if version != FORMAT:
        raise UsageError(
            f"Expected {path} of format {FORMAT}, got {str(version)[:40]}. Use the Secateur that made it."
        )
    return checked(path, About, what)


def about_text(about: About) -> str:
    """Content of the file."""
    return json.dumps({"format": FORMAT, **vars(about)}, indent=1) + "\n"


def check_directory(directory: Path, identity: Mapping[str, Any]) -> None:
    """Check, without changing anything, that the directory is new or holds the same search.

    Raises:
        UsageError: if the directory holds another search or something else.
    """
    if directory.exists() and not directory.is_dir():
        raise UsageError(f"Expected a run directory, got the file {directory}. Name another.")
    if not (directory / ABOUT).exists():
        own = {
            RunLock.NAME,
            STATE,
            LOG,
            ABOUT + ".new",
            STATE + ".new",
        }  # left by a driver that was killed at once
        names = sorted(path.name for path in directory.iterdir()) if directory.exists() else []
        others = [name for name in names if name not in own]
        if others:
            raise UsageError(
                f"Expected a new, an empty or a run directory, got {directory} with {others[0]} and no {ABOUT}. "
                f"Name another."
            )
        return
    old_identity = read_about(directory).identity
    old, new = _flat(old_identity), _flat(identity)
    changed = [key for key in [*old, *new] if old.get(key, "absent") != new.get(key, "absent")]
    if changed:
        shown = "; ".join(
            f"{key}: {old.get(key, 'absent')} -> {new.get(key, 'absent')}" for key in dict.fromkeys(changed)
        )
        kind = "board" if BOARD in old_identity else "search"
        raise UsageError(
            f"Expected the {kind} that {directory} belongs to, got another ({shown}). "
            f"Undo the change, or name another directory."
        )


def check_before(directory: Path, identity: Mapping[str, Any]) -> None:
    """`check_directory` before a model is loaded: what its content and its texts' decide is left out.

    Raises:
        UsageError: as `check_directory` does.
    """
    plain: dict[str, Any] = json.loads(json.dumps(dict(identity), default=dict))
    if (directory / ABOUT).exists():
        plain["content"] = read_about(directory).identity.get("content", {})
    check_directory(directory, plain)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        nested = isinstance(value, Mapping)
        flat |= _flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat
