"""Readers of hostile inputs: one class a kind, prepared once, then called in a process of its own an input."""

from __future__ import annotations

import json
import math
import random
import shutil
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
from mutate import HOSTILE, PIECES, move_out, mutate_file, mutated_text, mutated_value

from secateur.search import app, cli
from secateur.search.files import dump_yaml, parse_yaml
from secateur.search.results.pick import BOUND_KINDS, parse_bounds
from secateur.search.settings.settings import load_settings, resolved, settings_from
from secateur.spaces.registry import SPACES
from secateur.spaces.shape import BlockShape, ModelShape, Prunable

ROLES = {"self_attn.q_proj": 96, "self_attn.o_proj": 96, "mlp.up_proj": 256, "mlp.down_proj": 256}
LINEARS = [
    Prunable(f"model.layers.{block}.{name}", block, name.partition(".")[0].removeprefix("self_"), 10 * size)
    for block in range(4)
    for name, size in ROLES.items()
]
SHAPE = ModelShape(100_000, 2, 90_000, 256, blocks=(BlockShape(4, 200, 20, 48, 30, 20, 220, 30, 16),) * 4)
SEARCHES = {
    "allocation": {"space": {"metric": "magnitude", "target": [0.4, 0.6]}, "objectives": ["loss", "params"]},
    "formula": {"space": {"kind": "formula", "target": 0.5, "known": ["magnitude", "wanda"]}},
}
SMALL: dict[str, Any] = {
    "model": "tiny",
    "evaluator": {"window": 64, "calibration_tokens": 512, "fidelities": [256, 512], "test_tokens": 256},
    "budget": {"evaluations": 12},
    "executor": {"kind": "local", "threads": 1},
}


class NonsenseError(AssertionError):
    """An input that was accepted for something that it is not."""


def expect(holds: object, what: str) -> None:
    if not holds:
        raise NonsenseError(what)


def command(*words: object) -> None:
    """The command line, without its own handling of errors."""
    cli._dispatch([str(word) for word in words])


class Kind(ABC):
    """A kind of input.

    Args:
        scratch: directory for what all inputs of the kind share.
    """

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch

    @abstractmethod
    def give(self, rng: random.Random, place: Path) -> None:
        """Make an input in an empty directory, and give it to what reads it."""


class Formulas(Kind):
    """Formulas: parsed, printed, simplified and evaluated on a layer."""

    def __init__(self, scratch: Path) -> None:
        import torch

        from secateur.pruners.formulas.evaluate import scores
        from secateur.spaces.formulas.simplify import simplify

        row = SPACES["formula"]
        self.space = row.build(row.settings(kind="formula", target=0.5), LINEARS, SHAPE)
        generator = torch.Generator().manual_seed(0)
        layer = {"W": (8, 12), "X": (1, 12), "G": (8, 12), "H": (1, 12), "Y": (8, 1)}
        self.layer = {
            name: torch.randn(shape, generator=generator, dtype=torch.float64)
            for name, shape in layer.items()
        }
        self.scores, self.simplify, self.torch = scores, simplify, torch

    def give(self, rng: random.Random, place: Path) -> None:
        text = self.space.sample(np.random.default_rng(rng.randrange(2**32)), 0).text
        if rng.random() < 0.8:
            text = mutated_text(text, rng)
        candidate = self.space.parse(text)
        expect(candidate.text == text, "the text is not canonical")
        if candidate.tree is None:
            return
        simple = self.simplify(candidate.tree)
        expect(self.simplify(simple) == simple, "simplified twice it differs")
        with self.torch.no_grad():
            found = self.scores(candidate.tree, self.layer, (8, 12))
        expect(found.isfinite().all(), "scores that are not finite")


class SettingsFiles(Kind):
    """Settings files and overrides."""

    def give(self, rng: random.Random, place: Path) -> None:
        chosen = rng.choice([SEARCHES["allocation"], SEARCHES["formula"], {"space": {"kind": "recipe"}}, {}])
        chosen = {**chosen, "executor": {"kind": rng.choice(["local", "ray"])}}
        controller = rng.choice(["evolution", "random", "optuna", "greedy", "sensitivity"])
        try:
            base = resolved(settings_from({**chosen, "controller": {"kind": controller}}))
        except ValueError:  # a combination that is none
            base = resolved(settings_from({}))
        path, overrides = place / "settings.yaml", []
        if rng.random() < 0.5:
            text = (
                dump_yaml(mutated_value(base, rng))
                if rng.random() < 0.5
                else mutated_text(dump_yaml(base), rng)
            )
        else:
            key = rng.choice([k for k in base if isinstance(base[k], dict)])
            name = rng.choice([key, f"{key}.{rng.choice(list(base[key]))}", f"{key}.x", "x"])
            overrides, text = [f"{name}={rng.choice([*PIECES, *map(str, HOSTILE)])}"], dump_yaml(base)
        path.write_text(text, encoding="utf-8", errors="surrogatepass")
        read = load_settings(path, overrides)
        expect(
            settings_from(parse_yaml(dump_yaml(resolved(read)), "the experiment")) == read,
            "it reads otherwise again",
        )


