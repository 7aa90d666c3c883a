"""Structure at 25 %, recovered by 65,536 tokens: which cut is best afterwards, and what foretells it?

    python run.py RUNS [--parts "tiny: methods" "tiny: order" ...] [--seeds 3]
    python run.py RUNS --tables
    python run.py --foretold

Each line of results.jsonl is one arm and seed, of the order of the trained windows: KL to the dense model in nats a
token, and cross-entropy, on the test text, before the training (the arm's name ends in "untrained") and after it. Arms
of the parts `order` are 20 candidates of nine searches, evenly by the loss that these saw; their lines hold what might
foretell the order after the training, too, on the search text, and `--foretold` prints the rank correlations; those of
the parts `gradient` hold the norm of the KL's gradient at the same candidates. Lines that are there are not measured
again. RUNS keeps the search and the level store of each model.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, lru_cache
from pathlib import Path

import torch
from scipy.stats import spearmanr

from secateur.evaluators.session import Session, set_threads
from secateur.evaluators.trained import own_modules
from secateur.evaluators.training.settings import Training
from secateur.pruners.models.losses import ce_loss, kl_loss
from secateur.search import app
from secateur.search.app.session import plan
from secateur.search.results.run import Run, open_run
from secateur.search.settings.settings import load_settings
from secateur.spaces.measurement import Fidelity

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from arms import command, measure  # noqa: E402  # in the folder above

TOKENS, N_CANDIDATES = 65_536, 20
RATES = {"tiny": 3e-4, "smollm2-135m@wheel": 1e-4}
"""Largest learning rate, of all parameters, with a cosine: the default, and a third of it for the real model."""
RECIPES = ("wanda_sp", "flap", "cfsp", "ziplm", "numerical")
EARLY = {f"2 steps at {rate:.0e}": (2, rate) for rate in (1e-5, 3e-5, 1e-4)} | {"8 steps at 3e-05": (8, 3e-5)}
"""Steps of one window each, and their constant rate: losses that may foretell the order."""
UNTRAINED = "untrained"
METHODS = ("uniform", "trust_region", "evolution", *RECIPES)
PARTS = {f"{model}: {what}": (model, what) for model in RATES for what in ("methods", "order", "gradient")}
ARMS = {
    "methods": [f"{name}{end}" for name in METHODS for end in (f", {UNTRAINED}", "")],
    **{what: [f"candidate {number:02}" for number in range(N_CANDIDATES)] for what in ("order", "gradient")},
}
SEARCHES = {
    "trust_region": ["controller.kind=trust_region"],
    "evolution": ["controller.kind=evolution", "controller.start=uniform"],
}


@lru_cache(maxsize=6)  # those of one seed; each holds the model and the dense model's probabilities
def session(runs: Path, model: str, kind: str, steps: int, rate: float, seed: int):
    """Session that trains candidates before it measures them, and its evaluator."""
    recipes = f"{{kind: recipe, unit: structure, target: 0.25, start: flap, known: [{', '.join(RECIPES)}]}}"
    changes = [f"model={model}", *([f"space={recipes}"] if kind == "recipe" else [])]
    known = plan(load_settings(HERE / "structure.yaml", changes))
    recipe = Training(
        method="full",
        tokens=max(1, steps) * known.window,
        batch=1,
        lr=rate,
        seed=seed,
        schedule="cosine" if steps * known.window == TOKENS else "constant",
    )
    found = Session(replace(known, training=recipe), print)
    levels = runs / f"levels-{model.partition('@')[0]}-{kind}"
    found.build_levels(levels)
    return found, found.evaluator(levels)


def losses(runs: Path, model: str, kind: str, candidate: str, steps: int, rate: float, seed: int, part: str):
    """KL and cross-entropy of a candidate after so many steps, on the search or on the test text."""
    of, evaluator = session(runs, model, kind, steps, rate, seed if steps else 0)
    n_tokens = {"search": 2048, "test": 8192}[part]
    fidelity = Fidelity(part, n_tokens, steps * of.plan.window)
    [found] = evaluator.evaluate([candidate], fidelity)
    return {name: found.values[name] for name in ("kl", "ce")}


@cache
def searched(runs: Path, model: str, name: str, seed: int = 0) -> Run:
    """A search of the architecture, made once."""
    directory = runs / f"{model.partition('@')[0]}-{name}-{seed}"
    settings = load_settings(HERE / "structure.yaml", [f"model={model}", *SEARCHES[name], f"seed={seed}"])
    app.search_in_lines(settings, directory, levels=runs / f"levels-{model.partition('@')[0]}-architecture")
    return open_run(directory)


@cache
def candidates(runs: Path, model: str) -> list[tuple[str, float]]:
    """Candidates of the searches, eight of evolution, evenly by the loss that they saw, and that loss."""
    seen: dict[str, float] = {}
    for run in (
        searched(runs, model, "trust_region"),
        *(searched(runs, model, "evolution", x) for x in range(8)),
    ):
        for trial in run.study.trials:
            m = trial.measurement
            if m.fidelity == run.fidelity and abs(m.values.get("sparsity", 0) - 0.25) < 0.02:
                seen[m.candidate] = m.values["kl"]
    order = sorted(seen.items(), key=lambda item: item[1])
    step = (len(order) - 1) / (N_CANDIDATES - 1)
    return [order[round(index * step)] for index in range(N_CANDIDATES)]


def best(runs: Path, model: str, arm: str) -> tuple[str, str]:
    """Kind of the space and candidate of an arm of the methods."""
    if arm in RECIPES:
        of, _ = session(runs, model, "recipe", 0, 1e-5, 0)
        return "recipe", of.space.baselines()[f"{arm}@0.25"].text
    if arm == "uniform":
        return "architecture", searched(runs, model, "evolution").baselines[
            "uniform@0.25"
        ].measurement.candidate
    run = searched(runs, model, arm)
    fits = [
        trial.measurement
        for trial in run.study.trials
        if trial.measurement.fidelity == run.fidelity
        and abs(trial.measurement.values.get("sparsity", 0) - 0.25) < 0.02
    ]
    return "architecture", min(fits, key=lambda m: m.values["kl"]).candidate


def at_the_cut(runs: Path, model: str, candidate: str, seed: int) -> dict[str, float]:
    """KL and cross-entropy on four training windows, and the norm of the KL's gradient in all kept parameters."""
    of, _ = session(runs, model, "architecture", 0, 1e-5, 0)
    pruner = of.pruner
    try:
        for block, key in enumerate(keys := pruner.keys(of.config(candidate))):
            pruner.apply(block, key)
        pruner.finish(keys[-1])
        cut = own_modules(pruner.anatomy)
    finally:
        pruner.restore()
    cut.model.requires_grad_(True)
    windows = of.training_windows()[4 * seed :][:4]
    with torch.no_grad():
        ce = float(ce_loss(cut, windows))
    with torch.enable_grad():
        kl = kl_loss(cut, windows, pruner.anatomy)
        kl.backward()
    norms = [x.grad.norm() for x in cut.model.parameters() if x.grad is not None]
    return {"kl": float(kl.detach()), "ce": ce, "gradient": float(torch.stack(norms).norm())}


