"""The command line in this process, and a run for it to read."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from secateur.search.results.run import Run


@pytest.fixture
def secateur(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Runs the command: its exit status, stdout and stderr."""
    from secateur.search import cli

    monkeypatch.delenv("SECATEUR_DEBUG", raising=False)

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["secateur", *map(str, arguments)])
        with pytest.raises(SystemExit) as ending:
            cli.main()
        out, err = capsys.readouterr()
        return ending.value.code, out, err  # type: ignore[return-value]

    return call


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A finished run, which tests of a module share and leave as it is."""
    from tests.runs import make_run

    return make_run(tmp_path_factory.mktemp("made") / "run")


def is_one_line(err: str) -> bool:
    """Whether the command said an error, and nothing else."""
    return re.fullmatch(r"secateur: error: [^\n]+\n", err) is not None