class Candidates(Kind):
    """Texts of candidates, and bounds."""

    def __init__(self, scratch: Path) -> None:
        cases: list[dict[str, Any]] = [{"kind": kind} for kind in SPACES]
        cases += [
            {"kind": "architecture", "tied": True, "target": [0.2, 0.5]},
            {"kind": "recipe", "unit": "weights"},
        ]
        rows = [(SPACES[case["kind"]], case) for case in cases]
        self.spaces = [row.build(row.settings(**case), LINEARS, SHAPE) for row, case in rows]

    def give(self, rng: random.Random, place: Path) -> None:
        if rng.random() < 0.3:
            text = rng.choice(["0.5", "90M", "180MB", "0.7x", "1e6", "512KiB", "30ms"])
            for bound in parse_bounds({rng.choice(list(BOUND_KINDS)): mutated_text(text, rng)}):
                expect(math.isfinite(bound.limit) and bound.limit >= 0, "a limit that is none")
            return
        space = rng.choice(self.spaces)
        text = space.sample(np.random.default_rng(rng.randrange(2**32)), 0).text
        if rng.random() < 0.9:
            text = mutated_text(text, rng)
        candidate = space.parse(text)
        expect(candidate.text == text, "the text is not canonical")
        cost = space.cost(candidate)
        expect(all(math.isfinite(value) and value >= 0 for value in cost.values()), "a cost that is none")
        expect(cost.get("sparsity", 0) <= 1, "more is pruned than there is")
        space.config(candidate)


WRITTEN = (
    "report",
    "report/index.html",
    "search.log",
    "state.json",
    "run.lock",
    "optuna.log",
    "measurements.jsonl",
)
"""Files that commands write in a run directory."""


def contents(directory: Path) -> dict[str, bytes]:
    """Everything below a directory."""
    found = sorted(directory.rglob("*"))
    return {str(path.relative_to(directory)): path.read_bytes() if path.is_file() else b"" for path in found}


class Runs(Kind):
    """Run directories, each file of them: what readers show, and what continues them."""

    def __init__(self, scratch: Path) -> None:
        from secateur.search.app import searching

        self.runs, sessions = {}, {}
        opened = searching.open_session

        def open_once(settings: Any, *more: Any) -> Any:
            kind = settings.space.kind
            if kind not in sessions:
                sessions[kind] = opened(settings, *more)
            return sessions[kind]

        searching.open_session = open_once
        for name, more in SEARCHES.items():
            self.runs[name] = scratch / name
            app.run(self.runs[name], **{**SMALL, **more})
            (scratch / f"{name}.yaml").write_text(dump_yaml({**SMALL, **more}))
        self.settings = {name: scratch / f"{name}.yaml" for name in self.runs}

    def give(self, rng: random.Random, place: Path) -> None:
        name = rng.choice(list(self.runs))
        run = Path(shutil.copytree(self.runs[name], place / "run"))
        files = sorted(
            path for path in run.rglob("*") if path.is_file() and path.suffix not in (".png", ".html")
        )
        text = [path for path in files if path.suffix in (".json", ".jsonl", ".yaml")]
        outside = place.parent / "outside"
        if rng.random() < 0.05:
            move_out(rng.choice([*files, *(run / each for each in WRITTEN)]), outside)
        else:
            mutate_file(rng.choice(text if rng.random() < 0.8 else files), rng)
        before = contents(outside)
        try:
            self._read(name, run, rng)
        finally:
            expect(contents(outside) == before, "something was written outside the run directory")

    def _read(self, name: str, run: Path, rng: random.Random) -> None:
        """Run a command, and look at the front."""
        how = rng.choice(["front", "pick", "status", "report", "search"])
        if how == "search":
            command("search", self.settings[name], "--run", run, "-o", "budget.evaluations=14")
        elif how == "pick":
            command("pick", run, "--sparsity", 0.4, "--json")
        else:
            command(how, run)
        for trial in app.open_run(run).front():
            values = trial.measurement.values
            expect(all(math.isfinite(x) and x >= -1e-3 for x in values.values()), "a value out of range")
            expect(values.get("sparsity", 0) <= 1, "more is pruned than there is")


