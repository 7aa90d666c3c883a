"""Measures the allocation rules that need no search, and writes results.jsonl and the tables of README.md.

    python run.py [--model tiny] [--text docs] [--sparsities 0.6 0.7] [--metrics wanda sparsegpt] [--seeds 3]

A seed chooses other calibration windows. Each line of results.jsonl is one recipe: KL to the dense model in nats a
token, and cross-entropy, on the test text. Lines that are there are not measured again; `--tables` writes the
tables alone.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path

from secateur.evaluators.data.text import load_parts, load_sources
from secateur.evaluators.data.tokens import windows
from secateur.evaluators.data.windows import EvaluationData
from secateur.pruners.calibration.tokens import Calibration, Source, tokenize
from secateur.pruners.models.discover import dissect
from secateur.pruners.models.loading import load_model
from secateur.pruners.pruner import DenseModel, pruner_class
from secateur.search.app.recipe_file import RecipeFile
from secateur.spaces.measurement import Fidelity

HERE = Path(__file__).parent
RULES = {
    "uniform": {"rule": "uniform"},
    "OWL, within its range": {"rule": "owl"},
    "OWL, as released": {"rule": "owl_released"},
    "DLP, medians": {"rule": "dlp"},
    "DLP, means as released": {"rule": "dlp", "centre": "mean"},
    "ATP, a quarter of the steepest slope": {"rule": "atp", "slope": 0.25},
    "ATP, half": {"rule": "atp", "slope": 0.5},
    "AlphaPruning, 0.3": {"rule": "alphapruning"},
    "AlphaPruning, 0.1": {"rule": "alphapruning", "epsilon": 0.1},
    "SAP": {"rule": "sap"},
    "DSA": {"rule": "dsa"},
}
CALIBRATION = {"sources": {"calibration": 1}, "samples": 64, "length": 256}
WINDOW, N_TOKENS = 512, 16384
MARKS = "<!-- tables -->", "<!-- end -->"


class Bench:
    """A dense model, and the test text that recipes are measured on."""

    def __init__(self, model: str, text: str) -> None:
        self._loaded = load_model(model, dtype="auto", device="auto", trust_remote_code=False)
        self._anatomy = dissect(self._loaded.model, None)
        parts = load_parts(text, text, text)
        self._source = load_sources({"calibration": text}, text, text, text)["calibration"]
        self._text, self._fidelity = text, Fidelity("test", N_TOKENS)
        test = windows(self._loaded.tokenizer, parts["test"], WINDOW, N_TOKENS, bos=None)
        self._data = EvaluationData(self._anatomy, {"test": test}, [self._fidelity])
        self.dense = self._losses()

    def _losses(self) -> dict[str, float]:
        means = self._data.live_losses(self._fidelity)
        return {name: float(means[name]) for name in ("kl", "ce")}

    def pruner(self, seed: int):
        recipe = {"unit": "weights", "sparsity": 0.5, "calibration": CALIBRATION}
        file = RecipeFile(recipe=recipe, sources={"calibration": self._text}, seed=seed)
        tokens = tokenize(self._loaded.tokenizer, self._source.text, file.pool_tokens)
        source = Source(tokens, self._source.sha256, self._source.source)
        dense = DenseModel.of(self._loaded, self._anatomy, WINDOW, blocks=False)
        calibration = Calibration(tokens[:0].view(0, 1), self._text, {"calibration": source})
        return pruner_class(file)(file, dense, seed=seed, calibration=calibration)

    def measure(self, pruner, metric: str, rule: dict, sparsity: float) -> dict[str, float]:
        recipe = {"unit": "weights", "sparsity": sparsity, "calibration": CALIBRATION, "metric": metric}
        file = RecipeFile(recipe=recipe | {"allocation": rule}, sources={"calibration": self._text})
        for block, key in enumerate(pruner.keys(file.form)):
            pruner.apply(block, key)
        found = self._losses()
        pruner.restore()
        return found


def table(lines: list[dict], sparsity: float, metrics: list[str]) -> list[str]:
    """Rules in the order of the last metric's KL: mean, and range over the seeds."""
    found = [
        f"### {sparsity:.0%} of the weights",
        "",
        f"| rule | {' | '.join(f'{m}: KL | perplexity' for m in metrics)} |",
    ]
    found.append("|---|" + "---:|---:|" * len(metrics))
    rows = []
    for name in RULES:
        cells, last = [], math.inf
        for metric in metrics:
            same = [x for x in lines if (x["rule"], x["metric"], x["sparsity"]) == (name, metric, sparsity)]
            if not same:
                cells += ["–", "–"]
                continue
            kl = [x["kl"] for x in same]
            last = statistics.mean(kl)
            spread = f" ({min(kl):.3f} to {max(kl):.3f})" if len(kl) > 1 else ""
            cells.append(f"{last:.3f}{spread}")
            cells.append(f"{math.exp(statistics.mean(x['ce'] for x in same)):.1f}")
        rows.append((last, f"| {name} | {' | '.join(cells)} |"))
    return [*found, *(row for _, row in sorted(rows)), ""]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--text", default="docs")
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.6, 0.7])
    parser.add_argument("--metrics", nargs="+", default=["wanda", "sparsegpt"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tables", action="store_true")
    args = parser.parse_args()
    path = HERE / "results.jsonl"
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []
    if not args.tables:
        bench = Bench(args.model, args.text)
        done = {(x["rule"], x["metric"], x["sparsity"], x["seed"]) for x in lines}
        for seed in range(args.seeds):
            pruner = bench.pruner(seed)
            for metric in args.metrics:
                for sparsity in args.sparsities:
                    for name, rule in RULES.items():
                        if (name, metric, sparsity, seed) in done:
                            continue
                        of = {
                            "model": args.model,
                            "rule": name,
                            "metric": metric,
                            "sparsity": sparsity,
                            "seed": seed,
                        }
                        line = (
                            of
                            | bench.measure(pruner, metric, rule, sparsity)
                            | {"dense_ce": bench.dense["ce"]}
                        )
                        lines.append(line)
                        with path.open("a", encoding="utf-8") as file:
                            file.write(json.dumps(line) + "\n")
    measured = sorted({line["sparsity"] for line in lines})
    tables = [line for sparsity in measured for line in table(lines, sparsity, args.metrics)]
    readme = HERE / "README.md"
    text = readme.read_text("utf-8")
    before, after = text[: text.index(MARKS[0])], text[text.index(MARKS[1]) :]
    readme.write_text("\n".join([before + MARKS[0], "", *tables, after]), encoding="utf-8")
    print("\n".join(tables))


if __name__ == "__main__":
    main()
