"""Sources of text: the `data` settings parsed, and a reader for each kind of file.

=================================  ==========================================================================
``docs``                           the Python language reference that CPython carries; see `docs`
``notes.txt``                      any text file (UTF-8)
``c4.jsonl``, ``c4.jsonl:raw``     one JSON object a line; its field ``text``, or the one named
``c4.parquet``, ``c4.parquet:raw``  likewise (needs pyarrow)
``corpus/``                        a directory of text, JSONL and Parquet files, in the order of their paths
``hub:owner/name:cfg:split:f``     a data set of the hub (needs datasets); config, split (``train``) and
                                   field (``text``) may be left out or empty
``SOURCE[0.2:0.5]``                of any of these but ``docs``, the characters between these fractions
=================================  ==========================================================================

Documents of one source are joined by an empty line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

DOCS = "docs"
_HUB = "hub:"
_RANGE = re.compile(r"^(?P<base>.+)\[(?P<start>[\d.]*):(?P<stop>[\d.]*)\]$", re.DOTALL)
_FIELD = re.compile(r"^(?P<path>.+\.(?:jsonl|parquet)):(?P<field>[^:/\\]+)$", re.IGNORECASE | re.DOTALL)
_IN_DIRECTORIES = (".txt", ".md", ".rst", ".jsonl", ".parquet")


Span = tuple[float, float]  # from, to: fractions of a text's characters


class TextError(ValueError):
    """A text that is missing, empty, too short, unreadable or shared by parts; the message is one line."""


@dataclass(frozen=True)
class TextSource:
    """A parsed `data` setting.

    Args:
        base: normalised name without the range: equal bases are the same text.
        span: range, in fractions of the characters; None: not given.
        origins: the files or data sets that are read; sources with a common one may hold the same text.
        read: reads all of it.
    """

    base: str
    span: Span | None
    origins: frozenset[str]
    read: Callable[[], str]


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
        return TextSource(DOCS, None, frozenset(), str)  # never read: it differs by part
    if base.startswith(_HUB):
        return _parse_hub(base, span, key)

    path, field = base, "text"
    if (match := _FIELD.match(base)) is not None and not Path(base).expanduser().exists():
        path, field = match["path"], match["field"]
    files = _files(Path(path).expanduser(), key)
    return TextSource(
        f"{Path(path).expanduser().resolve()}:{field}",
        span,
        frozenset(str(file.resolve()) for file in files),
        lambda: "\n\n".join(_READERS.get(file.suffix.lower(), _read_plain)(file, field) for file in files),
    )


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
        f"{origin}:{field}", span, frozenset({origin}), lambda: _read_hub(repository, config, split, field)
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


def _files(path: Path, key: str) -> list[Path]:
    if not path.exists():
        raise TextError(
            f"Expected `{key}` to be docs, a file, a directory or hub:OWNER/NAME, got {path}, which "
            "does not exist. Give a path that does."
        )
    if not path.is_dir():
        return [path]
    inside = (file for file in path.rglob("*") if file.suffix.lower() in _IN_DIRECTORIES and file.is_file())
    visible = (file for file in inside if not any(p.startswith(".") for p in file.relative_to(path).parts))
    files = sorted(visible, key=lambda file: file.relative_to(path).as_posix())
    if not files:
        raise TextError(
            f"Expected files {', '.join(_IN_DIRECTORIES)} in `{key}` ({path}), got none. "
            "Give another directory."
        )
    return files


def _read_plain(path: Path, _field: str) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # a byte order mark is no text
    except UnicodeDecodeError as error:
        raise TextError(
            f"Expected UTF-8 text in {path}, got the byte 0x{error.object[error.start]:02x} at offset "
            f"{error.start}. Convert the file, e.g. with iconv."
        ) from error
    except OSError as error:
        raise TextError(f"Expected to read {path}, got: {error.strerror}. Check its permissions.") from error


def _read_jsonl(path: Path, field: str) -> str:
    documents = []
    for number, line in enumerate(_read_plain(path, field).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # also for numbers and levels without end
            why = str(error).partition(": line ")[0]
            raise TextError(
                f"Expected a JSON object a line in {path}, got {why} at line {number}. Mend the file."
            ) from error
        documents.append(_field_of(row, field, f"{path} line {number}"))
    return "\n\n".join(documents)


def _read_parquet(path: Path, field: str) -> str:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ModuleNotFoundError as error:
        raise _missing("pyarrow", path) from error
    try:
        schema = pq.read_schema(path)
        rows = pq.read_table(path, columns=[field]).to_pylist() if field in schema.names else []
    except (OSError, pa.ArrowException) as error:
        raise TextError(
            f"Expected a Parquet file, got {path}: {_one_line(error)}. Give another file."
        ) from error
    if not rows:
        _field_of(dict.fromkeys(schema.names, ""), field, str(path))
    return "\n\n".join(_field_of(row, field, str(path)) for row in rows if row[field] is not None)


def _read_hub(repository: str, config: str, split: str, field: str) -> str:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise _missing("datasets", f"{_HUB}{repository}") from error
    try:
        rows = datasets.load_dataset(repository, config or None, split=split)
    except (OSError, ValueError, RuntimeError) as error:  # its own errors derive from these
        raise TextError(
            f"Expected to load {repository} from the hub, got: {_one_line(error)}. Check the name and the "
            "network, or give a local file."
        ) from error
    return "\n\n".join(_field_of(row, field, repository) for row in rows)


_READERS: Mapping[str, Callable[[Path, str], str]] = MappingProxyType(
    {".jsonl": _read_jsonl, ".parquet": _read_parquet}
)


def _field_of(row: object, field: str, where: str) -> str:
    if not isinstance(row, Mapping) or field not in row:
        found = ", ".join(row) if isinstance(row, Mapping) else type(row).__name__
        raise TextError(f"Expected a field {field!r} in {where}, got {found}. Name the field: PATH:FIELD.")
    value = row[field]
    if not isinstance(value, str):
        raise TextError(
            f"Expected text in field {field!r} of {where}, got {type(value).__name__}. Name another field."
        )
    return value


def _missing(package: str, what: object) -> TextError:
    return TextError(
        f"Expected the package {package} to read {what}, got none. Install it: pip install 'secateur[data]'."
    )


def _one_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
