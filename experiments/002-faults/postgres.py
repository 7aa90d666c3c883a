"""Stops and starts the database that mirrors a search; afterwards it must hold every trial.

    python postgres.py [--results results.jsonl] [--bin /usr/lib/postgresql/15/bin]

Needs PostgreSQL's server (Debian: ``apt-get install postgresql``) and the extra `storage`. The database lives in a
scratch directory, at a free port, with a password that only the environment knows. Three searches on `tiny`, one run:
in the first the database is stopped without a shutdown at a third and started at two thirds; in the second it is
stopped for good; the third is the same command once more, with the database back.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from secateur.search import app
from secateur.search.budget import Spent
from secateur.search.controller import Trial
from secateur.search.settings.settings import settings_from
from secateur.search.study.journal import read_journal
from secateur.spaces.measurement import Fidelity

FIDELITY = Fidelity("search", 128)
PASSWORD = "SECATEUR_EXPERIMENT_PASSWORD"
SETTINGS = {
    "model": "tiny",
    "space": {"target": 0.5, "metric": "magnitude"},
    "controller": {"kind": "random"},
    "evaluator": {
        "window": 128,
        "calibration_tokens": 1024,
        "test_tokens": 128,
        "fidelities": [FIDELITY.n_tokens],
    },
}


class Postgres:
    """A server of its own in a scratch directory; as root it runs as the user postgres."""

    def __init__(self, binaries: Path, directory: Path) -> None:
        self._binaries, self._data, self._log = binaries, directory / "data", directory / "log"
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self._as = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
        secret = directory / "password"
        secret.write_text(os.environ[PASSWORD])
        if self._as:
            for path in (directory, secret):
                shutil.chown(path, "postgres")
        sign_in = ["-U", "secateur", "-A", "scram-sha-256", f"--pwfile={secret}"]
        self._run("initdb", "-D", self._data, "--no-sync", *sign_in)

    @property
    def version(self) -> str:
        return self._run("postgres", "--version").strip()

    def start(self) -> None:
        options = f"-p {self.port} -k {self._data.parent} -c listen_addresses=127.0.0.1"
        self._run("pg_ctl", "-D", self._data, "-l", self._log, "-o", options, "-w", "start")

    def stop(self) -> None:
        """As a crash: sessions end at once, nothing is written."""
        self._run("pg_ctl", "-D", self._data, "-m", "immediate", "-w", "stop")

    def _run(self, program: str, *arguments: object) -> str:
        command = [*self._as, str(self._binaries / program), *map(str, arguments)]
        # Into a file: a server would keep a pipe open.
        with tempfile.TemporaryFile("w+") as output:
            done = subprocess.run(command, check=False, cwd="/", stdout=output, stderr=subprocess.STDOUT)
            output.seek(0)
            text = output.read()
        if done.returncode:
            raise RuntimeError(f"{program} failed:\n{text}")
        return text


class At:
    """Acts when a number of evaluations is reached; notes the longest time between rounds before and after."""

    def __init__(self, actions: dict[int, Callable[[], None]]) -> None:
        self._actions, self._last = dict(actions), time.monotonic()
        self._phase = 0  # actions so far
        self.longest = [0.0] * (1 + len(actions))

    def on_start(self, n_known: int, budget: object) -> None:
        self._last = time.monotonic()

    def on_trials(self, trials: list[Trial], spent: Spent) -> None:
        self.longest[self._phase] = max(self.longest[self._phase], time.monotonic() - self._last)
        for number in [n for n in self._actions if spent.evaluations >= n]:
            self._actions.pop(number)()
            self._phase += 1
        self._last = time.monotonic()

    def on_end(self, outcome: object) -> None:
        pass


def compare(run: Path, address: str) -> dict[str, int]:
    """What Optuna reads from the database beside what the run holds."""
    import optuna

    study = optuna.load_study(study_name=(run / "optuna.name").read_text().strip(), storage=address)
    found = {t.user_attrs["candidate"]: t for t in study.get_trials(deepcopy=False)}
    measured = [m for m in read_journal(run / "measurements.jsonl").measurements if m.fidelity == FIDELITY]
    equal = [
        m
        for m in measured
        if m.candidate in found
        and found[m.candidate].values == [m.values[name] for name in study.user_attrs["about"]["objectives"]]
    ]
    return {"measured": len(measured), "in_database": len(study.trials), "equal": len(equal)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--evaluations", type=int, default=150)
    parser.add_argument("--bin", type=Path, help="directory of initdb and pg_ctl")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results.jsonl")
    args = parser.parse_args()
    binaries = args.bin or max(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda p: float(p.parent.name))
    os.environ.setdefault(PASSWORD, secrets.token_urlsafe())
    with tempfile.TemporaryDirectory(prefix="pg") as scratch:
        (Path(scratch) / "server").mkdir()
        Path(scratch).chmod(0o755)
        server = Postgres(binaries, Path(scratch) / "server")
        server.start()
        try:
            row = {
                "experiment": "postgres",
                "server": server.version,
                **measure(args.evaluations, server, Path(scratch)),
            }
        finally:
            server.stop()
    row |= {"cores": os.cpu_count(), "python": platform.python_version()}
    print(json.dumps(row, indent=1))
    with args.results.open("a") as file:
        file.write(json.dumps(row) + "\n")


def measure(n: int, server: Postgres, scratch: Path) -> dict[str, object]:
    run, said = scratch / "run", list[str]()
    address = f"postgresql://secateur:${{{PASSWORD}}}@127.0.0.1:{server.port}/postgres"
    plain = address.replace("postgresql:", "postgresql+psycopg:").replace(
        f"${{{PASSWORD}}}", os.environ[PASSWORD]
    )

    def say(line: str) -> None:
        said.append(line)
        print(f"{time.monotonic() - began:6.1f} s  {line}", flush=True)

    def search(n_evaluations: int, actions: dict[int, Callable[[], None]]) -> At:
        at = At(actions)
        settings = settings_from({**SETTINGS, "storage": address, "budget": {"evaluations": n_evaluations}})
        app.search(settings, run, observers=[at], say=say)
        return at

    def note(what: str, action: Callable[[], None]) -> Callable[[], None]:
        def noted() -> None:
            action()
            say(f"-- {what}")

        return noted

    began = time.monotonic()
    stop, start = note("database stopped", server.stop), note("database started", server.start)
    outage = search(n, {n // 3: stop, 2 * n // 3: start})
    after_outage = compare(run, plain)
    search(2 * n, {n + n // 3: stop})
    start()
    behind = compare(run, plain)
    search(2 * n, {})
    return {
        "after_outage": after_outage,
        "longest_round_s": dict(
            zip(("up", "down", "up again"), (round(s, 2) for s in outage.longest), strict=True)
        ),
        "database_lost": behind,
        "same_command_again": compare(run, plain),
        "said": [line for line in said if "mirror" in line],
        "password_said": any(os.environ[PASSWORD] in line for line in said),
    }


if __name__ == "__main__":
    main()
