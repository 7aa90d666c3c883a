"""Controllers on the embedded model `tiny`, at equal tokens, on text that no search has seen.

    python tiny.py RUNS [--arms evolution surrogate] [--seeds 0 1 2] [--tokens 245760 983040] [--results FILE]

A run that is there is continued, so that a stopped experiment goes on. All arms share one level store.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from secateur.search import app
from secateur.search.results.run import open_run
from secateur.search.settings.settings import settings_from
from secateur.search.show.values import spread
from secateur.search.study.study import trials_of

ALONE = {"levels": [0.6, 0.8]}  # slots measured alone at and above the target; other levels are interpolated
ARMS = {
    "evolution": {"kind": "evolution"},
    "evolution-sensitivity": {"kind": "evolution", "start": "sensitivity", "sensitivity": ALONE},
    "evolution-guided": {"kind": "evolution", "guided": 8},
    "evolution-trust_region": {"kind": "evolution", "start": "trust_region"},
    "evolution-trust_region-guided": {"kind": "evolution", "start": "trust_region", "guided": 8},
    "trust_region": {"kind": "trust_region"},
    "surrogate-curvature": {"kind": "surrogate", "prior": "sensitivity", "sensitivity": {"by": "curvature"}},
    "surrogate": {"kind": "surrogate"},
    "surrogate-sensitivity": {"kind": "surrogate", "prior": "sensitivity", "sensitivity": ALONE},
}


def searched(directory: Path, arm: str, seed: int, n_tokens: int) -> dict[str, object]:
    """Result of a search, run or continued to this number of tokens."""
    settings = settings_from(
        {
            "model": "tiny",
            "space": {"target": 0.6},
            "evaluator": {"fidelities": [512, 2048, 8192], "test_tokens": 24576},
            "objectives": ["loss", "sparsity"],
            "controller": ARMS[arm],
            "executor": {"kind": "local", "threads": 1},
            "budget": {"tokens": n_tokens},
            "seed": seed,
        }
    )
    app.search_in_lines(settings, directory, levels=directory.parent / "levels")
    run = open_run(directory)
    found = [t for t in trials_of(run.study.trials, "search") if t.measurement.fidelity == run.fidelity]
    best = min(
        (t for t in found if t.measurement.values["sparsity"] > 0.5),
        key=lambda t: t.measurement.values["loss"],
    )
    test = run.test_of(best)
    assert test is not None  # the search ends with it
    kl, ppl = test.values["kl"], math.exp(test.values["ce"])
    loss = best.measurement.values["loss"]
    return {"arm": arm, "seed": seed, "tokens": n_tokens, "search_kl": loss, "test_kl": kl, "test_ppl": ppl}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--tokens", nargs="+", type=int, default=[245_760, 983_040])
    parser.add_argument("--results", type=Path)
    args = parser.parse_args()
    args.runs.mkdir(parents=True, exist_ok=True)
    rows = []
    for n_tokens in sorted(args.tokens):
        for arm in args.arms:
            for seed in args.seeds:
                rows.append(searched(args.runs / f"{arm}-{seed}", arm, seed, n_tokens))
                if args.results:
                    with args.results.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(rows[-1]) + "\n")
    print("| controller | tokens | search KL | test KL | test perplexity |\n|---|---:|---:|---:|---:|")
    for arm, n_tokens in dict.fromkeys((row["arm"], row["tokens"]) for row in rows):
        some = [row for row in rows if (row["arm"], row["tokens"]) == (arm, n_tokens)]
        cells = [spread([row[key] for row in some]) for key in ("search_kl", "test_kl", "test_ppl")]
        print(f"| {arm} | {n_tokens:,} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
