"""Hostile inputs by the thousand: what is accepted, refused in one line, or ends otherwise.

    python run.py [KIND ...] [--share 1] [--seed 0] [--jobs 2] [--log DIR] [--results results.jsonl]
    python run.py --only KIND:NUMBER [--seed 0]

Each input has a seed of its own and is given to the code, or to the command, that reads it, in a process of its own
with a limit of CPU time and memory. A table is printed; the exit status is 1 if anything but acceptance or one line of
refusal came. ``--only`` repeats one input, with its traceback; with ``--log`` a run that was killed goes on with what
is missing in its directory. Needs Linux.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

CPU_S, WALL_S = 12, 600
"""Limits of one input; the table counts those over `SLOW_S`."""

SLOW_S, LARGE_MB = 2.0, 300.0
ROOM_BYTES = 2 << 30
"""Address space beyond what the process has at the start of an input."""

COLUMNS = ("inputs", "accepted", "refused", "traceback", "killed", "nonsense", "slow", "large")


def outcome_of(kind: Any, seed: str, place: Path) -> tuple[str, str]:
    """Give one input; what came of it, and what was said."""
    from kinds import NonsenseError

    from secateur.search.show.console import run_command

    nonsense: list[str] = []

    def give() -> None:
        try:
            kind.give(random.Random(seed), place / "input")
        except NonsenseError as error:
            nonsense.append(str(error))

    said = place / "said"
    with said.open("w") as file, contextlib.redirect_stderr(file):
        status = run_command(give)
    lines = said.read_text(errors="replace").splitlines()
    errors = [line for line in lines if line.startswith("secateur: error: ")]
    if nonsense:
        return "nonsense", nonsense[0]
    if status == 0:
        return "accepted", ""
    if "This is a bug" in "".join(errors) or len(errors) != 1 or len(errors[0]) > 1500:
        return "traceback", (errors or lines or ["nothing was said"])[-1][:300] + traceback_in(errors)
    return "refused", errors[0]


def traceback_in(errors: list[str]) -> str:
    """The last lines of a traceback's file, which is removed."""
    found = re.search(r"Its traceback is in (\S+)\.$", "".join(errors))
    if found is None:
        return ""
    text = Path(found[1]).read_text(errors="replace")
    Path(found[1]).unlink()
    return " | " + " | ".join(line.strip() for line in text.splitlines()[-7:])


def child(kind: Any, seed: str, place: Path, pipe: int) -> None:
    """Process of one input: limits, then the input; ends here."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        room = pages * resource.getpagesize() + ROOM_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (room, room))
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        null = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(null, number)
        os.write(pipe, f"{rss_mb()}\n".encode())
        os.chdir(place / "input")
        found = outcome_of(kind, seed, place)
    except BaseException as error:  # noqa: BLE001  # a MemoryError of the harness itself, too
        found = ("traceback", f"{type(error).__name__}: {error}"[:300] + traceback.format_exc()[-500:])
    os.write(pipe, json.dumps(found).encode()[:60_000])
    os._exit(0)


def rss_mb() -> float:
    """Resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


def measure(kind: Any, seed: str, scratch: Path) -> dict[str, Any]:
    """Outcome of one input, with CPU seconds and megabytes beyond those of the process before."""
    place = Path(tempfile.mkdtemp(dir=scratch))
    for name in ("input", "outside"):
        (place / name).mkdir()
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        child(kind, seed, place, write)
    os.close(write)
    ended, status, usage = wait(pid)
    answer = b""
    while part := os.read(read, 1 << 16):
        answer += part
    os.close(read)
    shutil.rmtree(place, ignore_errors=True)
    before, _, answer = answer.partition(b"\n")
    outcome, said = json.loads(answer) if ended and answer else ("killed", f"status {status}")
    cpu = usage.ru_utime + usage.ru_stime
    large = max(0.0, usage.ru_maxrss * 1024 / 1e6 - float(before))
    return {"seed": seed, "outcome": outcome, "said": said, "cpu_s": round(cpu, 2), "mb": round(large, 1)}


def wait(pid: int) -> tuple[bool, int, Any]:
    """Wait for a child; after `WALL_S` it is killed."""
    end = time.monotonic() + WALL_S
    while True:
        found, status, usage = os.wait4(pid, os.WNOHANG)
        if found:
            return os.WIFEXITED(status), status, usage
        if time.monotonic() > end:
            os.kill(pid, 9)
            _, status, usage = os.wait4(pid, 0)
            return False, status, usage
        time.sleep(0.002)


