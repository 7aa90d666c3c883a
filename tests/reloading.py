"""Exports reloaded by processes forked from one that holds the stock libraries and nothing of ours.

Each is as fresh as one that starts from nothing, without the seconds in which that one imports torch and transformers.
`test_export` and `test_formats` start theirs from nothing.
"""

from __future__ import annotations

import json
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

_PARENT = """
import json, os, runpy, sys, tempfile, traceback
import safetensors.torch, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, dynamic_module_utils
from transformers.models.llama import modeling_llama

for line in sys.stdin:
    request = json.loads(line)
    with tempfile.TemporaryFile() as output:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                os.environ.clear()
                os.environ.update(request["env"])
                dynamic_module_utils.HF_MODULES_CACHE = os.environ["HF_MODULES_CACHE"]
                sys.argv = request["argv"]
                runpy.run_path(sys.argv[0], run_name="__main__")
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        output.seek(0)
        said = output.read().decode(errors="replace")
    print(json.dumps({"status": status, "said": said}), flush=True)
"""


@pytest.fixture(scope="session")
def stock_process() -> Iterator[subprocess.Popen[str]]:
    """The process that forks."""
    command = [sys.executable, "-P", "-c", _PARENT]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every export is checked in this process: it takes seconds to start another one."""
    from secateur.pruners.export import export_check, reload

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        try:
            reload.main(Path(command[-2]), Path(command[-1]))
        except Exception:  # noqa: BLE001 — as a process would end
            return subprocess.CompletedProcess(command, 1, "", traceback.format_exc())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(export_check.subprocess, "run", run)


@pytest.fixture
def forked_reload(stock_process: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every export is checked in a fork."""
    from secateur.pruners.export import export_check

    def run(command: list[str], *, env: dict[str, str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert stock_process.stdin is not None
        assert stock_process.stdout is not None
        assert command[:2] == [sys.executable, "-P"]
        stock_process.stdin.write(json.dumps({"argv": command[2:], "env": dict(env)}) + "\n")
        stock_process.stdin.flush()
        answer = json.loads(stock_process.stdout.readline())
        return subprocess.CompletedProcess(command, answer["status"], answer["said"], answer["said"])

    monkeypatch.setattr(export_check, "subprocess", SimpleNamespace(run=run, DEVNULL=subprocess.DEVNULL))
