"""EvoPress's released search on the levels, the text parts and the number of tokens of run.py, measured like its arms.

    python evopress.py LEVELS CHECKOUT LOSSES --text FILE [--model DIR] [--seed 0] [--generations 24] [--results FILE]

LEVELS is the level store of run.py, CHECKOUT a clone of github.com/IST-DASLab/EvoPress (arXiv 2410.14649), LOSSES a
file in which a seed's losses are kept, so that the same command goes on with a run that was stopped. The main function
of its `evo_prune_search.py` runs unchanged. What it takes from disk or network comes from here:

- Weights come from the store. Its level 0 is the target's level, its levels below and above are the neighbours.
- It draws its minibatches from all windows of the search part; the dense model's logits are computed when needed.
- It holds no sparsity: there, a level is a fixed number of weights, so that any two layers can be switched. Here a
  level is a sparsity, so that a layer is only offered a partner of its own size: the rule by which its quantisation
  search pairs layers (`group_rule size`).
- Its perplexities, which it only prints, are left out.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from secateur.evaluators.data.text import load_parts
from secateur.evaluators.data.tokens import windows
from secateur.evaluators.session import Session
from secateur.pruners.weights.level_store import LevelStore
from secateur.search import app
from secateur.search.settings.settings import load_settings
from secateur.spaces.allocation.space import Allocation

HERE = Path(__file__).parent
ANY = "unused"  # for arguments that its parser requires and nothing here reads


class Database:
    """A directory of sparse weights as the search expects it: ``<layer>/<level>.pth``, level 0 at the target."""

    def __init__(self, session: Session, levels: Path) -> None:
        self._store = LevelStore(levels, session.anatomy, session.space.levels)
        self._linears = {linear.name: linear for linear in session.anatomy.linears}
        (self._zero,) = set(session.space.baselines()["uniform@0.6"].levels)
        self._n_levels = len(session.space.levels)
        self._first: str | None = None

    def index(self, level: int) -> int:
        """The store's level."""
        return self._zero + level

    def exists(self, path: str) -> bool:
        """Asked for the layer that goes down until there is one, then for the one that goes up, in turns."""
        name, level = _split(path)
        if not 0 <= self.index(level) < self._n_levels:
            return False
        if self._first is None:
            self._first = name
            return True
        fits = self._linears[name].n_weights == self._linears[self._first].n_weights
        self._first = None if fits else self._first
        return fits

    def load(self, path: str, map_location: object = None) -> torch.Tensor:
        name, level = _split(path)
        return self._store.weight(self._linears[name], self.index(level))


def _split(path: str) -> tuple[str, int]:
    return Path(path).parent.name, int(Path(path).stem)


