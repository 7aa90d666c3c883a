"""Damage and malice at random: bytes, lines, and the values of JSON and YAML."""

from __future__ import annotations

import json
import os
import random
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

DEEP = 3000
HOSTILE: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 10**9, 2**63, -(10**30), 10**400),
    *(0.5, -0.5, 1e-300, 1e300, float("nan"), float("inf"), float("-inf")),
    *(
        "",
        "x",
        "0",
        "1e9",
        "nan",
        "null",
        "../../../etc/passwd",
        "/dev/zero",
        "a/b",
        "~",
        "${HOME}",
        "-o",
        "\x00",
    ),
    *(
        "é\u2028\u202e",
        "😀" * 50,
        "x" * 5000,
        "!!python/object/apply:os.system [id]",
        "{{ 7 * 7 }}",
        "__class__",
    ),
    *([], {}, [[]], [None], {"": None}, {"kind": "x"}, [1, "x", None], ["x"] * 200, {"x": {"x": {"x": {}}}}),
]
PIECES = [
    *"[]{}()<>'|>?#%@`~\"\\/$,;:=-+*^&!\t\n\r\x00\x1b\x7fé\u2028",
    *(
        "9" * 400,
        "0x" + "f" * 400,
        "1:1:1.5",
        "1e999",
        ".nan",
        "-.inf",
        "NaN",
        "Infinity",
        "1e",
        "--",
        "..",
        "00",
    ),
    *(
        ": ",
        "- ",
        "&a ",
        "*a ",
        "<<: *a",
        "--- ",
        "... ",
        "null",
        "true",
        "2001-99-99",
        "!!int ''",
        "!!set {a}",
    ),
    *(
        "[" * DEEP,
        "{" * DEEP,
        "(" * DEEP,
        "a: " * 200,
        "x" * 100_000,
        "!function os.system",
        "x999999",
        "search:",
    ),
]


def mutated_bytes(data: bytes, rng: random.Random) -> bytes:
    """Bytes cut, flipped, inserted, removed or repeated."""
    at, end = sorted((rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)))
    how = rng.randrange(6)
    if how == 0:
        return data[:at]
    if how == 1 and data:
        flipped = bytearray(data)
        for _ in range(rng.randint(1, 3)):
            flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return bytes(flipped)
    if how == 2:
        return data[:at] + rng.randbytes(rng.choice((1, 8, 4096))) + data[at:]
    if how == 3:
        return data[:at] + data[min(end, at + 2000) :]
    if how == 4:
        return data[:at] + data[at:end][:2000] + data[at:]
    return rng.choice((b"", b"\x00" * 4096, b"\xff\xfe\x80", b"\x80\x04]\x94.", rng.randbytes(64)))


def mutated_text(text: str, rng: random.Random) -> str:
    """Text with pieces, values and lines inserted, removed, repeated or exchanged."""
    for _ in range(rng.randint(1, 3)):
        at, lines = rng.randrange(len(text) + 1), text.split("\n")
        i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
        how, piece = rng.randrange(7), rng.choice(PIECES)
        digits = [k for k, character in enumerate(text) if character.isdigit()]
        if digits and rng.random() < 0.4:  # what is most likely to be read
            k = rng.choice(digits)
            text = text[:k] + rng.choice(("", "0", "1", "9", "12", ".5")) + text[k + 1 :]
        elif how == 0:
            text = text[:at] + piece + text[at:]
        elif how == 1:
            text = text[:at] + text[at + rng.randrange(9) :]
        elif how == 2 and ":" in lines[i]:
            lines[i] = f"{lines[i].partition(':')[0]}: {piece}"
            text = "\n".join(lines)
        elif how == 3:
            lines[i], lines[j] = lines[j], lines[i]
            text = "\n".join(lines)
        elif how == 4:
            lines.insert(i, lines[j])
            text = "\n".join(lines)
        elif how == 5:
            text = text[:at] + rng.choice(string.printable) + text[at + 1 :]
        else:
            text = text.replace(rng.choice(text.split() or [""]) or "x", piece, 1)
    return text


def mutated_value(value: Any, rng: random.Random) -> Any:
    """The value with some of its parts replaced, removed, renamed or exchanged; it is changed in place."""
    for _ in range(rng.randint(1, 2)):
        places = list(_places(value))
        if not places or rng.random() < 0.03:
            return rng.choice(HOSTILE)
        holder, key = rng.choice(places)
        how = rng.random()
        if how < 0.6:
            holder[key] = rng.choice(HOSTILE)
        elif how < 0.7:
            del holder[key]
        elif how < 0.8 and isinstance(holder, dict):
            holder[rng.choice(["x", "", "é", key + key])] = holder.pop(key)
        elif how < 0.9 and isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
            holder[key] = holder[key] * rng.choice((-1, 0, 2, 1e6)) + rng.choice((0, 1, 0.5))
        else:
            other, there = rng.choice(places)
            holder[key] = json.loads(json.dumps(other.get(there) if isinstance(other, dict) else None))
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    for key, inner in list(value.items() if isinstance(value, dict) else enumerate(value)):
        yield value, key
        if isinstance(inner, dict | list):
            yield from _places(inner)


def move_out(path: Path, outside: Path) -> str:
    """Put a link in place of a file or directory, or where there is none, to one outside, and say so."""
    target = outside / path.name
    path.parent.mkdir(exist_ok=True)
    if path.exists():
        path.rename(target)
    elif path.suffix:
        target.write_text("kept\n")
    else:
        target.mkdir()
        (target / "kept").touch()
    path.symlink_to(target)
    return f"{path.name} moved"


def mutate_file(path: Path, rng: random.Random) -> str:
    """Damage a file, by its structure where it has one, and say how."""
    data, how = path.read_bytes(), rng.random()
    if how < 0.05:
        path.unlink()
        kind = rng.randrange(5)
        if kind == 1:
            path.mkdir()
        elif kind == 2:
            os.mkfifo(path)
        elif kind > 2:
            path.symlink_to(("/dev/zero", "/nowhere")[kind - 3])
        return f"{path.name} replaced"
    text = data.decode() if path.suffix in (".json", ".jsonl", ".yaml", ".jinja") else ""
    if how < 0.25 or not text:
        path.write_bytes(mutated_bytes(data, rng))
    elif how < 0.5 or path.suffix == ".jinja":
        path.write_text(mutated_text(text, rng), encoding="utf-8", errors="surrogatepass")
    elif path.suffix == ".jsonl":
        lines = text.splitlines()
        i = rng.randrange(len(lines))
        lines[i] = json.dumps(mutated_value(json.loads(lines[i]), rng))
        path.write_text("\n".join([*lines, ""]), encoding="utf-8")
    elif path.suffix == ".yaml":
        path.write_text(
            yaml.safe_dump(mutated_value(yaml.safe_load(text), rng), allow_unicode=True), encoding="utf-8"
        )
    else:
        path.write_text(json.dumps(mutated_value(json.loads(text), rng)), encoding="utf-8")
    return f"{path.name} changed"
