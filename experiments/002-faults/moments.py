"""``kill -9`` at random moments of a run's life, from its levels to a recovered model; then the same command again.

    python moments.py [local ray] [--chains 5] [--seed 0] [--results moments.jsonl]

A chain is one run on `tiny` that is killed once in each of eight stages: while levels are built, in the baselines, in
the search, in the test measurement, in `report`, `prune`, `export` and `recover`. The moment is the beginning of the
stage and a random share of the time that it takes undisturbed. Each command is a process of its own, forked from one
that has loaded torch, and is repeated until it ends by itself. After a chain: no measurement that was whole at a kill
is lost, none is there twice, trials and models are those of the undisturbed chain, and nothing is left beside them.

A row a chain is appended to the results as it comes; chains that are there are not repeated, so that this command
continues after a kill of its own. Needs Linux.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import itertools
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nodes import LIMIT_S, PERIOD_S, descendants, kill
from own_ray import n_lines, trials

from secateur.evaluators import session  # noqa: F401  # loads torch once, for all that are forked
from secateur.search import app, cli
from secateur.search.study.journal import read_journal

SETTINGS = """
model: tiny
space: {kind: allocation, metric: sparsegpt, target: [0.5, 0.6]}
controller: {kind: evolution, offspring: 8}
evaluator: {window: 64, calibration_tokens: 1024, fidelities: [256, 512], test_tokens: 2048}
budget: {evaluations: 48}
"""
EXECUTORS = {
    "local": "executor: {kind: local, threads: 1}\n",
    "ray": "executor: {kind: ray, workers: 2, deterministic: true}\n",
}
N_BASELINES = 3
RECOVER = ["--method", "norms", "--tokens", "8192"]


def commands(place: Path) -> dict[str, list[str]]:
    """Commands of a chain, in order."""
    run = str(place / "run")
    bound = ["--sparsity", "0.6"]
    return {
        "search": ["search", str(place.parent / "settings.yaml"), "--run", run],
        "report": ["report", run],
        "prune": ["prune", "tiny", "--recipe", "wanda", *bound, "--to", str(place / "pruned")],
        "export": ["export", run, *bound, "--to", str(place / "exported")],
        "recover": ["recover", run, *bound, *RECOVER],
    }


def is_built(said: list[str]) -> bool:
    """True once the last block's levels are there."""
    numbers = [line.split()[-1].split("/") for line in said if line.startswith("building levels ")]
    return any(done == total for done, total in numbers)


Sign = Callable[[list[str], int], bool]
STAGES: dict[str, tuple[str, Sign]] = {
    "build": ("search", lambda said, n: "building levels" in said),
    "baselines": ("search", lambda said, n: is_built(said)),
    "search": ("search", lambda said, n: n >= N_BASELINES),
    "test": ("search", lambda said, n: any(line.startswith("measuring on test text") for line in said)),
    "report": ("report", lambda said, n: True),
    "prune": ("prune", lambda said, n: True),
    "export": ("export", lambda said, n: True),
    "recover": ("recover", lambda said, n: True),
}
"""The command of each stage, and how its beginning is seen: by what was said, and the lines of measurements."""


def child(words: list[str], stages: Path, said: Path) -> None:
    """Process of one command: as `secateur`, but that what it says of its progress goes to a file, too. Ends here."""
    with contextlib.suppress(BaseException):
        for number, path in ((1, os.devnull), (2, str(said))):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), number)
        search = app.search

        def noted(*positional: Any, say: Callable[[str], None], **named: Any) -> Any:
            def note(line: str) -> None:
                with stages.open("a") as file:
                    print(line, file=file)
                say(line)

            return search(*positional, say=note, **named)

        app.search = noted
        sys.argv = ["secateur", *words]
        try:
            cli.main()
        except SystemExit as ending:
            os._exit(ending.code if isinstance(ending.code, int) else 1)
    os._exit(1)


