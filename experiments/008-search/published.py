"""The released searches of EvoPress and DarwinLM, run unchanged on our levels, texts and windows.

    python published.py ARM WORK CHECKOUT [--text FILE] [--model DIR] [--seed 0] [--generations 24]

ARM is ``evopress`` (arXiv 2410.14649, `evo_prune_search.py` of github.com/IST-DASLab/EvoPress), ``darwinlm`` or
``darwinlm-trained`` (arXiv 2502.07780, `evo_struct_prune_search.py` of github.com/IST-DASLab/DarwinLM, without and with
its training step); CHECKOUT is a clone of its repository. WORK keeps the levels and the outcome of each selection, so
that the same command continues a run that was stopped. What is found after so many tokens is measured as our own
controllers' candidates are, and written into published.json and published.md.

Both draw 8 offspring a generation, of which 2 pass from 512 to 2,048 tokens, and 1 is the next parent. Their main
functions run as they are; what they would load comes from here:

- Weights come from our level store. EvoPress's levels are a fixed number of weights apart, so that any two layers
  pair. DarwinLM's level 5 is our uniform candidate, the others are our neighbouring levels: KV groups where it has
  query heads.
- Minibatches are drawn from all windows of the search text, training windows from all of the calibration text.
- Everything is in float32; DarwinLM's script takes bfloat16, in which most of its steps are rounded away.
- The perplexities that they only print are left out.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import math
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from secateur.evaluators.data.text import load_parts
from secateur.evaluators.data.tokens import windows
from secateur.evaluators.session import Session
from secateur.pruners.structure.store import StructureStore
from secateur.pruners.weights.level_store import LevelStore
from secateur.search import app
from secateur.search.settings.settings import load_settings

HERE = Path(__file__).parent
RESULTS, TABLE = HERE / "published.json", HERE / "published.md"
ARMS = {"evopress": "evopress.yaml", "darwinlm": "darwinlm.yaml", "darwinlm-trained": "darwinlm.yaml"}
TRAINED = {"darwinlm-trained": (512, 2048)}  # training tokens of a candidate in each selection
BUDGETS = (8192, 24576, 61440, 122880, 245760)
BACKWARD = 3  # tokens that a trained one counts as
MIDDLE = 5  # DarwinLM's level of the uniform candidate
ANY = "unused"  # for arguments that the parsers require and nothing here reads

Levels = Mapping[str, int]
"""Level of each layer, by its name."""


class Database:
    """A directory of pruned weights as the searches expect it, ``<layer>/<level>.pth``."""

    uniform: int
    """Level of the uniform candidate."""

    def __init__(self, session: Session) -> None:
        self.space = session.space
        (name,) = [name for name in session.space.baselines() if name.startswith("uniform@")]
        self._start = session.space.disassemble(session.space.baselines()[name])
        self.slots: dict[str, int] = {}

    def option(self, layer: str, level: int) -> int:
        return int(self._start[self.slots[layer]]) + level - self.uniform

    def exists(self, path: str) -> bool:
        layer, level = _split(path)
        return self.option(layer, level) in self.options(layer)

    def options(self, layer: str) -> Sequence[int]:
        options: Sequence[int] = self.space.options(self.slots[layer])
        return options

    def candidate(self, levels: Levels) -> str:
        """Canonical text of our candidate with these levels."""
        options = list(self._start)
        for layer, level in levels.items():
            options[self.slots[layer]] = self.option(layer, level)
        return str(self.space.assemble(options).text)

    def load(self, path: str, map_location: object = None) -> torch.Tensor:
        raise NotImplementedError


class WeightDatabase(Database):
    """Levels of single projections: ours but the dense one, which EvoPress has not."""

    uniform = 0

    def __init__(self, session: Session, levels: Path) -> None:
        super().__init__(session)
        self._linears = {linear.name: linear for linear in session.anatomy.linears}
        self.slots = {name: slot for slot, name in enumerate(session.space.slots)}
        self._store = LevelStore(levels, session.anatomy, session.space.levels)

    def options(self, layer: str) -> Sequence[int]:
        return super().options(layer)[1:]

    def load(self, path: str, map_location: object = None) -> torch.Tensor:
        layer, level = _split(path)
        return self._store.weight(self._linears[layer], self.option(layer, level))


class StructureDatabase(Database):
    """Levels of output projections, with zeros in the columns of removed units."""

    uniform = MIDDLE

    def __init__(self, session: Session, levels: Path) -> None:
        super().__init__(session)
        self._store = StructureStore(levels, session.anatomy)
        parts = {
            f"block{layout.block.index}.{part.kind}": part
            for layout in self._store.layouts
            for part in layout.sublayers
        }
        self._parts = {parts[slot].output.name: (int(slot[5:].split(".")[0]), parts[slot]) for slot in parts}
        self.slots = {parts[name].output.name: slot for slot, name in enumerate(session.space.slots)}

    def load(self, path: str, map_location: object = None) -> torch.Tensor:
        layer, level = _split(path)
        block, part = self._parts[layer]
        share = self.space.share(self.slots[layer], self.option(layer, level))
        n_kept = round((1 - share) * part.n_units)
        dense = part.output.weight
        if n_kept == part.n_units:
            return dense.clone()
        weight = torch.zeros_like(dense)
        if n_kept:
            ordered = self._store.ordered(block, part.kind)
            units = torch.tensor(ordered.order[:n_kept])
            columns = (units[:, None] * part.unit_width + torch.arange(part.unit_width)).flatten()
            weight[:, columns] = ordered.pieces(n_kept, "obs")[layer].weight
        return weight


def _split(path: str) -> tuple[str, int]:
    return Path(path).parent.name, int(Path(path).stem)


class Selections:
    """Outcome of each selection, in order and in a file.

    A search draws from Python's generator alone: with its state after each selection a run that was stopped goes on
    without measuring again.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self._known: list[dict[str, Any]] = [json.loads(line) for line in lines]
        self._n = self.evaluated = self.trained = 0
        self.parents: list[tuple[int, int, Levels]] = []  # tokens evaluated, trained on, and what was found

    def of(
        self, compute: Callable[[], tuple[list[Any], list[float]]], **counts: int
    ) -> tuple[list[Any], list[float]]:
        """Survivors and losses of the next selection."""
        if self._n < len(self._known):
            row = self._known[self._n]
            assert {name: row[name] for name in counts} == counts, f"{self._path} is of another search"
        else:
            survivors, losses = compute()
            row = {**counts, "survivors": survivors, "losses": losses, "state": random.getstate()}
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        version, internal, following = row["state"]
        random.setstate((version, tuple(internal), following))
        self._n += 1
        self.evaluated += row["evaluated"]
        self.trained += row["trained"]
        return row["survivors"], row["losses"]


