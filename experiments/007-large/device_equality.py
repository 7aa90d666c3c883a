"""Equality of a GPU with the CPU on the model `tiny`: spaces, metrics, updates, importances and repairs."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from device_rows import Checked, Part, Row

from secateur.evaluators.session import Session
from secateur.pruners.models.discover import dissect
from secateur.pruners.models.loading import load_model
from secateur.pruners.structure.method import StructureMethod
from secateur.pruners.structure.store import StructureKey, build_structure
from secateur.pruners.weights.method import Method
from secateur.pruners.weights.pruner import prune
from secateur.search.app.session import plan
from secateur.search.settings.settings import settings_from
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
TOLERANCE = 0.02
"""Relative difference of a loss on a GPU from the CPU's, and share of the weights that may be pruned otherwise."""


class Equality:
    """Parts that compute the same on both devices.

    Args:
        checked: the device.
    """

    def __init__(self, checked: Checked) -> None:
        self._checked = checked

    @property
    def parts(self) -> dict[str, Part]:
        """By name, in order."""
        names = ["allocation", "architecture"] if self._checked.small else list(SPACES)
        return {
            **{f"equality: space {name}": partial(self._space, name) for name in names},
            "equality: metrics and updates": self._methods,
            "equality: importances and repairs": self._importances,
        }

    def _space(self, name: str, row: Row) -> None:
        found = []
        for device in ("cpu", str(self._checked.device)):
            raw = {"device": device, "dtype": "float32", "space": SPACES[name], "evaluator": EVALUATOR}
            session = Session(plan(settings_from({**raw, "budget": {"evaluations": 5}})))
            directory = self._checked.directory / f"{name}-{device.replace(':', '-')}-{len(found)}"
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
        for name in ["sparsegpt", "wanda"] if self._checked.small else names:
            masks = []
            for device in (torch.device("cpu"), self._checked.device):
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
        for name in names[:2] if self._checked.small else names:
            repairs = tuple(CUT_REPAIRS) if name == "wanda_sp" else ("none",)
            found = []
            for device in (torch.device("cpu"), self._checked.device):
                loaded = load_model("tiny", dtype="float32", device=str(device))
                anatomy = dissect(loaded.model)
                where = self._checked.directory / f"importance-{name}-{len(found)}"
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
