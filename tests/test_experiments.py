"""The committed experiments still start: their arguments are read, and what they import is there."""

import runpy
import sys
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).resolve().parents[1] / "experiments"
TEXTS = {path: path.read_text(encoding="utf-8") for path in EXPERIMENTS.glob("**/*.py")}
SCRIPTS = sorted(
    path
    for path, text in TEXTS.items()
    if "__main__" in text and ("ArgumentParser(" in text or "command(__doc__" in text)  # of `arms.py`
)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_script_says_how_it_is_used(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    monkeypatch.syspath_prepend(str(script.parent))
    before = set(sys.modules)
    with pytest.raises(SystemExit) as ending:
        runpy.run_path(str(script), run_name="__main__")
    for name in set(sys.modules) - before:  # neighbours of a script have the same names elsewhere
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(EXPERIMENTS)):
            del sys.modules[name]
    assert ending.value.code == 0
    assert "usage:" in capsys.readouterr().out
