"""Forecast of a pruning, from a recipe and config.json alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.search.app.forecast_parts import calibration_line, room_of, subject_of, with_streamed
from secateur.search.app.pruning_file import PruningFile
from secateur.search.app.recipe_file import RecipeFile
from secateur.search.app.session import Say, silent, usage_errors
from secateur.spaces.forecast import Forecast, Holding, Phase, Work
from secateur.spaces.recipe.schedule import computed_tokens, shares_of, trained_tokens

if TYPE_CHECKING:
    from secateur.evaluators.forecast.prospect import Outline
    from secateur.evaluators.forecast.speed import Speed


@usage_errors()
def forecast_prune(
    file: PruningFile,
    model: str,
    *,
    tokens: int = 8192,
    window: int = 512,
    loading: Mapping[str, Any] | None = None,
    devices: Sequence[tuple[str, int | None]] = (),
    timing: bool = True,
    to: Path | None = None,
    stream: str = "auto",
    say: Say = silent,
) -> Forecast:
    """Forecast of a pruning by a recipe or a candidate.

    Args:
        file: the recipe or the candidate.
        model: see `load_model`.
        tokens, window: measured on.
        loading: ``dtype``, ``device`` and ``trust_remote_code``.
        devices, timing, say: see `forecast_search`.
        to: directory of the export; None: the present one.
        stream: word of `STREAM`.

    Raises:
        UsageError: if the recipe does not fit the config.
    """
    from secateur.evaluators.data.windows import BATCH_TOKENS
    from secateur.evaluators.forecast import memory
    from secateur.evaluators.forecast.prospect import outline
    from secateur.pruners.pruner import pruner_class
    from secateur.pruners.recipes.retraining import training_bytes

    pruner_type = pruner_class(file.settings)
    found = outline(
        model,
        **dict(loading or {}),
        check=lambda config: pruner_type.check_config(file.settings, config),
        planned=devices[0][0] if devices else None,
        say=say,
    )
    n_calibration, length = file.calibrated_on
    with found.shapes:
        file.check_model(found.anatomy)
        streamed, kinds = _pruning_statistics(file, found, window)
    phases: tuple[Phase, ...] = ("load", "prune", "test", "export")
    statistics = memory.of_statistics(
        found, streamed, kinds, memory.empty_tokens(n_calibration, length), "prune"
    )
    holdings = [*memory.of_weights(found, phases), *statistics]
    holdings += memory.of_data(found, window, {"test": tokens}, {"test": ("test", "prune", "export")})
    holdings += memory.of_pruned(found, ("prune", "test", "export"))
    holdings += memory.of_export(found)
    if "schedule" in file.form and trained_tokens(file.form):
        n_bytes = training_bytes(found.anatomy, list(found.anatomy.linears), length)
        why = "projections in training, gradients and moments, in fp32"
        holdings.append(Holding("training", "device", n_bytes, ("prune",), why, "schedule"))
    by_block: list[Holding] | None = None
    if found.device.type == "cpu" and not file.is_smaller and not kinds and "schedule" not in file.form:
        by_block = [*memory.of_streamed_weights(found, phases, ("prune",)), *statistics]
        by_block += memory.of_data(found, window, {"test": min(tokens, BATCH_TOKENS)}, {"test": ("test",)})
        by_block += memory.of_states(found, n_calibration + 2 * tokens, "prune")
        by_block += memory.of_pruned(found, ("prune",), streamed=True)
        by_block += memory.of_export(found, streamed=True)
    speed = None
    if timing and not devices:
        from secateur.evaluators.forecast.speed import measure_speed

        say("timing a block of this shape")
        speed = measure_speed(found, window)
    whole = Forecast(
        subject=subject_of(model, found, recipe=file.text),
        device=found.device.type,
        holdings=(memory.of_process(), *holdings),
        work=(
            *_prune_work(found, n_calibration, tokens, window, speed, kinds),
            *_training(file, found, speed),
        ),
        room=room_of(found, to or Path(), devices),
        calibrated=calibration_line(speed),
    )
    return with_streamed(whole, stream, by_block)


def _pruning_statistics(
    file: PruningFile, found: Outline, window: int
) -> tuple[Mapping[str, Any], Sequence[Any]]:
    """Statistics that a pruning takes: keyword arguments of `stream_blocks`, and kinds of gradients."""
    from secateur.evaluators.forecast.prospect import dense_of
    from secateur.pruners.pruner import pruner_class
    from secateur.pruners.recipes.checks import statistics_of

    if isinstance(file, RecipeFile):
        return statistics_of(file.unit, [file.form])
    settings = pruner_class(file.settings).settled(file.settings, found.anatomy)
    pruner = pruner_class(settings)(settings, dense_of(found, window, settings), seed=file.seed)
    return pruner.streamed, tuple(pruner.gradients)


def _training(file: PruningFile, found: Outline, speed: Speed | None) -> Iterator[Work]:
    """The training of a recipe's schedule, if there is any."""
    from secateur.evaluators.forecast.speed import block_shares

    if "schedule" not in file.form or not trained_tokens(file.form):
        return
    seconds = None
    if speed is not None:
        step = sum(block_shares(found.anatomy, file.form["calibration"]["length"])) * speed.block + speed.loss
        seconds = computed_tokens(file.form) * step
    n_rounds = len(shares_of(file.form))
    yield Work("training", seconds, trained_tokens(file.form), f"in {n_rounds} rounds", "schedule.retrain")


def _prune_work(
    found: Outline, n_calibration: int, n_tested: int, window: int, speed: Speed | None, kinds: Sequence[Any]
) -> Iterator[Work]:
    """Steps of a pruning with their times."""
    from secateur.evaluators.forecast.speed import block_shares, process_seconds

    stack = sum(block_shares(found.anatomy, window))
    n_bytes = sum(x.nbytes for x in found.anatomy.model.parameters())
    yield Work(
        "loading",
        None if speed is None else 2 * speed.read * n_bytes,
        0,
        "weights are read, converted and checked",
        "dtype",
    )
    passes = 2 + 3 * len(kinds)  # statistics, and the outputs of pruned blocks
    seconds = None if speed is None else passes * n_calibration * stack * speed.block
    yield Work(
        "pruning", seconds, n_calibration, "statistics, and outputs of pruned blocks; not the method itself"
    )
    dense = None if speed is None else n_tested * (stack * speed.block + speed.teacher + speed.loss)
    pruned = None if speed is None else n_tested * (stack * speed.block + speed.loss)
    yield Work(
        "measuring",
        None if dense is None or pruned is None else dense + pruned,
        2 * n_tested,
        "dense, and pruned",
        "--tokens",
    )
    yield Work(
        "writing",
        None if speed is None else 6 * speed.read * n_bytes + process_seconds(found.anatomy.model),
        0,
        "written, read again in a fresh process, compared",
    )