class Models(Kind):
    """Model directories: loaded, and called."""

    def __init__(self, scratch: Path) -> None:
        import torch

        from secateur.pruners.models.discover import dissect
        from secateur.pruners.models.loading import find_checkpoint, load_model

        self.torch, self.load_model, self.dissect = torch, load_model, dissect
        self.original = Path(find_checkpoint("tiny").location)
        whole = load_model("tiny").model
        self.parameters = {name: tuple(x.shape) for name, x in whole.named_parameters()}

    def give(self, rng: random.Random, place: Path) -> None:
        model = Path(shutil.copytree(self.original, place / "model"))
        names = ["config.json"] * 4 + ["model.safetensors", "tokenizer.json", "tokenizer_config.json"]
        names += ["generation_config.json", "chat_template.jinja", "model.safetensors.index.json"]
        path = model / rng.choice(names)
        if path.name == "chat_template.jinja":
            path.write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
        elif not path.exists():
            index = {"metadata": {}, "weight_map": dict.fromkeys(self.parameters, "model.safetensors")}
            path.write_text(json.dumps(index))
            if rng.random() < 0.5:
                (model / "model.safetensors").rename(model / "part.safetensors")
                path.write_text(path.read_text().replace('"model.safetensors"', '"part.safetensors"'))
        if path.name == "model.safetensors" and rng.random() < 0.5:  # its header alone
            data = path.read_bytes()
            end = 8 + int.from_bytes(data[:8], "little")
            path.write_bytes(
                mutated_text(data[:end].decode("latin-1"), rng).encode("latin-1", "replace") + data[end:]
            )
        else:
            mutate_file(path, rng)
        found = self.load_model(str(model)).model
        shapes = {name: tuple(x.shape) for name, x in found.named_parameters()}
        expect(shapes == self.parameters, "other parameters than those stored")
        with self.torch.no_grad():
            logits = found(input_ids=self.torch.arange(16)[None]).logits
        expect(path.name == "model.safetensors" or logits.isfinite().all(), "logits that are not finite")
        self.dissect(found)


class Files(Kind):
    """Recipes, profiles, tasks and latency tables."""

    def __init__(self, scratch: Path) -> None:
        from secateur.evaluators.latency import store
        from secateur.evaluators.tasks.task_set import TaskPlan, tasks_sha256
        from secateur.pruners.recipes.allocation.profile import read_profile
        from secateur.search.app.recipe_file import known_recipe, read_recipe

        self.read_profile, self.read_recipe, self.store = read_profile, read_recipe, store
        self.plan, self.sha256 = TaskPlan, tasks_sha256
        forms = [known_recipe(name, 0.5) for name in ("wanda", "flap", "shortgpt", "sparsegpt")]
        self.recipes = [form.model_dump(mode="json") for form in forms]
        docs = Path(__file__).parents[2] / "docs" / "tasks"
        self.task = next(docs.glob("*.yaml")).read_text()
        phase = {"rest_ms": 0.5, "attention_ms": [0.0, 0.3, 0.5], "ffn": [[0, 0.0], [16, 0.5], [48, 1.5]]}
        spread = {"median": 1.0, "low": 0.9, "high": 1.1}
        self.table = {
            "conditions": {"shape": "s"},
            "rounds": 20,
            "dense_ms": {"prefill": spread, "decode": spread},
            "table": {"key": "k", "phases": {"prefill": phase, "decode": phase}},
        }

    def give(self, rng: random.Random, place: Path) -> None:
        kind = rng.choice([self._recipe, self._profile, self._task, self._table])
        kind(rng, place)

    def _recipe(self, rng: random.Random, place: Path) -> None:
        path = place / "recipe.yaml"
        path.write_text(dump_yaml(rng.choice(self.recipes)))
        mutate_file(path, rng)
        file = self.read_recipe(path)
        file.check()
        expect(0 <= float(file.form["sparsity"]) <= 1, "a share that is none")

    def _profile(self, rng: random.Random, place: Path) -> None:
        path = place / "profile.yaml"
        path.write_text(dump_yaml([{"block": i, "kind": "mlp", "sparsity": 0.1 * i} for i in range(5)]))
        mutate_file(path, rng)
        for entry in self.read_profile(path):
            expect(entry.sparsity is None or 0 <= entry.sparsity <= 1, "a share that is none")

    def _task(self, rng: random.Random, place: Path) -> None:
        path = place / "task.yaml"
        path.write_text(self.task)
        mutate_file(path, rng)
        self.sha256(self.plan(("piqa-local",), place))

    def _table(self, rng: random.Random, place: Path) -> None:
        path = place / "table.json"
        path.write_text(json.dumps(self.table))
        mutate_file(path, rng)
        measured = self.store._read(path)
        for phase in measured.table.phases.values():
            times = [phase.rest_ms, *phase.attention_ms, *(ms for _, ms in phase.ffn)]
            expect(all(math.isfinite(ms) and ms >= 0 for ms in times), "a time that is none")


KINDS: dict[str, tuple[type[Kind], int]] = {
    "formulas": (Formulas, 4000),
    "settings": (SettingsFiles, 2000),
    "candidates": (Candidates, 2000),
    "runs": (Runs, 1500),
    "models": (Models, 500),
    "files": (Files, 500),
}
"""Each with its number of inputs."""
