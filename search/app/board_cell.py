"""One cell of a board, measured in a process of its own: CPU time and memory are of this method alone.

`main` reads a request, one line of JSON on stdin (``settings``, ``cell``, ``folders``, ``threads``), and answers with a
measurement on stdout. Its process ends when stdin does: nobody waits for it any more.
"""

from __future__ import annotations

import json
import math
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.search.app.pruning import pruner_on
from secateur.search.app.pruning_file import checked
from secateur.search.app.recipe_file import RecipeFile
from secateur.search.board.cells import DENSE, Cell
from secateur.search.board.settings import BoardSettings, board_settings
from secateur.spaces.located import located
from secateur.spaces.measurement import Measurement
from secateur.spaces.method import CONTRAST

if TYPE_CHECKING:
    from torch import Tensor

    from secateur.evaluators.data.text import Text
    from secateur.evaluators.losses import LossSums
    from secateur.evaluators.tasks.task_set import TaskPlan, TaskResult
    from secateur.pruners.models.anatomy import Anatomy
    from secateur.pruners.models.loading import LoadedModel

POOL = 8
"""Tokens that calibration windows are drawn from, as a multiple of those that are drawn."""

Texts = Mapping[str, "Text"]


def file_of(cell: Cell, settings: BoardSettings, n_positions: int | None) -> RecipeFile:
    """The recipe file of a cell; `n_positions` of the model, None: without a limit.

    Raises:
        UsageError, ValueError: if it has no calibration windows, or there can be no such recipe.
    """
    samples, length = cell.windows(settings, n_positions)
    return checked(
        RecipeFile,
        {
            "recipe": cell.form(settings, n_positions),
            "sources": sources_of(settings),
            "pool_tokens": POOL * samples * length,
            "seed": cell.seed,
        },
    )


def sources_of(settings: BoardSettings) -> dict[str, str]:
    """Sources of the calibration text, and of the second one if there is one, by their names in recipes."""
    second = {} if settings.contrast_text is None else {CONTRAST: settings.contrast_text}
    return {"calibration": settings.calibration_text} | second


def board_texts(settings: BoardSettings, folders: Sequence[Path]) -> tuple[dict[str, Text], dict[str, Text]]:
    """The texts of `sources_of` by name, and the test part of each text to measure on, by its name in the settings.

    Raises:
        ValueError: if one is missing, or overlaps with the calibration text.
    """
    from secateur.evaluators.data.sources import located_text
    from secateur.evaluators.data.text import load_parts, load_sources

    calibration = located_text(settings.calibration_text, folders)
    measured = {name: located_text(name, folders) for name in settings.text}
    first = next(iter(measured.values()))
    second = {name: located_text(x, folders) for name, x in sources_of(settings).items() if name == CONTRAST}
    return load_sources({"calibration": "", **second}, calibration, first, first), {
        name: load_parts(calibration, text, text)["test"] for name, text in measured.items()
    }


def open_model(
    name: str, settings: BoardSettings, folders: Sequence[Path], say: Callable[[str], None]
) -> tuple[LoadedModel, Anatomy, int | None]:
    """A dense model, its parts, and the number of its positions.

    Raises:
        ValueError: if it can't be loaded or pruned, or its positions are fewer than a window has tokens.
    """
    from secateur.pruners.calibration.tokens import bos_token
    from secateur.pruners.models.discover import dissect
    from secateur.pruners.models.loading import EMBEDDED, load_model
    from secateur.pruners.models.usable import check_windows

    loaded = load_model(
        name if name in EMBEDDED else located(name, folders),
        dtype=settings.dtype,
        device=settings.device,
        trust_remote_code=settings.trust_remote_code,
        say=say,
    )
    check_windows(loaded.model, settings.window, allow_long=settings.allow_long_windows)
    model: Any = loaded.model
    n_positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return loaded, dissect(loaded.model, bos_token(loaded.tokenizer, settings.bos)), n_positions


def task_plan(settings: BoardSettings, folders: Sequence[Path]) -> TaskPlan | None:
    """The tasks of the settings; None without some."""
    from secateur.evaluators.tasks.task_set import TaskPlan

    if not settings.tasks or settings.task_dir is None:
        return None
    directory = Path(located(settings.task_dir, folders))
    return TaskPlan(settings.tasks, directory, settings.samples, trusted=settings.trust_remote_code)


def measure(cell: Cell, settings: BoardSettings, folders: Sequence[Path]) -> Measurement:
    """Measurement of a cell: losses, costs, consumption and tasks, or the reason why there is none."""
    told = Measurement(cell.text, settings.fidelity, infeasible="not measured", seed=cell.seed)
    try:
        values, sums = _measured(cell, settings, folders)
    except ValueError as error:
        return replace(told, infeasible=str(error))
    if not all(map(math.isfinite, values.values())):
        return replace(told, infeasible="its loss is not finite: the pruned model overflows")
    n_tokens = settings.tokens * len(settings.text)
    return replace(told, values=values, infeasible=None, n_tokens=n_tokens, windows=sums.window_losses("kl"))


