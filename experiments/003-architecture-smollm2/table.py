"""Prints the table of the runs, on the test part; with --tokens each model is trained for a moment, too.

    python table.py RUNS [--tokens 16384] [--rate 3e-5] [--results results.jsonl]

A row is the best candidate of an arm at the target at the largest fidelity, or a baseline of the uniform arm. With
--tokens all are trained equally: every parameter, distilled from the dense model, on the calibration part, from the
weights that the search measured. What was done is kept in the results and not done again.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from secateur.evaluators.training.settings import Training
from secateur.search.controller import Trial
from secateur.search.results.run import Run, open_run
from secateur.search.show.values import spread

TARGET = 0.25


def rows_of(name: str, run: Run) -> Iterator[tuple[str, Trial]]:
    """The rows that a run gives, by arm."""
    arm = name.rsplit("-", 1)[0]
    if arm == "uniform":
        for label, trial in run.baselines.items():
            if label.endswith(f"@{TARGET}"):
                yield label.partition("@")[0], trial
    elif arm != "front":
        given = {trial.measurement.candidate for trial in run.baselines.values()}
        found = [
            trial
            for trial in run.study.trials
            if trial.measurement.fidelity == run.fidelity
            and trial.measurement.candidate not in given
            and abs(trial.measurement.values.get("sparsity", 0) - TARGET) < 0.02
        ]
        if found:  # a greedy removal may have run out of tokens on its way
            yield arm, min(found, key=lambda t: t.measurement.values["loss"])


class Recovery:
    """Trains candidates equally, as a fidelity does, on the calibration part, from the weights that were searched.

    Args:
        directory: of the runs.
        n_tokens: trained on, one window a step.
        rate: of learning, the same in all steps.
    """

    def __init__(self, directory: Path, n_tokens: int, rate: float) -> None:
        from secateur.evaluators.session import Session, set_threads
        from secateur.search.app.session import plan
        from secateur.spaces.measurement import Fidelity

        runs = map(open_run, sorted(directory.glob("*-[0-9]")))
        first = next(run for run in runs if run.fidelity.n_trained == 0)
        set_threads(1)
        known = plan(first.settings)
        test = known.fidelities[-1]
        self._fidelity = Fidelity("test", test.n_tokens, n_tokens)
        recipe = Training(method="full", loss="kl", tokens=n_tokens, batch=1, lr=rate, schedule="constant")
        session = Session(
            replace(known, training=recipe, fidelities=(*known.fidelities, self._fidelity)), print
        )
        levels = directory / "levels"
        session.build_levels(levels)
        self._evaluator = session.evaluator(levels)

    def losses(self, candidate: str) -> dict[str, float]:
        """On the test windows, after training."""
        [found] = self._evaluator.evaluate([candidate], self._fidelity)
        return {f"{name}_recovered": found.values[name] for name in ("kl", "ce")}

    def before(self, candidate: str) -> dict[str, float]:
        """On the test windows, as searched."""
        [found] = self._evaluator.evaluate([candidate], replace(self._fidelity, n_trained=0))
        return {f"{name}_searched": found.values[name] for name in ("kl", "ce")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--tokens", type=int, default=0)
    parser.add_argument("--rate", type=float, default=3e-5)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results.jsonl")
    args = parser.parse_args()
    text = args.results.read_text(encoding="utf-8") if args.results.exists() else ""
    known = {
        (row["run"], row["arm"], row["candidate"], row["tokens"]): row
        for row in map(json.loads, text.splitlines())
    }
    arms, recovery = defaultdict(list), Recovery(args.runs, args.tokens, args.rate) if args.tokens else None
    for path in sorted(args.runs.glob("*-[0-9]")):
        run = open_run(path)
        for arm, trial in rows_of(path.name, run):
            m, key = trial.measurement, (path.name, arm, trial.measurement.candidate, args.tokens)
            if key not in known:
                test = run.test_of(trial)
                row = dict(zip(("run", "arm", "candidate", "tokens"), key, strict=True))
                row |= {
                    "search_kl": m.values["kl"],
                    "params": m.values["params"],
                    "sparsity": m.values["sparsity"],
                }
                row |= {"spent": run.study.spent.tokens}
                if test is not None and not test.fidelity.n_trained:
                    row |= {f"{name}_searched": test.values[name] for name in ("kl", "ce")}
                elif recovery is not None:
                    row |= recovery.before(m.candidate)
                row |= {} if recovery is None else recovery.losses(m.candidate)
                known[key] = row
                with args.results.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
            arms[arm].append(known[key])
    stages = ("searched", "recovered") if args.tokens else ("searched",)
    heads = [f"{stage}: test KL | perplexity" for stage in stages]
    print(f"| arm | runs | tokens | search KL | {' | '.join(heads)} | M parameters |")
    print("|---|---:|---:|---:|" + "---:|---:|" * len(stages) + "---:|")
    for arm, rows in sorted(arms.items(), key=lambda item: -middle(item[1], "search_kl")):
        cells = [spread([row["search_kl"] for row in rows], ".3f")]
        for stage in stages:
            cells.append(spread([row[f"kl_{stage}"] for row in rows if f"kl_{stage}" in row], ".3f"))
            cells.append(
                spread([math.exp(row[f"ce_{stage}"]) for row in rows if f"ce_{stage}" in row], ".1f")
            )
        spent, params = middle(rows, "spent"), middle(rows, "params") / 1e6
        print(f"| {arm} | {len(rows)} | {spent:,.0f} | {' | '.join(cells)} | {params:.1f} |")


def middle(rows: list[dict], key: str) -> float:
    return statistics.median(row[key] for row in rows)


if __name__ == "__main__":
    main()
