"""Times and memory of an 8B-shaped model with random weights on a GPU; small shapes on a CPU."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from device_rows import Checked, Part, Row
from side_by_side import compared
from transformers import LlamaConfig, LlamaForCausalLM

from secateur.evaluators.blockwise import BlockwiseEvaluator
from secateur.evaluators.data.windows import EvaluationData
from secateur.evaluators.latency.conditions import setups_of
from secateur.evaluators.latency.store import MeasuredTable
from secateur.evaluators.latency.table import measure_table
from secateur.evaluators.training.settings import Training
from secateur.evaluators.training.trainer import Trainer
from secateur.pruners.calibration.gradients import model_statistics
from secateur.pruners.calibration.stream import stream_blocks
from secateur.pruners.models.anatomy import Anatomy
from secateur.pruners.models.discover import dissect
from secateur.pruners.models.shape import model_shape, prunables
from secateur.pruners.pruner import DenseModel
from secateur.pruners.structure.method import StructureMethod
from secateur.pruners.structure.store import StructureKey, build_structure
from secateur.pruners.weights.level_store import LevelStore, StoreKey, build_levels
from secateur.pruners.weights.method import Method
from secateur.pruners.weights.pruner import AllocationPruner, prune
from secateur.search.app.forecast_parts import parse_devices
from secateur.search.app.forecast_search import forecast_search
from secateur.search.settings.settings import settings_from
from secateur.spaces.allocation.settings import AllocationSettings, build_allocation
from secateur.spaces.measurement import Fidelity

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


class Large:
    """Parts on the large model.

    Args:
        checked: the device.
        rows: of all parts so far.
    """

    def __init__(self, checked: Checked, rows: Sequence[Row]) -> None:
        self._checked, self._rows = checked, rows
        self.sizes = (
            Sizes(64, 512, 256, 256, 64, 4, 256, 2)
            if checked.small
            else Sizes(2048, 262_144, 32_768, 65_536, 2048, 16, 16_384, 4)
        )
        self._made: Anatomy | None = None
        self._losses: list[float] = []  # of the candidates

    @property
    def parts(self) -> dict[str, Part]:
        """By name, in order."""
        on_cpu = self._checked.device.type == "cpu"
        has_compiler = (
            shutil.which("g++") is not None or not on_cpu
        )  # GPUs have triton, which comes with torch
        compiled = {"candidates, compiled": partial(self._candidates, compiled=True)} if has_compiler else {}
        return {
            "statistics and masks, Wanda": self._statistics,
            "SparseGPT at 50 %": self._sparsegpt,
            "17 levels": self._levels,
            "candidates": self._candidates,
            **compiled,
            "candidates side by side": self._side_by_side,
            "latency table": self._latency,
            "structured levels": self._structure,
            "distillation": self._distillation,
            "forecast": self._forecast,
        }

    @property
    def anatomy(self) -> Anatomy:
        """The large model, made at first use."""
        if self._made is None:
            torch.manual_seed(0)
            config = LlamaConfig(**(SMALL if self._checked.small else LARGE), max_position_embeddings=8192)
            self._made = dissect(self._random(config).eval().requires_grad_(False))
        return self._made

    def _random(self, config: LlamaConfig) -> LlamaForCausalLM:
        """A model with random weights in bfloat16, made on the device."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            with self._checked.device:
                return LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(before)

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
        self._checked.aim(row, "<= 30 s, <= 24 GB", row.values["s"] <= 30 and row.values["GB"] <= 24)

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
        self._checked.aim(row, "<= 180 s", row.values["s"] <= 180)

    def _levels(self, row: Row) -> None:
        levels = tuple(i / 20 for i in range(17))
        key = StoreKey("large", "bfloat16", "", Method("wanda"), levels)
        with self._measured(row):
            build_levels(self._levels_at, self.anatomy, self._tokens(self.sizes.levels), key)
        with torch.no_grad():
            store, began = LevelStore(self._levels_at, self.anatomy, levels), time.perf_counter()
            for linear in self.anatomy.linears:
                store.weight(linear, 8)
            self._checked.wait()
        row.values["s to put them on the device"] = time.perf_counter() - began
        row.values["GB of ranks"] = sum(x.n_weights for x in self.anatomy.linears) / 1e9

    @property
    def _levels_at(self) -> Path:
        return self._checked.directory / "levels"

    def _candidates(self, row: Row, *, compiled: bool = False) -> None:
        anatomy, n_tokens = self.anatomy, self.sizes.candidate
        settings = AllocationSettings(target=0.5, step=0.05, max_sparsity=0.8)
        shape = model_shape(anatomy, self.sizes.window, 2, blocks=False)
        space = build_allocation(settings, prunables(anatomy), shape)
        pruner = AllocationPruner(settings, DenseModel(anatomy, "large", shape), space=space)
        pruner.open(self._levels_at)
        fidelity = Fidelity("search", n_tokens)
        windows = {"search": self._tokens(n_tokens, 1)}
        data = EvaluationData(anatomy, windows, [fidelity], compiled=compiled)
        evaluator = BlockwiseEvaluator(pruner, data)
        rng = np.random.default_rng(0)
        drawn = [space.sample(rng, 0).text for _ in range(self.sizes.n_candidates + 2)]
        evaluator.evaluate(drawn[:2], fidelity)  # the dense side, ranks to the device
        with self._measured(row):
            measured = evaluator.evaluate(drawn[2:], fidelity)
        n = len(measured)
        row.values |= {"candidates/s": n / row.values["s"], "tokens/s": n * n_tokens / row.values["s"]}
        row.values["blocks saved"] = float(sum(x.blocks_saved for x in measured))
        if compiled:
            of_losses = zip(self._losses, (x.values["kl"] for x in measured), strict=True)
            row.values["largest relative difference"] = max(abs(a - b) / max(a, 1e-3) for a, b in of_losses)
            return
        self._losses = [x.values["kl"] for x in measured]
        good = row.values["candidates/s"] >= 10 and row.values["tokens/s"] >= 25_000
        self._checked.aim(row, ">= 10 candidates/s, >= 25,000 tokens/s with KL, nothing shared", good)

    def _side_by_side(self, row: Row) -> None:
        """A block of several candidates at once: faster where its ratio is above 1, see `side_by_side`."""
        n, window = min(8, self.sizes.n_candidates), self.sizes.window
        with self._measured(row):
            for n_tokens in (window // 16, self.sizes.candidate):
                length = min(window, n_tokens)
                found = compared(self.anatomy, n, n_tokens, length, self.sizes.rounds, self._checked.wait)
                for name in ("ratio", "largest relative difference"):
                    row.values[f"{name}, {n_tokens} tokens"] = found[name]

    def _latency(self, row: Row) -> None:
        setups = setups_of({"batch": [1, 8], "prompt": self.sizes.window // 4, "threads": 1})
        with self._measured(row):
            rounds = self.sizes.rounds
            found = MeasuredTable.joined([measure_table(self.anatomy, x, rounds=rounds) for x in setups])
        for phase, spread in found.dense.items():
            row.values[f"{phase}, ms"] = spread.median

    def _structure(self, row: Row) -> None:
        block = self.anatomy.blocks[0]
        levels = ((block.n_kv_heads // 2,), (block.ffn_width // 2,))
        key = StructureKey("large", "bfloat16", "", StructureMethod("flap", ("none",), 0.01), *levels)
        with self._measured(row):
            build_structure(
                self._checked.directory / "structure", self.anatomy, self._tokens(self.sizes.structure), key
            )

    def _distillation(self, row: Row) -> None:
        tokens = self._tokens(self.sizes.steps * self.sizes.window * 2, 2)
        student = self._random(self.anatomy.model.config)
        student.load_state_dict(self.anatomy.model.state_dict())
        training = Training(method="lora", loss="kl", tokens=tokens.numel(), batch=2, schedule="constant")
        trainer = Trainer(dissect(student.eval()), training, tokens, self.anatomy)
        trainer.train(1)
        with self._measured(row):
            trainer.train(self.sizes.steps - 1)
        per_token = row.values["s"] / ((self.sizes.steps - 1) * 2 * self.sizes.window)
        row.values["s for 1.6M tokens, from these steps"] = 1.6e6 * per_token
        self._checked.aim(row, "<= 360 s for 1.6M tokens", 1.6e6 * per_token <= 360)

    def _forecast(self, row: Row) -> None:
        model = self._checked.directory / "config"
        self.anatomy.model.config.architectures = ["LlamaForCausalLM"]
        self.anatomy.model.config.save_pretrained(model)
        n_tokens, window = self.sizes.candidate, self.sizes.window
        evaluator = {"window": window, "calibration_tokens": self.sizes.levels, "fidelities": [n_tokens]}
        settings = settings_from({
            "model": str(model), "dtype": "bfloat16",
            "space": {"target": 0.5, "step": 0.05, "max_sparsity": 0.8},
            "evaluator": {**evaluator, "test_tokens": n_tokens},
        })  # fmt: skip
        total = (
            torch.cuda.mem_get_info(self._checked.device)[1]
            if self._checked.device.type == "cuda"
            else 1 << 36
        )
        devices = parse_devices(f"cuda:{total / 1e9:.3f}GB")
        found = forecast_search(settings, self._checked.directory, devices=devices, timing=False)
        row.values["foreseen GB of a search"] = found.peak("device")[0] / 1e9
        measured = [
            x.values["GB"] for x in self._rows if x.part in ("17 levels", "candidates") and "GB" in x.values
        ]
        if measured and self._checked.device.type == "cuda":
            row.values["measured GB"] = max(measured)
            ratio = max(measured) / row.values["foreseen GB of a search"]
            self._checked.aim(row, "measured <= 1.15 x foreseen", ratio <= 1.15)

    @contextmanager
    def _measured(self, row: Row) -> Iterator[None]:
        """Seconds and memory of what is done with the model, which is made before."""
        self.anatomy  # noqa: B018
        with self._checked.measured(row):
            yield
