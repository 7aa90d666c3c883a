"""Documents of text files and data sets: JSON, CSV and Parquet by field, other files as they are.

Rows without a value are skipped, halves of surrogate pairs are replaced by U+FFFD; both are counted and said.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from secateur.spaces.no_answer import NoAnswerError

PLAIN = (".txt", ".text", ".md", ".rst", ".raw", ".tokens", "")
FIELDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
SUFFIXES = (*PLAIN[:-1], *FIELDS)
"""Suffixes of files that are read in a directory; with another ``.gz``, too."""

GZIP = ".gz"
_SHOWN = 5  # names in a line
_HALF = re.compile("[\ud800-\udfff]")

Say = Callable[[str], None]
Row = tuple[object, str]  # a row, and its place for errors


def silent(line: str) -> None:
    """Say nothing."""


class TextError(ValueError):
    """A text that is missing, empty, too short, unreadable or shared by parts; the message is one line."""


class HubUnreachableError(TextError, NoAnswerError):
    """Data set of a hub that does not answer."""


def suffix_of(path: Path) -> str:
    """Suffix of a file in lower case, without that of its compression."""
    name = path.name[: -len(GZIP)] if path.name.lower().endswith(GZIP) else path.name
    return Path(name).suffix.lower()


def read_file(path: Path, field: str, say: Say = silent, *, as_text: bool = False) -> str:
    """Documents of a file, joined by an empty line.

    Args:
        field: of its rows, or several joined by ``+``; of no meaning for plain text.
        say: told what was skipped or replaced.
        as_text: read it as plain text, whatever its suffix is.

    Raises:
        TextError: if it can't be read; the message has the line at fault.
    """
    rows = None if as_text else _ROWS.get(suffix_of(path))
    if rows is None:
        return _whole(_read_plain(path), str(path), say)
    return _documents(rows(path, field), field, str(path), say)


def read_hub(repository: str, config: str, split: str, field: str, say: Say = silent) -> str:
    """Documents of a data set of the hub, joined by an empty line.

    Raises:
        TextError: if it can't be loaded, or has no such field.
        HubUnreachableError: if the hub doesn't answer.
    """
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise _missing("datasets", f"hub:{repository}") from error
    try:
        rows = datasets.load_dataset(repository, config or None, split=split)
    except (OSError, ValueError, RuntimeError) as error:  # its own errors derive from these
        unreachable = isinstance(error, ConnectionError)
        raise (HubUnreachableError if unreachable else TextError)(
            f"Expected to load {repository} from the hub, got: {_one_line(error)}. Check the name and the "
            "network, or give a local file."
        ) from error
    return _documents(((row, repository) for row in rows), field, repository, say)


def skipped_line(directory: Path, skipped: Iterable[Path]) -> str:
    """Line about files of a directory that are not read; empty if there are none."""
    names = [path.relative_to(directory).as_posix() for path in skipped]
    if not names:
        return ""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{directory}: {len(names)} files skipped, which are no text: {', '.join(names[:_SHOWN])}{more}"


def _read_plain(path: Path) -> str:
    try:
        if path.name.lower().endswith(GZIP):
            with gzip.open(path, "rt", encoding="utf-8-sig") as file:
                return file.read()
        return path.read_text(encoding="utf-8-sig")  # a byte order mark is no text
    except UnicodeDecodeError as error:
        raise TextError(
            f"Expected UTF-8 text in {path}, got the byte 0x{error.object[error.start]:02x} at offset "
            f"{error.start}. Convert the file, e.g. with iconv."
        ) from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise TextError(f"Expected a whole gzip file, got {path}: {_one_line(error)}. Mend it.") from error
    except OSError as error:
        raise TextError(f"Expected to read {path}, got: {error.strerror}. Check its permissions.") from error


def _json_lines(path: Path, _field: str) -> Iterator[Row]:
    return _lines(path, _read_plain(path), "a JSON object a line")


def _lines(path: Path, text: str, expected: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _parsed(line, f"{expected} in {path}", f" at line {number}"), f"{path} line {number}"


def _json(path: Path, _field: str) -> Iterator[Row]:
    """Rows of an array, or of lines."""
    text = _read_plain(path)
    expected = "an array of JSON objects, or one a line,"
    if not text.lstrip().startswith("["):
        yield from _lines(path, text, expected)
        return
    rows: Any = _parsed(text, f"{expected} in {path}", "")  # a list, by its first character
    yield from ((row, f"{path} row {number}") for number, row in enumerate(rows, start=1))


def _parsed(text: str, expected: str, place: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # also for numbers and levels without end
        why = str(error) if not place else str(error).partition(": line ")[0]
        raise TextError(f"Expected {expected}, got {why}{place}. Mend the file.") from error


def _csv(path: Path, _field: str) -> Iterator[Row]:
    return _table(path, ",")


def _tsv(path: Path, _field: str) -> Iterator[Row]:
    return _table(path, "\t")


def _table(path: Path, delimiter: str) -> Iterator[Row]:
    """Rows of a table whose first line names the columns."""
    reader = csv.DictReader(io.StringIO(_read_plain(path), newline=""), delimiter=delimiter, strict=True)
    before = csv.field_size_limit(sys.maxsize)  # documents are long
    try:
        for row in reader:
            yield row, f"{path} line {reader.line_num}"
    except csv.Error as error:
        raise TextError(
            f"Expected a table with a line of names in {path}, got {error} at line {reader.line_num}. Mend the file."
        ) from error
    finally:
        csv.field_size_limit(before)


def _parquet(path: Path, field: str) -> Iterator[Row]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ModuleNotFoundError as error:
        raise _missing("pyarrow", path) from error
    try:
        names = pq.read_schema(path).names
        wanted = [name for name in _fields(field, names) if name in names]
        rows = pq.read_table(path, columns=wanted).to_pylist() if wanted else []
    except (OSError, pa.ArrowException) as error:
        raise TextError(
            f"Expected a Parquet file, got {path}: {_one_line(error)}. Give another file."
        ) from error
    if not rows:
        yield dict.fromkeys(names, ""), str(path)
    yield from ((row, str(path)) for row in rows)


_ROWS: Mapping[str, Callable[[Path, str], Iterator[Row]]] = MappingProxyType(
    {".jsonl": _json_lines, ".json": _json, ".csv": _csv, ".tsv": _tsv, ".parquet": _parquet}
)


def _documents(rows: Iterable[Row], field: str, origin: str, say: Say) -> str:
    """Field of each row that has one, joined."""
    documents, n_empty = list[str](), 0
    for row, where in rows:
        text = _text_of(row, field, where)
        if text is None:
            n_empty += 1
        else:
            documents.append(text)
    if n_empty:
        say(f"{origin}: {n_empty} of {n_empty + len(documents)} rows skipped, whose {field!r} is null")
    return _whole("\n\n".join(documents), origin, say)


def _text_of(row: object, field: str, where: str) -> str | None:
    """Text of a row: its field, or its fields but those that are null; None if all are."""
    if not isinstance(row, Mapping):
        raise TextError(
            f"Expected a field {field!r} in {where}, got {type(row).__name__}. Name the field: PATH:FIELD."
        )
    found = []
    for name in _fields(field, row):
        if name not in row:
            known = ", ".join(str(key) for key in row if key is not None)
            raise TextError(
                f"Expected a field {name!r} in {where}, got {known}. Name the field: PATH:FIELD, or several: "
                f"PATH:FIELD+FIELD."
            )
        value = row[name]
        if value is not None and not isinstance(value, str):
            raise TextError(
                f"Expected text in field {name!r} of {where}, got {type(value).__name__}. Name another field."
            )
        found.append(value)
    texts = [text for text in found if text is not None]
    return "\n".join(texts) if texts else None


def _fields(field: str, known: Iterable[object]) -> list[str]:
    """Names of fields: the text itself where a field has it as its name, else its parts between ``+``."""
    return [field] if field in known else field.split("+")


def _whole(text: str, origin: str, say: Say) -> str:
    """Text that can be encoded."""
    try:
        text.encode()
    except UnicodeEncodeError:
        mended, n_halves = _HALF.subn("\ufffd", text)
        say(f"{origin}: {n_halves} halves of surrogate pairs replaced by U+FFFD")
        return mended
    return text


def _missing(package: str, what: object) -> TextError:
    return TextError(
        f"Expected the package {package} to read {what}, got none. Install it: pip install 'secateur[data]'."
    )


def _one_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
