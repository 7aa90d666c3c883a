"""Checks of a GPU: equality with the CPU on tiny, then times and memory of an 8B-shaped model with random weights.

    python device.py [--small] [--device cuda] [--minutes 6] [--out device.json]

Prints a table and writes JSON. A part that would begin after the time is over is skipped, and its row says so.
`--small` runs every part on small shapes, on a CPU too, so that the script itself is tested.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from secateur.evaluators.blockwise import BlockwiseEvaluator
from secateur.evaluators.data.windows import EvaluationData
from secateur.evaluators.latency.conditions import LatencySetup
from secateur.evaluators.latency.table import measure_table
from secateur.evaluators.session import Session
from secateur.evaluators.training.settings import Training
from secateur.evaluators.training.trainer import Trainer
from secateur.pruners.calibration.gradients import model_statistics
from secateur.pruners.calibration.stream import stream_blocks
from secateur.pruners.models.anatomy import Anatomy
from secateur.pruners.models.discover import dissect
from secateur.pruners.models.loading import load_model
from secateur.pruners.models.shape import model_shape, prunables
from secateur.pruners.pruner import DenseModel
from secateur.pruners.structure.method import StructureMethod
from secateur.pruners.structure.store import StructureKey, build_structure
from secateur.pruners.weights.level_store import LevelStore, StoreKey, build_levels
from secateur.pruners.weights.method import Method
from secateur.pruners.weights.pruner import AllocationPruner, prune
from secateur.search.app.forecast_parts import parse_devices
from secateur.search.app.forecasting import forecast_search
from secateur.search.app.session import plan
from secateur.search.settings.settings import settings_from
from secateur.spaces.allocation.settings import AllocationSettings, build_allocation
from secateur.spaces.measurement import Fidelity
from secateur.spaces.methods import CUT_REPAIRS, IMPORTANCES, METRICS, MODEL_RECONSTRUCTIONS, UPDATES

EVALUATOR = {"window": 64, "calibration_tokens": 512, "fidelities": [512], "test_tokens": 512}
FEW = {"samples": [2, 4], "length": [32, 64], "pool_tokens": 512, "subsets": 2, "known": []}
SPACES: dict[str, dict[str, Any]] = {
    "allocation": {"target": 0.5, "step": 0.25, "max_sparsity": 0.75},
    "architecture": {"kind": "architecture", "target": 0.8},
    "formula": {"kind": "formula", "target": 0.6, "terminals": ["W", "G", "X", "H"]},
    "masks": {"kind": "masks", "target": 0.8},
    "recipe": {"kind": "recipe", "unit": "structure", **FEW, "metrics": ["flap"], "target": 0.2},
}
LARGE = {
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rope_theta": 500_000.0,
}
SMALL = LARGE | {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TOLERANCE = 0.02
"""Relative difference of a loss on a GPU from the CPU's, and share of the weights that may be pruned otherwise."""


@dataclass(frozen=True)
class Sizes:
    """Numbers of tokens of the parts."""

    window: int
    statistics: int
    levels: int
    sparsegpt: int
    candidate: int
    n_candidates: int
    structure: int
    steps: int
    rounds: int = 10


@dataclass
class Row:
    """One line of the table.

    Args:
        part: of the check.
        seconds: that it took.
        values: measured, by name with units.
        aim: that it is to meet; empty: none.
        met: whether it does; None: nothing to meet, or skipped.
        error: why there is no result; empty: none.
    """

    part: str
    seconds: float = 0.0
    values: dict[str, float] = field(default_factory=dict)
    aim: str = ""
    met: bool | None = None
    error: str = ""


