"""What a worker in another process needs, as directories to read and a plain value that sets it up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from secateur.evaluators.blockwise import BlockwiseEvaluator
from secateur.evaluators.data import EvaluationData
from secateur.evaluators.workbench import Plan, Workbench, set_threads
from secateur.pruners.families.discover import dissect
from secateur.pruners.loading import load_model, mappable
from secateur.spaces.measurement import PARTS

WINDOWS = "windows.safetensors"


@dataclass(frozen=True)
class WorkerSetup:
    """Sets up an evaluator with the bench's model, space and data, without its texts.

    Args:
        plan: of the bench.
        space: of the bench.
        threads: that the worker computes with.
        directories: a model whose weights are mapped as they are, so that the workers of a node share one copy; the
            token windows; the level store.
    """

    plan: Plan
    space: Any
    threads: int
    directories: tuple[Path, Path, Path]

    def __call__(self, directories: Sequence[Path]) -> BlockwiseEvaluator:
        """The evaluator.

        Args:
            directories: those of the setup, as they are called on this node.
        """
        model, windows, levels = directories
        set_threads(self.threads)
        plan = self.plan
        loaded = load_model(
            str(model), dtype=plan.dtype, device=plan.device, trust_remote_code=plan.trust_remote_code
        )
        anatomy = dissect(loaded.model)
        tokens = load_file(windows / WINDOWS)
        return BlockwiseEvaluator(
            anatomy,
            self.space,
            plan.rig.switcher(plan, self.space, anatomy, levels),
            EvaluationData(
                anatomy,
                {part: tokens[part] for part in PARTS if part in tokens},
                plan.fidelities,
                shared=windows,  # one copy of the dense side of the loss for the workers of a node
            ),
            loss=plan.loss,
            seed=plan.seed,
        )


def worker_setup(
    bench: Workbench, directory: Path, levels: Path, *, threads: int, spread: bool
) -> WorkerSetup:
    """Write what workers read, and how to set them up.

    Args:
        bench: the driver's.
        directory: for the windows; made if it is missing.
        levels: the level store.
        threads: that a worker computes with.
        spread: put one model on all devices that a worker sees.

    Raises:
        OSError: if a directory can't be written.
    """
    directory.mkdir(parents=True, exist_ok=True)
    save_file({part: tokens.contiguous() for part, tokens in bench.windows.items()}, directory / WINDOWS)
    weight = next(bench.anatomy.linears).weight
    device = "spread" if spread else bench.plan.device
    plan = replace(bench.plan, dtype=str(weight.dtype).removeprefix("torch."), device=device)
    return WorkerSetup(plan, bench.space, threads, (mappable(bench.loaded), directory, levels))
