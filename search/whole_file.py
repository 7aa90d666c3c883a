"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from secateur.search.study.journal import no_room


def replace_file(path: Path, text: str) -> None:
    """Write the file whole or not at all; an equal one is left alone.

    Raises:
        StudyWriteError: if the disk is full.
        OSError: if it can't be written for another reason.
    """
    with contextlib.suppress(FileNotFoundError, UnicodeDecodeError):
        if path.read_text(encoding="utf-8") == text:
            return
    new = path.with_name(path.name + ".new")
    try:
        with new.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        with contextlib.suppress(OSError):
            new.unlink()
        raise no_room(error, path, "nothing was changed") from error
    new.replace(path)
