"""Process that outlives the driver, and says what happened where Ray ended the driver without a word.

The file runs as a script too, without this package or any other: it starts within milliseconds.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

DISMISSED = b"."
TIMEOUT_S = 2.0


class Survivor:
    """Process beside the driver that waits for its end, and prints one line unless it was dismissed before.

    Ray may end its driver at once, as when its raylet leaves. The kernel then closes the pipe that the process reads.

    Args:
        places: (host, port) of the cluster's parts by name: those that don't answer any more are named.
        advice: what to do, for the line.
    """

    def __init__(self, places: Mapping[str, tuple[str, int]], advice: str) -> None:
        command = [sys.executable, "-I", "-S", str(Path(__file__)), json.dumps(dict(places)), advice]
        self._process: subprocess.Popen[bytes] | None = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
        )

    def dismiss(self) -> None:
        """End the process without a line: the driver ends in order, or says itself what happened."""
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(OSError):
                process.communicate(DISMISSED)


def main() -> None:
    """The process: until the driver's end."""
    _, places, advice = sys.argv
    if os.read(0, 1) == DISMISSED:
        return
    silent = [
        f"{name} at {host}:{port}"
        for name, (host, port) in json.loads(places).items()
        if not _answers(host, port)
    ]
    verb = "does not answer" if len(silent) == 1 else "do not answer"
    what = f"{' and '.join(silent)} {verb} any more" if silent else "it was killed, or its Ray ended it"
    line = (
        f"secateur: error: Expected the search to end in order, but its process is gone: {what}. {advice}\n"
    )
    with contextlib.suppress(OSError):  # nobody listens any more
        os.write(2, line.encode())


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=TIMEOUT_S).close()
    except OSError:
        return False
    return True


if __name__ == "__main__":
    main()