def prepare(
    search: ModuleType, session: Session, database: Database, selections: Selections, seed: int
) -> None:
    """Give a released search what it would load: model, data, weights."""
    plan, dense, student = session.plan, session.loaded.model, copy.deepcopy(session.loaded.model)
    student.requires_grad_(True)
    text, cut = load_parts(plan.calibration, plan.search, plan.test), session.loaded.tokenizer
    data, training = (
        list(windows(cut, text[part], plan.window, None, "random", seed)[:, None])
        for part in ("search", "calibration")
    )
    select = search.selection

    @lru_cache(maxsize=4)  # those of a minibatch: 100 MB a window
    @torch.no_grad()
    def logits(index: int) -> torch.Tensor:
        found: torch.Tensor = dense(data[index], use_cache=False).logits
        return found

    target = type("Logits", (), {"__getitem__": lambda _, index: logits(index)})()

    def selected(**arguments: Any) -> tuple[Any, ...]:
        names, candidates = _names(arguments), arguments["candidates"]
        trained = sum(window.numel() for window in arguments.get("finetune_data_list") or ())
        counts = {
            "evaluated": len(candidates) * arguments["num_tokens"],
            "trained": len(candidates) * trained,
        }

        def compute() -> tuple[list[Any], list[float]]:
            survivors, losses, *_ = select(**arguments | {"target_logits": target})
            return survivors, losses

        survivors, losses = selections.of(compute, **counts)
        if arguments["num_survive"] == 1:
            found = dict(zip(names, _flat(survivors[0]), strict=True))
            selections.parents.append((selections.evaluated, selections.trained, found))
        print(
            f"{selections.evaluated} + {selections.trained} tokens, {losses}, {time.process_time():.0f} s",
            flush=True,
        )
        return (survivors, losses, *([None] if "grouped_layer_names" in arguments else []))

    def counted(start: int, stop: int, step: int = 1, desc: str = "", **_: object) -> Iterable[int]:
        return () if "target logits" in desc else range(start, stop, step)

    files = SimpleNamespace(**{**vars(os.path), "exists": database.exists})
    replaced = {
        "AutoModelForCausalLM": SimpleNamespace(from_pretrained=lambda *_, **__: student),
        "AutoTokenizer": SimpleNamespace(from_pretrained=lambda *_, **__: None),
        "get_data": lambda *_, train, **more: (training if "seed" in more else data) if train else [],
        "trange": counted,
        "compute_perplexity": lambda *_: math.nan,
        "selection": selected,
        "torch": SimpleNamespace(**{**vars(torch), "load": database.load}),
        "os": SimpleNamespace(**{**vars(os), "path": files}),
    }
    for name, value in replaced.items():
        setattr(search, name, value)


