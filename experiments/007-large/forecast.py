"""Forecast beside truth: searches and prunings, each in a process of its own.

python forecast.py                     # all cases, appended to forecast.jsonl, and the table
python forecast.py --cases tiny-wanda  # some of them
python forecast.py --table             # the table alone, from forecast.jsonl
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "forecast.jsonl"

_TINY = {"window": 256, "calibration_tokens": 8192, "fidelities": [2048, 8192], "test_tokens": 8192}
_SMOLLM2 = {"window": 256, "calibration_tokens": 4096, "fidelities": [1024], "test_tokens": 1024}
_1B = {"window": 256, "calibration_tokens": 512, "fidelities": [512], "test_tokens": 512}
EVOLUTION = {"kind": "evolution"}
CASES: dict[str, dict[str, Any]] = {
    "tiny-wanda": {"search": {"evaluator": _TINY, "controller": EVOLUTION, "budget": {"evaluations": 40}}},
    "tiny-random": {
        "search": {"evaluator": _TINY, "controller": {"kind": "random"}, "budget": {"evaluations": 20}}
    },
    "tiny-sparsegpt": {
        "search": {
            "space": {"metric": "sparsegpt"},
            "evaluator": _TINY,
            "controller": EVOLUTION,
            "budget": {"evaluations": 20},
        }
    },
    "tiny-architecture": {
        "search": {
            "space": {"kind": "architecture"},
            "evaluator": _TINY,
            "controller": EVOLUTION,
            "budget": {"evaluations": 40},
        }
    },
    "tiny-gradients": {"search": {"evaluator": _TINY, "budget": {"evaluations": 10}}},
    "tiny-prune-wanda": {"prune": "wanda"},
    "tiny-prune-flap": {"prune": "flap"},
    **{f"tiny-prune-{name}": {"prune": name} for name in ("apt", "sheared", "besa", "loraprune", "pat")},
    "smollm2-wanda": {
        "search": {
            "model": "smollm2-135m",
            "evaluator": _SMOLLM2,
            "controller": {"kind": "random"},
            "budget": {"evaluations": 6},
        }
    },
    "smollm2-architecture": {
        "search": {
            "model": "smollm2-135m",
            "space": {"kind": "architecture", "importance": "wanda_sp", "repair": "none"},
            "evaluator": _SMOLLM2,
            "controller": {"kind": "random"},
            "budget": {"evaluations": 6},
        }
    },
    "smollm2-prune-wanda": {"prune": "wanda", "model": "smollm2-135m"},
    "1b-search": {
        "shapes": "llama-3.2-1b",  # random weights
        "search": {
            "dtype": "float32",
            "evaluator": _1B,
            "controller": {"kind": "random"},
            "budget": {"evaluations": 16},
        },
    },
}


def measure(name: str) -> dict[str, Any]:
    """Forecast and truth of a case, in this process."""
    case = CASES[name]
    with tempfile.TemporaryDirectory() as place:
        forecast, truth = (_search if "search" in case else _prune)(case, Path(place))
    foreseen = {key: forecast[key] for key in ("driver", "seconds", "tokens")} | {
        "disk": forecast["peak"]["disk"]
    }
    steps = {x["name"]: x["seconds"] for x in forecast["work"]}
    return {"case": name, "foreseen": foreseen, "truth": truth, "steps": steps}


def _search(case: dict[str, Any], place: Path) -> tuple[dict[str, Any], dict[str, float]]:
    from secateur.search import app
    from secateur.search.app.forecast_search import forecast_search
    from secateur.search.settings.settings import settings_from
    from secateur.search.study.foreseen import read_foreseen

    values = dict(case["search"])
    if "shapes" in case:
        from stream import SHAPES, write_model  # beside this file

        values["model"] = str(place / "model")
        Path(values["model"]).mkdir()
        write_model(Path(values["model"]), SHAPES[case["shapes"]])
    settings = settings_from(values)
    forecast = forecast_search(settings, place / "run")
    app.search(settings, place / "run", forecast=lambda note: forecast)
    found = read_foreseen(place / "run")
    assert found is not None, "written at the end of each search"
    return found


def _prune(case: dict[str, Any], place: Path) -> tuple[dict[str, Any], dict[str, float]]:
    from secateur.pruners.models.memory import forget_peak, resident_bytes
    from secateur.search import app
    from secateur.search.app.forecast_prune import forecast_prune
    from secateur.search.app.recipe_file import file_for
    from secateur.search.study.foreseen import disk_bytes

    file, _ = file_for(case["prune"], 0.3)
    model = case.get("model", "tiny")
    measured = {"tokens": 2048, "window": 256}
    forecast = forecast_prune(file, model, **measured, to=place)
    forget_peak()
    started = time.perf_counter()
    app.prune(file, model, place / "model", **measured)
    seconds = time.perf_counter() - started
    truth = {"driver": resident_bytes("VmHWM"), "disk": disk_bytes(place), "seconds": seconds}
    return forecast.to_json(), truth


def table() -> str:
    """Forecast and truth of all measurements, in their order, as Markdown."""
    rows = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    lines = [
        "| case | memory, MB: foreseen | truth | off | time, s: foreseen | truth | off | disk, MB: foreseen | truth |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        foreseen, truth = row["foreseen"], row["truth"]
        expected, most = foreseen["driver"], truth["driver"]
        memory = f"{expected / 1e6:.0f} | {most / 1e6:.0f} | {_off(expected, most)}"
        seconds, off = "–", "–"
        if foreseen["seconds"] is not None:
            seconds, off = f"{foreseen['seconds']:.1f}", _off(foreseen["seconds"], truth["seconds"])
        disk = f"{foreseen['disk'] / 1e6:.2f} | {truth['disk'] / 1e6:.2f}"
        lines.append(f"| {row['case']} | {memory} | {seconds} | {truth['seconds']:.1f} | {off} | {disk} |")
    return "\n".join(lines)


def _off(foreseen: float, truth: float) -> str:
    return f"{foreseen / truth - 1:+.0%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES), help="names, separated by commas")
    parser.add_argument("--table", action="store_true", help="print the table alone")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(given.one)))
        return
    for name in () if given.table else given.cases.split(","):
        command = [sys.executable, str(Path(__file__).resolve()), "--one", name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{name}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
            continue
        line = done.stdout.strip().splitlines()[-1]
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(line, file=sys.stderr)
    print(table())


if __name__ == "__main__":
    main()
