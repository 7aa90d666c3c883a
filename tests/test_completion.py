"""Completion of commands in a shell, by typer's scripts."""

import os
import shutil
import subprocess
import sys

import pytest

from secateur.search.cli import COMMANDS, COMPLETE
from secateur.search.settings.presets import PRESETS
from secateur.spaces.recipe.known import KNOWN


def answered(monkeypatch, secateur, words: str) -> list[str]:
    """What bash is offered in place of the last of the words."""
    monkeypatch.setenv(COMPLETE, "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split(" ")) - 1))
    status, out, _ = secateur()
    assert not status
    return out.split()


def test_commands_options_and_names_are_completed(monkeypatch, secateur):
    assert set(answered(monkeypatch, secateur, "secateur ")) == {*COMMANDS}
    assert answered(monkeypatch, secateur, "secateur pu") == ["push"]
    assert answered(monkeypatch, secateur, "secateur push --up") == ["--upload"]
    assert answered(monkeypatch, secateur, "secateur list me") == ["methods", "metrics"]
    assert answered(monkeypatch, secateur, "secateur init --preset ") == [*PRESETS]
    sparse = [name for name in KNOWN if name.startswith("s")]
    assert answered(monkeypatch, secateur, "secateur prune tiny --recipe s") == sparse


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_there_is_a_script_for_each_shell(monkeypatch, secateur, shell):
    monkeypatch.setenv(COMPLETE, f"source_{shell}")
    status, out, _ = secateur()
    assert (bool(status), f"{COMPLETE}=complete_{shell}" in out) == (False, True)


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_with_the_script(tmp_path):
    program = tmp_path / "secateur"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m secateur.search.cli "$@"\n')
    program.chmod(0o755)
    script = (
        f'eval "$({COMPLETE}=source_bash secateur)"\n'
        "COMP_WORDS=(secateur stat) COMP_CWORD=1\n_secateur_completion secateur\n"
        'echo "${COMPREPLY[@]}"\n'
    )
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.stdout.strip(), done.stderr) == ("status", "")