class Losses:
    """Each loss that the search asks for, with its tokens, in order and in a file.

    The search draws from its seed alone, so that a run that was stopped goes on by asking again: what is in the file
    is not computed twice.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self._known = [json.loads(line) for line in lines]
        self.tokens = self.evaluations = 0

    def of(self, n_tokens: int, compute: Callable[[], float]) -> float:
        """The next one."""
        if self.evaluations < len(self._known):
            tokens, loss = self._known[self.evaluations]
            assert tokens == n_tokens, f"{self._path} is of another search"
        else:
            loss = compute()
            with self._path.open("a", encoding="utf-8") as file:
                file.write(f"{json.dumps([n_tokens, loss])}\n")
        self.tokens += n_tokens
        self.evaluations += 1
        return float(loss)


def prepare(search: ModuleType, session: Session, database: Database, losses: Losses, seed: int) -> None:
    """Give the search what it would load: model, data, weights."""
    plan, dense, student = session.plan, session.loaded.model, copy.deepcopy(session.loaded.model)
    text = load_parts(plan.calibration, plan.search, plan.test)["search"]
    data = list(windows(session.loaded.tokenizer, text, plan.window, None, "random", seed)[:, None])
    measure, select = search.compute_kl_div, search.selection

    @lru_cache(maxsize=4)  # those of a minibatch: 100 MB a window
    @torch.no_grad()
    def target_logits(index: int) -> torch.Tensor:
        logits: torch.Tensor = dense(data[index], use_cache=False).logits
        return logits

    def measured(model: object, minibatch: Sequence[torch.Tensor], indices: Sequence[int]) -> float:
        n_tokens = sum(window.numel() for window in minibatch)
        return losses.of(n_tokens, lambda: measure(model, minibatch, [target_logits(i) for i in indices]))

    def selected(**arguments: Any) -> tuple[list[list[int]], list[float]]:
        survivors, best = select(**arguments | {"target_logits": range(len(data))})
        print(f"{losses.tokens} tokens, {best}, {time.process_time():.0f} CPU s", flush=True)
        return survivors, best

    replaced = {
        "AutoModelForCausalLM": SimpleNamespace(from_pretrained=lambda *_, **__: student),
        "AutoTokenizer": SimpleNamespace(from_pretrained=lambda *_, **__: None),
        "get_data": lambda *_, train: data if train else [],
        "trange": lambda *_, **__: (),  # its loop over all windows for the dense model's logits
        "compute_perplexity": lambda *_: math.nan,
        "compute_kl_div": measured,
        "selection": selected,
        "torch": SimpleNamespace(load=database.load, no_grad=torch.no_grad, float32=torch.float32),
        "os": SimpleNamespace(
            listdir=os.listdir,
            path=SimpleNamespace(join=os.path.join, isdir=os.path.isdir, exists=database.exists),
        ),
    }
    for name, value in replaced.items():
        setattr(search, name, value)


def run_search(search: ModuleType, names: Sequence[str], generations: int, seed: int) -> dict[str, int]:
    """Its main function with 8 offspring and the fidelities of run.py; returns each layer's level."""
    with tempfile.TemporaryDirectory() as directory:
        for name in names:
            (Path(directory) / name).mkdir()
        options = {
            "model_name_or_path": ANY,
            "calibration_data": ANY,
            "calibration_tokens": 1,
            "eval_datasets": ANY,
            "generations": generations,
            "offspring": 8,
            "survivors_per_selection": "2 1",
            "tokens_per_selection": "512 2048",
            "sparse_weights_path": directory,
            "dtype": "float32",
            "seed": seed,
        }
        words = [word for name, value in options.items() for word in (f"--{name}", *str(value).split())]
        sys.argv = ["evo_prune_search.py", *words]
        search.main()
        lines = (Path(directory) / "final_configuration.txt").read_text(encoding="utf-8").splitlines()
    return {name: int(level) for name, level in (line.split(": ") for line in lines)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("levels", type=Path)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("losses", type=Path, help="file of this seed's losses, to go on with")
    parser.add_argument("--text", default="docs")
    parser.add_argument("--model", help="another address of the same weights")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--generations", type=int, default=24)
    parser.add_argument("--results", type=Path, help="a line is appended")
    args = parser.parse_args()
    common = [f"evaluator.data.{part}={args.text}" for part in ("calibration", "search", "test")]
    common += [f"model={args.model}"] if args.model else []
    session = app.open_session(load_settings(HERE / "config.yaml", common))
    session.build_levels(args.levels)
    sys.path.insert(0, str(args.checkout))
    sys.modules["datasets"] = SimpleNamespace(load_dataset=None)  # type: ignore[assignment]
    search = importlib.import_module("evo_prune_search")
    database = Database(session, args.levels)
    losses = Losses(args.losses)
    prepare(search, session, database, losses, args.seed)
    names = [linear.name for linear in session.anatomy.linears]
    found = run_search(search, names, args.generations, args.seed)
    row = {
        "run": f"evopress-{args.seed}",
        "budget": losses.tokens,
        "tokens": losses.tokens,
        "evaluations": losses.evaluations,
    }
    row |= measure(session, args.levels, [database.index(found[name]) for name in session.space.slots])
    print(json.dumps(row), flush=True)
    if args.results:
        with args.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def measure(session: Session, levels: Path, options: Sequence[int]) -> dict[str, object]:
    """What run.py's arms are measured with: the search windows and the test windows."""
    candidate: Allocation = session.space.assemble(options)
    evaluator = session.evaluator(levels)
    of = {f.part: evaluator.evaluate([candidate.text], f)[0].values for f in session.plan.fidelities[-2:]}
    return {
        "sparsity": of["search"]["sparsity"],
        "search_kl": of["search"]["kl"],
        "test_kl": of["test"]["kl"],
        "test_ppl": math.exp(of["test"]["ce"]),
        "candidate": candidate.text,
    }


if __name__ == "__main__":
    main()
