"""Loss on held-out text against the tokens that a search spent, for runs that share one level store.

    python curve.py RUNS --levels RUNS/levels --results curve.jsonl [--marks 8192 16384 ...]

At each mark the best candidate so far, by the largest search fidelity that it was measured at by then, is measured on
the test text, which no search saw. Tokens are those of the controller's own measurements: a gradient counts three times
its tokens, and the baselines, which every run measures alike, don't count. Results are appended as they come, and known
candidates are not measured again.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from secateur.search.app.session import open_session
from secateur.search.results.run import Run, open_run
from secateur.search.show.values import spread
from secateur.spaces.measurement import Measurement

MARKS = [8192, 16384, 25600, 61440, 122880, 245760]


def searched(run: Run) -> Iterator[tuple[int, Measurement]]:
    """The controller's own measurements, each with the tokens spent until then."""
    baselines = {trial.number for trial in run.baselines.values()}
    spent = 0
    for trial in run.study.trials:
        m = trial.measurement
        if m.fidelity.part == "gradient" or (m.fidelity.part == "search" and trial.number not in baselines):
            spent += m.n_tokens
            yield spent, m


def spent_by(run: Run) -> int:
    """Tokens of the controller's own measurements."""
    return max((spent for spent, _ in searched(run)), default=0)


def best_at(run: Run, mark: int) -> dict[str, Any] | None:
    """The best candidate within a number of tokens; None if none was measured by then."""
    losses = dict[str, tuple[int, float, int]]()
    for spent, m in searched(run):
        if spent <= mark and m.fidelity.part == "search" and m.infeasible is None:
            known = losses.get(m.candidate, (0, 0.0, 0))
            losses[m.candidate] = max(known, (m.fidelity.n_tokens, m.values["kl"], spent))
    if not losses:
        return None
    largest = max(n_tokens for n_tokens, _, _ in losses.values())
    compared = {text: found for text, found in losses.items() if found[0] == largest}
    text = min(compared, key=lambda t: compared[t][1])
    return {
        "candidate": text,
        "search_kl": compared[text][1],
        "searched_on": largest,
        "spent": compared[text][2],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--levels", type=Path, required=True)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--marks", nargs="+", type=int, default=MARKS)
    args = parser.parse_args()
    args.results.touch()
    known = {
        (row["sparsity"], row["candidate"]): row
        for row in map(json.loads, args.results.read_text().splitlines())
    }
    evaluators: dict[float, Any] = {}
    rows: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for path in sorted(args.runs.glob("*-[0-9]")):
        run = open_run(path)
        target = run.settings.space.target
        total = spent_by(run)
        for mark in [*(mark for mark in args.marks if mark < total), total]:
            found = best_at(run, mark)
            if found is None:
                continue
            key = (target, found["candidate"])
            if key not in known:
                if target not in evaluators:
                    session = open_session(run.settings)
                    session.build_levels(args.levels)
                    evaluators[target] = session.plan.fidelities[-1], session.evaluator(args.levels)
                fidelity, evaluator = evaluators[target]
                (m,) = evaluator.evaluate([found["candidate"]], fidelity)
                known[key] = {"sparsity": target, "candidate": m.candidate, "test_kl": m.values["kl"]}
                known[key] |= {"test_ppl": math.exp(m.values["ce"])}
                with args.results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(known[key]) + "\n")
            arm = f"{path.name.rsplit('-', 1)[0]} @{target}"
            rows.setdefault((arm, mark), []).append(found | known[key])
    print(f"{'arm':<28} {'tokens':>7} {'runs':>4} {'search KL':>22} {'test KL':>22} {'test ppl':>20}")
    for (arm, mark), found_rows in rows.items():
        columns = [spread([row[name] for row in found_rows]) for name in ("search_kl", "test_kl", "test_ppl")]
        print(f"{arm:<28} {mark:>7} {len(found_rows):>4} {columns[0]:>22} {columns[1]:>22} {columns[2]:>20}")


if __name__ == "__main__":
    main()