def _measured(
    cell: Cell, settings: BoardSettings, folders: Sequence[Path]
) -> tuple[dict[str, float], LossSums]:
    """Values by name, and the sums of losses on the first text."""
    from secateur.evaluators.consumption import consumed
    from secateur.evaluators.data.windows import sums_on
    from secateur.evaluators.tasks.task_set import TaskSet, task_values
    from secateur.pruners.models.account import zeros_of

    sources, texts = board_texts(settings, folders)
    loaded, anatomy, n_positions = open_model(cell.model, settings, folders, lambda line: None)
    plan = task_plan(settings, folders)
    tasks = None if plan is None else TaskSet(plan, loaded.model, loaded.tokenizer, settings.bos)
    batches = [_batches(loaded, anatomy, text, settings) for text in texts.values()]
    before = {} if tasks is None else tasks.measure()
    pruner, config, device = None, dict[str, Any](), anatomy.embedding.weight.device
    n_calibrated = 0
    if cell.method != DENSE:
        file = file_of(cell, settings, n_positions)
        file.check_model(anatomy)
        pruner = pruner_on(file, loaded, anatomy, sources, settings.window, no_windows())
        config = dict(pruner.fitted(file.form))
        n_calibrated = math.prod(cell.windows(settings, n_positions)) if cell.row.uses_data else 0
    with consumed(device) as work:
        if pruner is not None:
            pruner.prune(config, sequential=False)
    n_params = sum(x.numel() for x in loaded.model.parameters())
    costs: Mapping[str, float] = {"params": n_params, "sparsity": zeros_of(anatomy)}
    if pruner is not None and pruner.is_smaller(pruner.settings):
        costs = pruner.costs_of(config)
    sums = [sums_on(anatomy, found) for found in batches]
    after = {} if tasks is None else tasks.measure()
    values = loss_values(sums, settings.text) | vars(work) | {"calibration_tokens": n_calibrated}
    values |= {name: costs[name] for name in ("params", "sparsity")}
    return values | task_values(after) | answers_changed(before, after), sums[0]


def _batches(loaded: LoadedModel, anatomy: Anatomy, text: Text, settings: BoardSettings) -> list[Any]:
    """Windows of a text with the states of the dense model, which the model is now."""
    import torch

    from secateur.evaluators.data.tokens import windows
    from secateur.evaluators.data.windows import teacher_batches

    tokens = windows(loaded.tokenizer, text, settings.window, settings.tokens, bos=anatomy.bos)
    with torch.no_grad():
        return teacher_batches(anatomy, tokens)


def no_windows() -> Tensor:
    """Calibration windows that a recipe is given, which chooses its own."""
    import torch

    return torch.zeros(0, 1, dtype=torch.int64)


def loss_values(sums: Sequence[LossSums], texts: Sequence[str]) -> dict[str, float]:
    """``loss``, ``kl`` and ``ce`` on the first text, in nats a token; ``kl:<text>`` and ``ce:<text>`` on the others."""
    first, *others = (found.means() for found in sums)
    values = {"loss": first["kl"], "kl": first["kl"], "ce": first["ce"]}
    for name, means in zip(texts[1:], others, strict=True):
        values |= {f"kl:{name}": means["kl"], f"ce:{name}": means["ce"]}
    return values


def answers_changed(before: Mapping[str, TaskResult], after: Mapping[str, TaskResult]) -> dict[str, float]:
    """Numbers of samples of each task, and of those answered right by the pruned (``won``) or the dense model alone.

    Of multiple-choice tasks, by the sign of the margins.
    """
    found: dict[str, float] = {}
    for name, dense in before.items():
        pairs = list(zip(dense.margins, after[name].margins, strict=True))
        found[f"samples:{name}"] = dense.samples
        if pairs:
            found[f"won:{name}"] = sum(was <= 0 < now for was, now in pairs)
            found[f"lost:{name}"] = sum(now <= 0 < was for was, now in pairs)
    return found


def _end_with_parent(answered: threading.Event) -> None:
    """End this process when its stdin ends."""
    while os.read(0, 1):
        pass
    os._exit(0 if answered.is_set() else 1)


def main() -> None:
    """Answer one request."""
    answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever libraries print
    request = json.loads(sys.stdin.readline())
    answered = threading.Event()
    threading.Thread(target=_end_with_parent, args=[answered], daemon=True).start()
    from secateur.evaluators.session import set_threads

    set_threads(request["threads"])
    folders = [Path(folder) for folder in request["folders"]]
    measured = measure(Cell.parse(request["cell"]), board_settings(request["settings"]), folders)
    text = json.dumps(measured.to_json(), allow_nan=False)
    answered.set()
    with answer:
        answer.write(text)