class Chain:
    """One run and its models.

    Args:
        place: directory of the chain, beside the settings.
    """

    def __init__(self, place: Path) -> None:
        self.place, self.run = place, place / "run"
        place.mkdir()
        self.times: dict[str, float] = {}  # seconds of each stage, of the last command

    def command(self, name: str, stage: str = "", delay: float = 0.0) -> int:
        """Run one command to its end, or kill it so long after the beginning of a stage; its exit status."""
        stages, said = self.place / "stages", self.place / "said"
        stages.write_text("")
        pid, began = os.fork(), time.monotonic()
        if pid == 0:
            child(commands(self.place)[name], stages, said)
        seen: dict[str, float] = {}
        status = None
        while status is None:
            lines, now = stages.read_text().splitlines(), time.monotonic()
            for each, (command, sign) in STAGES.items():
                if command == name and each not in seen and sign(lines, n_lines(self.run)):
                    seen[each] = now
            if now - began > LIMIT_S:
                raise TimeoutError(f"{name}: {said.read_text()[-1000:]}")
            if stage in seen and now - seen[stage] >= delay:
                begun = descendants(pid)
                os.kill(pid, 9)
                status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                self.end(begun)
                return status
            found, ended = os.waitpid(pid, os.WNOHANG)
            status = os.waitstatus_to_exitcode(ended) if found else None
            time.sleep(PERIOD_S / 10)
        marks = [*sorted(seen.items(), key=lambda pair: pair[1]), ("", time.monotonic())]
        self.times |= {each: b - a for (each, a), (_, b) in itertools.pairwise(marks)}
        return status

    @staticmethod
    def end(begun: list[int]) -> None:
        """Wait for what a killed driver had begun, which ends with it; what does not within ten seconds is killed."""
        until = time.monotonic() + 10
        while time.monotonic() < until and any(Path(f"/proc/{pid}").exists() for pid in begun):
            time.sleep(0.1)
        kill([pid for pid in begun if Path(f"/proc/{pid}").exists()])

    def result(self) -> dict[str, str]:
        """Hashes of what must not depend on kills: trials, and the weights of each model."""
        found = {"trials": json.dumps(trials(self.run))}
        models = sorted(self.place.rglob("model.safetensors"))
        found |= {str(path.relative_to(self.place)): path.read_bytes().hex() for path in models}
        return {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in found.items()}

    def rest(self) -> list[str]:
        """Unfinished files and directories, which nothing may leave."""
        paths = self.place.rglob("*")
        return sorted(
            str(x.relative_to(self.place)) for x in paths if x.name.startswith(".") or x.suffix == ".new"
        )


def killed(
    place: Path, rng: random.Random, times: dict[str, float], kept: list[str]
) -> tuple[Chain, dict[str, Any]]:
    """A chain with a kill in each stage: its row; `kept`: hidden files that the undisturbed one keeps, too."""
    chain, kills, before = Chain(place), list[dict[str, Any]](), b""
    lost = 0
    for stage, (name, _) in STAGES.items():
        delay = rng.random() * times[stage]
        status = chain.command(name, stage, delay)
        file = chain.run / "measurements.jsonl"
        data = file.read_bytes() if file.exists() else b""
        lost += not data.startswith(before)
        before = data[: data.rfind(b"\n") + 1]
        kills.append(
            {"stage": stage, "after_s": round(delay, 3), "status": status, "lines": before.count(b"\n")}
        )
        if (status >= 0 or stage in ("test", "report", "prune", "export", "recover")) and chain.command(name):
            raise RuntimeError((place / "said").read_text()[-2000:])
    keys = Counter(m.key for m in read_journal(chain.run / "measurements.jsonl").measurements)
    lines = n_lines(chain.run)
    row = {"kills": sum(one["status"] == -9 for one in kills), "lost": lost, "twice": lines - len(keys)}
    return chain, {**row, "left": sorted({*chain.rest()} - {*kept}), "moments": kills}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("executors", nargs="*", help="default: local ray")
    parser.add_argument("--chains", type=int, default=5, help="of eight kills each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "moments.jsonl")
    args = parser.parse_args()
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0", "OMP_NUM_THREADS": "1"}
    known = (
        [json.loads(line) for line in args.results.read_text().splitlines()] if args.results.exists() else []
    )
    for kind in args.executors or EXECUTORS:
        done = {row["chain"] for row in known if row["executor"] == kind and row["seed"] == args.seed}
        if done >= set(range(args.chains)):
            continue
        scratch = Path(tempfile.mkdtemp(prefix="k", dir="/tmp"))  # Ray's sockets need short paths
        os.environ["RAY_TMPDIR"] = str(scratch)
        try:
            (scratch / "settings.yaml").write_text(SETTINGS + EXECUTORS[kind])
            whole = Chain(scratch / "whole")
            for name in commands(whole.place):
                if whole.command(name):
                    raise RuntimeError((whole.place / "said").read_text()[-2000:])
            expected, kept = whole.result(), whole.rest()
            for number in sorted(set(range(args.chains)) - done):
                rng = random.Random(f"{args.seed}:{kind}:{number}")
                chain, row = killed(scratch / f"c{number}", rng, whole.times, kept)
                found = chain.result()
                differs = sorted(name for name in expected | found if expected.get(name) != found.get(name))
                row = {"executor": kind, "seed": args.seed, "chain": number, **row, "differs": differs}
                print(json.dumps({key: value for key, value in row.items() if key != "moments"}), flush=True)
                with args.results.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                shutil.rmtree(chain.place)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
