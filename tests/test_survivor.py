"""The process that outlives a driver."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import textwrap

import pytest

ADVICE = "All finished measurements are safe. Continue with: secateur search s.yaml"
DRIVER = f"""
    import os, signal, subprocess, sys, time
    from secateur.search.executors.cluster.survivor import Survivor
    survivor = Survivor({{"this node's raylet": ("127.0.0.1", int(sys.argv[1]))}}, {ADVICE!r})
    inherits = subprocess.Popen(["sleep", "30"])  # as Ray's processes do; it must not keep the pipe open
    print(inherits.pid, flush=True)
    if sys.argv[2] == "dismiss":
        survivor.dismiss()
        survivor.dismiss()
    elif sys.argv[2] == "exit":
        os._exit(1)
    else:
        os.kill(os.getpid(), int(sys.argv[2]))
"""


def end(port: int, how: str) -> tuple[int, str]:
    """Status of a driver that ends so, and what is said until nobody holds its stderr any more."""
    command = [sys.executable, "-c", textwrap.dedent(DRIVER), str(port), how]
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    inherits = int(driver.stdout.readline())
    try:
        status = driver.wait(60)
        os.kill(inherits, signal.SIGSTOP)  # still there while the survivor speaks
        assert driver.stderr is not None
        said = driver.stderr.readline() if how != "dismiss" else ""
    finally:
        os.kill(inherits, signal.SIGKILL)
    rest = driver.communicate(timeout=60)[1]
    return status, said + rest


@pytest.fixture
def listening():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize(("how", "status"), [("exit", 1), ("9", -9)])
def test_a_driver_that_is_gone_without_a_word_is_spoken_for(listening, how, status):
    assert end(listening, how) == (
        status,
        f"secateur: error: Expected the search to end in order, but its process is gone: it was killed, or its Ray "
        f"ended it. {ADVICE}\n",
    )


def test_what_does_not_answer_any_more_is_named(listening):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    assert (
        f"gone: this node's raylet at 127.0.0.1:{port} does not answer any more. {ADVICE}"
        in end(port, "9")[1]
    )


def test_a_driver_that_ends_in_order_is_not(listening):
    assert end(listening, "dismiss") == (0, "")
