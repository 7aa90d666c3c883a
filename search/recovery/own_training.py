"""Training runs that may be continued: those that this user began on this machine."""

from __future__ import annotations

import secrets
from pathlib import Path

from secateur.search.errors import UsageError

TOKEN = "begun"


def claim(directory: Path, records: Path) -> None:
    """Begin a directory of training runs, or check that it was begun here.

    Ray Tune continues from pickles, which run code: a run directory that came from somebody else must not hold them. So
    a new directory gets a random token, of which a copy is kept outside, by the directory's place on the disk: a run
    may be moved, and a copy of it is not continued.

    Args:
        directory: of Tune's files; made if it is missing.
        records: directory of the copies, the user's own.

    Raises:
        UsageError: if there is something in it and it was not begun here.
        OSError: if a file can't be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    at = directory.stat()
    record, token = records / f"{at.st_dev}-{at.st_ino}", directory / TOKEN
    if not any(directory.iterdir()):
        text = secrets.token_hex(16)
        records.mkdir(parents=True, exist_ok=True)
        for path in (record, token):
            path.write_text(text, encoding="ascii")
        return
    try:
        same = secrets.compare_digest(record.read_bytes(), token.read_bytes())
    except OSError:  # one of them is missing
        same = False
    if not same:
        raise UsageError(
            f"Expected training that was begun here, got {directory} from elsewhere, whose pickles would run code. "
            f"Remove it to train anew."
        )
