"""The command line in this process."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest


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