def _names(arguments: Mapping[str, Any]) -> list[str]:
    """Names of the layers, in the order of a candidate's levels."""
    return (
        _flat(arguments["grouped_layer_names"])
        if "grouped_layer_names" in arguments
        else arguments["layer_names"]
    )


def _flat(values: Sequence[Any]) -> list[Any]:
    return [x for group in values for x in group] if isinstance(values[0], list) else list(values)


def run_search(search: ModuleType, arm: str, names: Iterable[str], generations: int, seed: int) -> None:
    """Its main function."""
    with tempfile.TemporaryDirectory() as directory:
        for name in names:
            (Path(directory) / name).mkdir()
        options: dict[str, Any] = {
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
        if arm != "evopress":
            n_trained = TRAINED.get(arm, (0, 0))
            options |= {"target_level": MIDDLE, "save_freq": generations + 1}
            options |= {"training_tokens_per_selection": " ".join(map(str, n_trained))}
        words = [word for name, value in options.items() for word in (f"--{name}", *str(value).split())]
        sys.argv = [search.__file__ or "", *words]
        search.main()


def measure(session: Session, levels: Path, candidate: str) -> dict[str, Any]:
    """Windows that our own controllers' candidates are measured on: of the search and of the test."""
    evaluator = session.evaluator(levels)
    of = {f.part: evaluator.evaluate([candidate], f)[0].values for f in session.plan.final_fidelities}
    return {
        "sparsity": of["search"]["sparsity"],
        "search_kl": of["search"]["kl"],
        "test_kl": of["test"]["kl"],
        "test_ppl": math.exp(of["test"]["ce"]),
    }


def keep(rows: Sequence[Mapping[str, Any]]) -> None:
    """Put rows into the results in place of those of the same run, and write the table of all."""
    known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else []
    of = ("model", "arm", "seed")
    new = {tuple(row[key] for key in of) for row in rows}
    others = [row for row in known if tuple(row[key] for key in of) not in new]
    kept = sorted([*others, *rows], key=lambda row: [row[key] for key in (*of, "tokens")])
    RESULTS.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    heads = ("model", "released search", "seed", "generations", "tokens", "trained on")
    lines = [
        f"| {' | '.join(heads)} | search KL | test KL | test perplexity |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
        *(
            f"| {row['model']} | {row['arm']} | {row['seed']} | {row['generations']} | {row['tokens']:,} | "
            f"{row['trained']:,} | {row['search_kl']:.3f} | {row['test_kl']:.3f} | {row['test_ppl']:.1f} |"
            for row in kept
        ),
    ]
    note = f"\nA trained token counts as {BACKWARD}. Written by published.py, which says what is run.\n"
    TABLE.write_text("\n".join(lines) + "\n" + note, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("arm", choices=ARMS)
    parser.add_argument("work", type=Path)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--text", default="docs")
    parser.add_argument("--model", help="another address of the same weights")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--generations", type=int, default=24)
    parser.add_argument(
        "-o", "--override", action="append", default=[], help="key.path=value of the settings"
    )
    args = parser.parse_args()
    common = [f"evaluator.data.{part}={args.text}" for part in ("calibration", "search", "test")]
    common += [f"model={args.model}"] if args.model else []
    settings = load_settings(HERE / ARMS[args.arm], [*common, *args.override])
    session = app.open_session(settings)
    of_weights = args.arm == "evopress"
    levels = args.work / f"levels-{'weights' if of_weights else 'structure'}"
    session.build_levels(levels, lambda block: print(f"levels of block {block}", flush=True))
    sys.path.insert(0, str(args.checkout))
    sys.modules["datasets"] = SimpleNamespace(load_dataset=None)  # type: ignore[assignment]
    search = importlib.import_module("evo_prune_search" if of_weights else "evo_struct_prune_search")
    database: Database = (WeightDatabase if of_weights else StructureDatabase)(session, levels)
    selections = Selections(args.work / f"{args.arm}-{args.seed}.jsonl")
    prepare(search, session, database, selections, args.seed)
    run_search(search, args.arm, database.slots, args.generations, args.seed)
    rows = []
    ends = [evaluated + BACKWARD * trained for evaluated, trained, _ in selections.parents]
    wanted = {max((i for i, end in enumerate(ends) if end <= budget), default=-1) for budget in BUDGETS}
    for index in sorted(wanted | {len(ends) - 1}, reverse=True):
        evaluated, trained, found = selections.parents[index] if index >= 0 else (0, 0, {})
        candidate = database.candidate(found)
        row = {"model": settings.model, "arm": args.arm, "seed": args.seed, "generations": index + 1}
        row |= {"tokens": evaluated + BACKWARD * trained, "trained": trained}
        rows.append(row | measure(session, levels, candidate) | {"candidate": candidate})
        print(json.dumps(rows[-1]), flush=True)
        keep(rows)


if __name__ == "__main__":
    main()