def row_of(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts of a kind."""
    counts = Counter(row["outcome"] for row in rows)
    over = {"slow": sum(r["cpu_s"] > SLOW_S for r in rows), "large": sum(r["mb"] > LARGE_MB for r in rows)}
    most = {"most_cpu_s": max(r["cpu_s"] for r in rows), "most_mb": max(r["mb"] for r in rows)}
    return {"kind": name, "inputs": len(rows), **{key: counts[key] for key in COLUMNS[1:6]}, **over, **most}


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table, with a row of sums."""
    total = {"kind": "all", **{key: sum(row[key] for row in rows) for key in COLUMNS}}
    total |= {key: max(row[key] for row in rows) for key in ("most_cpu_s", "most_mb")}
    print("| kind | inputs | accepted | refused in one line | traceback | killed | nonsense |", end="")
    print(f" over {SLOW_S:g} s | over {LARGE_MB:g} MB | most CPU, s | most memory, MB |")
    print("|---" + "|---:" * 10 + "|")
    for row in [*rows, total]:
        print(
            f"| {row['kind']} | "
            + " | ".join(f"{row[key]:,}" for key in (*COLUMNS, "most_cpu_s", "most_mb"))
            + " |"
        )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kinds", nargs="*", help="default: all")
    parser.add_argument("--share", type=float, default=1.0, help="of the inputs, at least one a kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--results", type=Path, help="file for the table's rows, and for each input that ended badly"
    )
    parser.add_argument(
        "--log", type=Path, help="directory for each outcome as it comes, of which none is repeated"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="kinds at a time")
    parser.add_argument("--say", action="store_true", help="print each input's outcome")
    parser.add_argument("--only", metavar="KIND:NUMBER", help="repeat one input in this process")
    args = parser.parse_args()
    from kinds import KINDS

    with tempfile.TemporaryDirectory(prefix="trust-") as scratch:
        if args.only:
            name, number = args.only.split(":")
            (place := Path(scratch) / "one").mkdir()
            KINDS[name][0](Path(scratch)).give(random.Random(f"{args.seed}:{name}:{number}"), place)
            return 0
        if len(args.kinds) == 1:
            rows, bad = measure_kind(args, *KINDS[args.kinds[0]], Path(scratch))
        else:
            with ThreadPoolExecutor(args.jobs) as pool:
                names = args.kinds or list(KINDS)
                parts = list(
                    pool.map(lambda name: in_process(args, name, Path(scratch) / f"{name}.jsonl"), names)
                )
            rows, bad = ([line for part in parts for line in part[i]] for i in (0, 1))
    show(rows)
    if args.results:
        args.results.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *bad]))
    return int(any(row[key] for row in rows for key in COLUMNS[3:]))


def in_process(
    args: argparse.Namespace, name: str, results: Path
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """One kind in a process of its own: the table's row, and the inputs that ended badly."""
    more = ["--share", str(args.share), "--seed", str(args.seed), "--results", str(results)]
    more += ["--log", str(args.log)] if args.log else []
    done = subprocess.run([sys.executable, __file__, name, *more], stdout=subprocess.DEVNULL, check=False)
    if not results.exists():
        raise RuntimeError(f"The kind {name} ended with status {done.returncode}.")
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    return [line for line in lines if "kind" in line], [line for line in lines if "kind" not in line]


def measure_kind(
    args: argparse.Namespace, make: Any, n: int, scratch: Path
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """All inputs of a kind: the table's row, and the inputs that ended badly."""
    name = args.kinds[0]
    with contextlib.redirect_stderr(None), contextlib.redirect_stdout(None):
        kind = make(scratch)
    gc.collect()
    gc.freeze()  # children share it
    log = (args.log or scratch) / f"{name}.jsonl"
    log.parent.mkdir(parents=True, exist_ok=True)
    known = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    before = {row["seed"]: row for row in known}
    found, bad = [], []
    for number in range(max(1, round(n * args.share))):
        seed = f"{args.seed}:{name}:{number}"
        found.append(before.get(seed) or measure(kind, seed, scratch))
        if seed not in before:
            with log.open("a") as file:
                file.write(json.dumps(found[-1]) + "\n")
        if args.say:
            print(json.dumps(found[-1]))
        if found[-1]["outcome"] not in ("accepted", "refused") or found[-1]["cpu_s"] > SLOW_S:
            bad.append(found[-1])
            print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    return [row_of(name, found)], bad


if __name__ == "__main__":
    sys.exit(main())
