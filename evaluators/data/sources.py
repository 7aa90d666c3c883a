"""Sources of text: the `data` settings parsed, and what they name read.

======================================  =====================================================================
``docs``                                the Python language reference that CPython carries; see `docs`
``notes.txt``                           a text file (UTF-8): ``.txt``, ``.md``, ``.rst``, or no suffix
``c4.jsonl``, ``c4.jsonl:raw``          one JSON object a line, or an array of them in ``.json``; the field
                                        ``text``, or the one named; see `documents`
``sft.json:instruction+output``         likewise, several fields of an object, each on lines of its own
``c4.csv``, ``c4.tsv``, ``c4.parquet``  likewise; the last one needs pyarrow
``notes.txt.gz``                        any of these but Parquet, compressed
``text:server.log``                     a file of any other suffix, read as plain text
``corpus/``                             a directory of such files, in the order of their paths
``hub:owner/name:cfg:split:f``          a data set of the hub (needs datasets); config, split (``train``) and
                                        field (``text``) may be left out or empty
``SOURCE[0.2:0.5]``                     of any of these but ``docs``, the characters between these fractions
======================================  =====================================================================

Documents of one source are joined by an empty line.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from secateur.evaluators.data.documents import (
    FIELDS,
    PLAIN,
    SUFFIXES,
    Say,
    TextError,
    read_file,
    read_hub,
    skipped_line,
    suffix_of,
)
from secateur.spaces.located import located

DOCS = "docs"
_HUB = "hub:"
_AS_TEXT = "text:"
_RANGE = re.compile(r"^(?P<base>.+)\[(?P<start>[\d.]*):(?P<stop>[\d.]*)\]$", re.DOTALL)
_FIELD = re.compile(
    rf"^(?P<path>.+(?:{'|'.join(map(re.escape, FIELDS))})(?:\.gz)?):(?P<field>[^:/\\]+)$",
    re.IGNORECASE | re.DOTALL,
)

Span = tuple[float, float]  # from, to: fractions of a text's characters


@dataclass(frozen=True)
class TextSource:
    """A parsed `data` setting.

    Args:
        base: normalised name without the range: equal bases are the same text.
        span: range, in fractions of the characters; None: not given.
        origins: the files or data sets that are read; sources with a common one may hold the same text.
        read: reads all of it, and tells what it skipped.
    """

    base: str
    span: Span | None
    origins: frozenset[str]
    read: Callable[[Say], str]


def parse(name: str, key: str) -> TextSource:
    """The source that a setting names; its files must exist, but nothing is read yet.

    Args:
        name: the setting's value.
        key: the setting, e.g. ``data.test``, for errors.

    Raises:
        TextError: if the setting or what it names is wrong.
    """
    base, span = name, None
    if (match := _RANGE.match(name)) is not None:
        base, span = match["base"], _parse_range(match["start"], match["stop"], name, key)
    if base == DOCS:
        if span is not None:
            raise TextError(
                f"Expected `{key}` docs without a range, got {name}. It is split by topic already."
            )
        return TextSource(DOCS, None, frozenset(), lambda say: "")  # never read: it differs by part
    if base.startswith(_HUB):
        return _parse_hub(base, span, key)

    as_text = base.startswith(_AS_TEXT)
    path, field = base.removeprefix(_AS_TEXT), "text"
    match = None if as_text or Path(base).expanduser().exists() else _FIELD.match(base)
    if match is not None:
        path, field = match["path"], match["field"]
    place = Path(path).expanduser()
    files, skipped = _files(place, key, as_text=as_text)

    def read(say: Say) -> str:
        if skipped:
            say(skipped_line(place, skipped))
        return "\n\n".join(read_file(file, field, say, as_text=as_text) for file in files)

    origins = frozenset(str(file.resolve()) for file in files)
    return TextSource(f"{place.resolve()}:{'' if as_text else field}", span, origins, read)


def located_text(name: str, folders: Sequence[Path]) -> str:
    """A setting with the path of its file or directory as it is found, see `located`."""
    match = _RANGE.match(name)
    base = name if match is None else match["base"]
    if base == DOCS or base.startswith(_HUB):
        return name
    prefix = _AS_TEXT if base.startswith(_AS_TEXT) else ""
    path = base.removeprefix(prefix)
    found = located(path, folders)
    if found == path and not prefix and (field := _FIELD.match(path)) is not None:
        path = field["path"]
        found = located(path, folders)
    return f"{prefix}{found}{name[len(prefix) + len(path) :]}"


def _parse_hub(name: str, span: Span | None, key: str) -> TextSource:
    pieces = name.removeprefix(_HUB).split(":")
    if len(pieces) > 4 or not pieces[0]:
        raise TextError(
            f"Expected `{key}` as hub:OWNER/NAME[:CONFIG[:SPLIT[:FIELD]]], got {name}. Mend the name."
        )
    repository, config, split, field = pieces + [""] * (4 - len(pieces))
    split, field = split or "train", field or "text"
    origin = f"{_HUB}{repository}:{config}:{split}"
    return TextSource(
        f"{origin}:{field}",
        span,
        frozenset({origin}),
        lambda say: read_hub(repository, config, split, field, say),
    )


def _parse_range(start: str, stop: str, name: str, key: str) -> Span:
    try:
        span = float(start or 0), float(stop or 1)
    except ValueError:
        span = (0.0, 0.0)
    if not 0 <= span[0] < span[1] <= 1:
        raise TextError(
            f"Expected the range of `{key}` as rising fractions in [0, 1], e.g. PATH[0.0:0.4], "
            f"got {name}. Mend the range."
        )
    return span


def _files(path: Path, key: str, *, as_text: bool) -> tuple[list[Path], list[Path]]:
    """The files of a path that are read, and those that are not; hidden ones are neither."""
    if not path.exists():
        raise TextError(
            f"Expected `{key}` to be docs, a file, a directory or hub:OWNER/NAME, got {path}, which "
            "does not exist. Give a path that does."
        )
    if not path.is_dir():
        if not as_text and suffix_of(path) not in (*SUFFIXES, *PLAIN):
            raise TextError(
                f"Expected `{key}` to be a file {', '.join(SUFFIXES)}, got {path}. Write text:{path}, or set "
                f"`evaluator.data.format: text`, if it is plain text; convert it if it isn't."
            )
        return [path], []
    inside = (file for file in path.rglob("*") if file.is_file())
    visible = [file for file in inside if not any(p.startswith(".") for p in file.relative_to(path).parts)]
    visible.sort(key=lambda file: file.relative_to(path).as_posix())
    files = [file for file in visible if as_text or suffix_of(file) in SUFFIXES]
    if not files:
        raise TextError(
            f"Expected files {', '.join(SUFFIXES)} in `{key}` ({path}), got none. Give another directory."
        )
    return files, [file for file in visible if file not in files]