class Check:
    """The parts in order, on one device.

    Args:
        device: to check.
        small: small shapes.
        directory: for stores.
        deadline: of `time.monotonic`, after which no part begins.
    """

    def __init__(self, device: torch.device, directory: Path, deadline: float, *, small: bool) -> None:
        self.device, self._directory, self._deadline, self._small = device, directory, deadline, small
        self.sizes = (
            Sizes(64, 512, 256, 256, 64, 4, 256, 2)
            if small
            else Sizes(2048, 262_144, 32_768, 65_536, 2048, 16, 16_384, 4)
        )
        self.rows: list[Row] = []
        self._made: Anatomy | None = None

    def run(self) -> None:
        """All parts; one that fails does not end the others."""
        parts: dict[str, Callable[[Row], None]] = {
            **{f"equality: space {name}": partial(self._space, name) for name in self._spaces},
            "equality: metrics and updates": self._methods,
            "equality: importances and repairs": self._importances,
            "statistics and masks, Wanda": self._statistics,
            "SparseGPT at 50 %": self._sparsegpt,
            "17 levels": self._levels,
            "candidates": self._candidates,
            "latency table": self._latency,
            "structured levels": self._structure,
            "distillation": self._distillation,
            "forecast": self._forecast,
        }
        for name, part in parts.items():
            row = Row(name)
            self.rows.append(row)
            if time.monotonic() > self._deadline:
                row.error = "skipped: the time is over"
                continue
            began = time.perf_counter()
            try:
                part(row)
                self._wait()
            except Exception as error:  # noqa: BLE001  a check that failed is a result
                row.error, row.met = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", False
            row.seconds = round(time.perf_counter() - began, 2)
            print(line_of(row), flush=True)

    # --- equality on tiny ---

    @property
    def _spaces(self) -> list[str]:
        return ["allocation", "architecture"] if self._small else list(SPACES)

    def _space(self, name: str, row: Row) -> None:
        found = []
        for device in ("cpu", str(self.device)):
            raw = {"device": device, "dtype": "float32", "space": SPACES[name], "evaluator": EVALUATOR}
            session = Session(plan(settings_from({**raw, "budget": {"evaluations": 5}})))
            directory = self._directory / f"{name}-{device.replace(':', '-')}-{len(found)}"
            session.build_levels(directory)
            drawn = session.space.sample(np.random.default_rng(0), 0)
            texts = [*[x.text for x in session.space.baselines().values()][-1:], drawn.text]
            found.append(session.evaluator(directory).evaluate(texts, Fidelity("search", 512)))
        losses = [[x.values["kl"] for x in measured] for measured in found]
        off = max(abs(a - b) / max(abs(a), 1e-3) for a, b in zip(*losses, strict=True))
        row.values, row.aim, row.met = (
            {"largest relative difference": off},
            f"<= {TOLERANCE}",
            off <= TOLERANCE,
        )

    def _methods(self, row: Row) -> None:
        tokens = torch.randint(4096, (8, 64), generator=torch.Generator().manual_seed(0))
        names = sorted({*METRICS, *UPDATES} - {*MODEL_RECONSTRUCTIONS, "sparsellm"})
        for name in ["sparsegpt", "wanda"] if self._small else names:
            masks = []
            for device in (torch.device("cpu"), self.device):
                anatomy = dissect(load_model("tiny", dtype="float32", device=str(device)).model)
                sparsity = {x.name: 0.5 for x in anatomy.linears}
                prune(anatomy, sparsity, Method(name), tokens, sequential=True)
                masks.append([(x.weight == 0).cpu() for x in anatomy.linears])
            n_weights = sum(x.numel() for x in masks[0])
            row.values[name] = sum(int((a ^ b).sum()) for a, b in zip(*masks, strict=True)) / n_weights
        row.aim, row.met = (
            f"masks differ in <= {TOLERANCE} of the weights",
            max(row.values.values()) <= TOLERANCE,
        )

    def _importances(self, row: Row) -> None:
        tokens = torch.randint(4096, (8, 64), generator=torch.Generator().manual_seed(0))
        names = [x for x in IMPORTANCES if not x.startswith("bonsai")]  # many passes
        for name in names[:2] if self._small else names:
            repairs = tuple(CUT_REPAIRS) if name == "wanda_sp" else ("none",)
            found = []
            for device in (torch.device("cpu"), self.device):
                loaded = load_model("tiny", dtype="float32", device=str(device))
                anatomy = dissect(loaded.model)
                where = self._directory / f"importance-{name}-{len(found)}"
                block = anatomy.blocks[0]
                levels = ((block.n_kv_heads // 2,), (block.ffn_width // 2,))
                key = StructureKey("tiny", "float32", "", StructureMethod(name, repairs, 0.01), *levels)
                build_structure(where, anatomy, tokens, key)
                found.append(_stored(where))
            row.values[name] = _share_that_differs(*found)
        row.aim, row.met = (
            f"<= {TOLERANCE} of the stored values differ",
            max(row.values.values()) <= TOLERANCE,
        )

    # --- an 8B-shaped model ---

    @property
    def anatomy(self) -> Anatomy:
        """The large model, made at first use."""
        if self._made is None:
            torch.manual_seed(0)
            config = LlamaConfig(**(SMALL if self._small else LARGE), max_position_embeddings=8192)
            before = torch.get_default_dtype()
            torch.set_default_dtype(torch.bfloat16)
            try:
                with self.device:
                    model = LlamaForCausalLM(config)
            finally:
                torch.set_default_dtype(before)
            self._made = dissect(model.eval().requires_grad_(False))
        return self._made

    def _tokens(self, n_tokens: int, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        n_windows = max(1, n_tokens // self.sizes.window)
        return torch.randint(self.anatomy.vocab_size, (n_windows, self.sizes.window), generator=generator)

    def _statistics(self, row: Row) -> None:
        tokens, method = self._tokens(self.sizes.statistics), Method("wanda")
        with self._measured(row), torch.no_grad():
            n_kept = 0
            whole = model_statistics(self.anatomy, tokens, gradients=())
            for part in stream_blocks(self.anatomy, tokens, inputs="moments"):
                for linear in part.block.linears:
                    weight = method.weights(linear, part.inputs[linear.name], [0.5], whole)[0]
                    n_kept = n_kept + (weight != 0).sum()
            row.values["share kept"] = float(n_kept) / sum(x.n_weights for x in self.anatomy.linears)
        self._aim(row, "<= 30 s, <= 24 GB", row.values["s"] <= 30 and row.values["GB"] <= 24)

    def _sparsegpt(self, row: Row) -> None:
        dense = {x.name: x.weight for x in self.anatomy.linears}
        tokens = self._tokens(self.sizes.sparsegpt)
        try:
            with self._measured(row):
                prune(self.anatomy, dict.fromkeys(dense, 0.5), Method("sparsegpt"), tokens, sequential=True)
        finally:
            for linear in self.anatomy.linears:
                linear.point_to(dense[linear.name])
        row.values["tokens"] = float(tokens.numel())
        self._aim(row, "<= 180 s", row.values["s"] <= 180)

    def _levels(self, row: Row) -> None:
        levels = tuple(i / 20 for i in range(17))
        key = StoreKey("large", "bfloat16", "", Method("wanda"), levels)
        with self._measured(row):
            build_levels(self._levels_at, self.anatomy, self._tokens(self.sizes.levels), key)
        with torch.no_grad():
            store, began = LevelStore(self._levels_at, self.anatomy, levels), time.perf_counter()
            for linear in self.anatomy.linears:
                store.weight(linear, 8)
            self._wait()
        row.values["s to put them on the device"] = time.perf_counter() - began
        row.values["GB of ranks"] = sum(x.n_weights for x in self.anatomy.linears) / 1e9

    @property
    def _levels_at(self) -> Path:
        return self._directory / "levels"

    def _candidates(self, row: Row) -> None:
        anatomy, n_tokens = self.anatomy, self.sizes.candidate
        settings = AllocationSettings(target=0.5, step=0.05, max_sparsity=0.8)
        shape = model_shape(anatomy, self.sizes.window, 2, blocks=False)
        space = build_allocation(settings, prunables(anatomy), shape)
        pruner = AllocationPruner(settings, DenseModel(anatomy, "large", shape), space=space)
        pruner.open(self._levels_at)
        fidelity = Fidelity("search", n_tokens)
        data = EvaluationData(anatomy, {"search": self._tokens(n_tokens, 1)}, [fidelity])
        evaluator = BlockwiseEvaluator(pruner, data)
        rng = np.random.default_rng(0)
        drawn = [space.sample(rng, 0).text for _ in range(self.sizes.n_candidates + 2)]
        evaluator.evaluate(drawn[:2], fidelity)  # the dense side, ranks to the device
        with self._measured(row):
            measured = evaluator.evaluate(drawn[2:], fidelity)
        n = len(measured)
        row.values |= {"candidates/s": n / row.values["s"], "tokens/s": n * n_tokens / row.values["s"]}
        row.values["blocks saved"] = float(sum(x.blocks_saved for x in measured))
        good = row.values["candidates/s"] >= 10 and row.values["tokens/s"] >= 25_000
        self._aim(row, ">= 10 candidates/s, >= 25,000 tokens/s with KL, nothing shared", good)

    def _latency(self, row: Row) -> None:
        setup = LatencySetup(batch=1, prompt=self.sizes.window // 4, threads=1)
        with self._measured(row):
            found = measure_table(self.anatomy, setup, rounds=self.sizes.rounds)
        for phase, spread in found.dense.items():
            row.values[f"{phase}, ms"] = spread.median

    def _structure(self, row: Row) -> None:
        block = self.anatomy.blocks[0]
        levels = ((block.n_kv_heads // 2,), (block.ffn_width // 2,))
        key = StructureKey("large", "bfloat16", "", StructureMethod("flap", ("none",), 0.01), *levels)
        with self._measured(row):
            build_structure(
                self._directory / "structure", self.anatomy, self._tokens(self.sizes.structure), key
            )

    def _distillation(self, row: Row) -> None:
        tokens = self._tokens(self.sizes.steps * self.sizes.window * 2, 2)
        config = self.anatomy.model.config
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            with self.device:
                student = LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(before)
        student.load_state_dict(self.anatomy.model.state_dict())
        training = Training(method="lora", loss="kl", tokens=tokens.numel(), batch=2, schedule="constant")
        trainer = Trainer(dissect(student.eval()), training, tokens, self.anatomy)
        trainer.train(1)
        with self._measured(row):
            trainer.train(self.sizes.steps - 1)
        per_token = row.values["s"] / ((self.sizes.steps - 1) * 2 * self.sizes.window)
        row.values["s for 1.6M tokens, from these steps"] = 1.6e6 * per_token
        self._aim(row, "<= 360 s for 1.6M tokens", 1.6e6 * per_token <= 360)

    def _forecast(self, row: Row) -> None:
        model = self._directory / "config"
        self.anatomy.model.config.architectures = ["LlamaForCausalLM"]
        self.anatomy.model.config.save_pretrained(model)
        n_tokens, window = self.sizes.candidate, self.sizes.window
        evaluator = {"window": window, "calibration_tokens": self.sizes.levels, "fidelities": [n_tokens]}
        settings = settings_from({
            "model": str(model), "dtype": "bfloat16",
            "space": {"target": 0.5, "step": 0.05, "max_sparsity": 0.8},
            "evaluator": {**evaluator, "test_tokens": n_tokens},
        })  # fmt: skip
        total = torch.cuda.mem_get_info(self.device)[1] if self.device.type == "cuda" else 1 << 36
        devices = parse_devices(f"cuda:{total / 1e9:.3f}GB")
        found = forecast_search(settings, self._directory, devices=devices, timing=False)
        row.values["foreseen GB of a search"] = found.peak("device")[0] / 1e9
        measured = [
            x.values["GB"] for x in self.rows if x.part in ("17 levels", "candidates") and "GB" in x.values
        ]
        if measured and self.device.type == "cuda":
            row.values["measured GB"] = max(measured)
            ratio = max(measured) / row.values["foreseen GB of a search"]
            self._aim(row, "measured <= 1.15 x foreseen", ratio <= 1.15)

    # --- measuring ---

    @contextmanager
    def _measured(self, row: Row) -> Iterator[None]:
        """Seconds and, on a GPU, the peak of its memory."""
        self.anatomy  # noqa: B018  made outside of what is timed
        self._wait()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        began = time.perf_counter()
        yield
        self._wait()
        row.values["s"] = time.perf_counter() - began
        n_bytes = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0
        row.values["GB"] = n_bytes / 1e9

    def _aim(self, row: Row, aim: str, met: bool) -> None:
        """Aims are of the large shapes on a GPU."""
        if not self._small:
            row.aim, row.met = aim, met

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _stored(directory: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    found: dict[str, torch.Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        found |= {f"{path.name} {name}": x for name, x in load_file(path).items()}
    return found


def _share_that_differs(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Share of the values that differ by more than a hundredth of the largest of their tensor."""
    n_off, n_all = 0, 0
    for name, x in one.items():
        a, b = x.double(), other[name].double()
        n_off += int(((a - b).abs() > 0.01 * a.abs().max().clamp_min(1e-30)).sum())
        n_all += x.numel()
    return n_off / n_all


def line_of(row: Row) -> str:
    """A row of the table."""
    worst = (
        dict(sorted(row.values.items(), key=lambda x: -x[1])[:3]) if "equality" in row.part else row.values
    )
    values = ", ".join(f"{name} {value:.4g}" for name, value in worst.items())
    met = {True: "ok", False: "NOT MET", None: ""}[row.met]
    return f"{row.part:<36} {row.seconds:>7.1f} s  {row.error or values}  {row.aim}  {met}".rstrip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="small shapes, on a CPU too")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--minutes", type=float, default=6.0, help="no part begins after them")
    parser.add_argument("--out", type=Path, default=Path("device.json"))
    args = parser.parse_args()
    device = torch.device(args.device)
    if device.type == "cpu" and not args.small:
        parser.error("Expected a GPU, got none. Add --small to try the script on a CPU.")
    deadline = time.monotonic() + 60 * args.minutes
    with tempfile.TemporaryDirectory() as directory:
        check = Check(device, Path(directory), deadline, small=args.small)
        check.run()
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    found = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": git.stdout.strip() or None,
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "small": args.small,
        "rows": [asdict(row) for row in check.rows],
    }
    args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    failed = [row.part for row in check.rows if row.met is False]
    print(f"wrote {args.out}; " + (f"not met: {', '.join(failed)}" if failed else "no aim missed"))
    raise SystemExit(1 if any(row.error for row in check.rows if row.met is False) else 0)


if __name__ == "__main__":
    main()