def measured(runs: Path, part: str, arm: str, seed: int) -> dict:
    """KL and cross-entropy on the test text, and what might foretell them."""
    model, what = PARTS[part]
    if what == "gradient":
        return at_the_cut(runs, model, candidates(runs, model)[int(arm.rpartition(" ")[2])][0], seed)
    n_steps = TOKENS // 512
    if what == "methods":
        name, _, untrained = arm.partition(", ")
        kind, candidate = best(runs, model, name)
        return losses(runs, model, kind, candidate, 0 if untrained else n_steps, RATES[model], seed, "test")
    candidate, seen = candidates(runs, model)[int(arm.rpartition(" ")[2])]
    early = {
        name: losses(runs, model, "architecture", candidate, steps, rate, seed, "search")["kl"]
        for name, (steps, rate) in EARLY.items()
    }
    after = losses(runs, model, "architecture", candidate, n_steps, RATES[model], seed, "test")
    return after | {"foretold": {"untrained": seen} | early, "candidate": candidate}


def foretold() -> Iterator[str]:
    """Rank correlations with the mean loss after the training, over the candidates, by what foretells it."""
    lines = [json.loads(line) for line in (HERE / "results.jsonl").read_text("utf-8").splitlines()]
    yield "| model | candidates | foretold by | rank correlation with the KL after recovery |"
    yield "|---|---:|---|---:|"
    for part, (model, what) in PARTS.items():
        of = [line for line in lines if line["part"] == part] if what == "order" else []
        arms = sorted({line["arm"] for line in of})
        if len(arms) < 3:
            continue
        seeds = set.intersection(*({x["seed"] for x in of if x["arm"] == arm} for arm in arms))
        of = [line for line in of if line["seed"] in seeds]  # of seeds that all arms have
        after = [statistics.mean(x["kl"] for x in of if x["arm"] == arm) for arm in arms]
        for name in of[0]["foretold"]:
            early = [statistics.mean(x["foretold"][name] for x in of if x["arm"] == arm) for arm in arms]
            yield f"| {model} | {len(arms)} | {name} | {spearmanr(early, after).statistic:.2f} |"
        at_cut = [x for x in lines if x["part"] == f"{model}: gradient"]
        for name, title in {"kl": "KL on four training windows", "gradient": "norm of its gradient"}.items():
            early = [statistics.mean(x[name] for x in at_cut if x["arm"] == arm) for arm in arms]
            yield f"| {model} | {len(arms)} | {title} | {spearmanr(early, after).statistic:.2f} |"


def main() -> None:
    parser = command(__doc__, PARTS)
    parser.add_argument("runs", type=Path, nargs="?", default=Path("runs"))
    parser.add_argument("--foretold", action="store_true")
    args = parser.parse_args()
    if args.foretold:
        print("\n".join(foretold()))
        return
    set_threads(1)
    runs = args.runs.resolve()
    arms = {part: ARMS[what] for part, (_, what) in PARTS.items()}
    headings = {
        part: f"{part}, 25 % of the structure, {TOKENS:,} trained tokens"
        for part, (_, what) in PARTS.items()
        if what == "methods"
    }
    measure(HERE, args, arms, lambda part, arm, seed: measured(runs, part, arm, seed), headings)


if __name__ == "__main__":
    main()
