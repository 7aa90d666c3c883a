"""Headless browser for tests of pages: Chromium where there is one, a process of its own for each look."""

import json
import re
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
]


def find_browser() -> str:
    """Path of a browser; without one the test is skipped."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(
            f"Expected a browser ({', '.join(NAMES)}), got none; scripts/test installs one as root on Debian."
        )
    return found


def look(page: Path, width: int, script: str, *, screenshot: Path | None = None, height: int = 900):
    """Value, as JSON, of a script's expression in a page that is as wide as a window.

    The page lies in a frame of the width, as windows of browsers have a least one of 500 pixels. `script` sees its
    `document` as ``doc`` and its `window` as ``win``.
    """
    frame = (
        f'<iframe id="page" width="{width}" height="{height}" style="border:0;display:block" '
        f'srcdoc="{escape(page.read_text(encoding="utf-8"))}"></iframe><pre id="found"></pre>'
        "<script>onload = () => { const win = document.getElementById('page').contentWindow, doc = win.document;"
        f"document.getElementById('found').textContent = JSON.stringify((() => {{ {script} }})()); }}</script>"
    )
    with TemporaryDirectory() as directory:
        harness = Path(directory) / "harness.html"
        harness.write_text(
            f'<!doctype html><meta charset="utf-8"><body style="margin:0">{frame}', encoding="utf-8"
        )
        extra = [] if screenshot is None else [f"--screenshot={screenshot}"]
        command = [find_browser(), *FLAGS, *extra, f"--user-data-dir={directory}/profile"]
        command += [f"--window-size={width},{height}", "--dump-dom", harness.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found is not None, done.stderr[-2000:]
    assert found[1], done.stderr[-2000:]
    return json.loads(unescape(found[1]))
