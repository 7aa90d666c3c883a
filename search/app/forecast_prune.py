"""Forecast of a pruning, from a recipe and config.json alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.search.app.forecast_parts import calibration_line, room_of, speed_of, subject_of, with_streamed
from secateur.search.app.prune_work import PruneWork
from secateur.search.app.pruning_file import PruningFile
from secateur.search.app.recipe_file import RecipeFile
from secateur.search.app.session import Say, silent, usage_errors
from secateur.spaces.forecast import Forecast, Holding, Phase

if TYPE_CHECKING:
    from secateur.evaluators.forecast.prospect import Outline
    from secateur.pruners.learned.training_size import TrainingSize


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
    from secateur.evaluators.forecast import memory
    from secateur.evaluators.forecast.prospect import outline
    from secateur.pruners.pruner import pruner_class

    found = outline(
        model,
        **dict(loading or {}),
        check=lambda config: pruner_class(file.settings).check_config(file.settings, config),
        planned=devices[0][0] if devices else None,
        say=say,
    )
    with found.shapes:
        file.check_model(found.anatomy)
    parts = _Parts(file, found, tokens, window)
    work = parts.work
    speed = speed_of(found, window, say, trains=work.trains) if timing and not devices else None
    whole = Forecast(
        subject=subject_of(model, found, recipe=file.text),
        device=found.device.type,
        holdings=(memory.of_process(), *parts.whole()),
        work=tuple(work.steps(speed)),
        room=room_of(found, to or Path(), devices),
        calibrated=calibration_line(speed),
    )
    return with_streamed(whole, stream, parts.by_block())


PHASES: tuple[Phase, ...] = ("load", "prune", "test", "export")
"""Phases of a pruning."""


@dataclass(frozen=True)
class _Parts:
    """Holdings and work of a pruning besides the process.

    Args:
        file: the recipe or the candidate.
        found: outline of the model.
        tokens, window: measured on.
    """

    file: PruningFile
    found: Outline
    tokens: int
    window: int

    def whole(self) -> list[Holding]:
        """Holdings with the model in memory."""
        from secateur.evaluators.forecast import memory, training

        found = self.found
        held = [*memory.of_weights(found, PHASES), *self._of_statistics]
        held += memory.of_data(
            found, self.window, {"test": self.tokens}, {"test": ("test", "prune", "export")}
        )
        held += memory.of_pruned(found, ("prune", "test", "export"))
        held += memory.of_export(found)
        return held + training.of_trainings(found, self._trainings, self._kinds, ("prune",))

    def by_block(self) -> list[Holding] | None:
        """Holdings with the model streamed; None: it can't be."""
        from secateur.evaluators.data.windows import BATCH_TOKENS
        from secateur.evaluators.forecast import memory

        file, found = self.file, self.found
        if found.device.type != "cpu" or file.is_smaller or self._kinds or "schedule" in file.form:
            return None
        held = [*memory.of_streamed_weights(found, PHASES, ("prune",)), *self._of_statistics]
        held += memory.of_data(
            found, self.window, {"test": min(self.tokens, BATCH_TOKENS)}, {"test": ("test",)}
        )
        held += memory.of_states(found, file.calibrated_on[0] + 2 * self.tokens, "prune")
        held += memory.of_pruned(found, ("prune",), streamed=True)
        return held + memory.of_export(found, streamed=True)

    @property
    def work(self) -> PruneWork:
        """Steps of the pruning."""
        file = self.file
        n_calibration = file.calibrated_on[0]
        return PruneWork(
            file.form, self.found, n_calibration, self.tokens, self.window, self._kinds, self._trainings
        )

    @cached_property
    def _statistics(self) -> tuple[Mapping[str, Any], Sequence[Any]]:
        """Keyword arguments of `stream_blocks`, and kinds of gradients."""
        from secateur.evaluators.forecast.prospect import dense_of
        from secateur.pruners.pruner import pruner_class
        from secateur.pruners.recipes.checks import statistics_of

        file, found = self.file, self.found
        if isinstance(file, RecipeFile):
            return statistics_of(file.unit, [file.form])
        with found.shapes:
            settings = pruner_class(file.settings).settled(file.settings, found.anatomy)
            dense = dense_of(found, self.window, settings)
            pruner = pruner_class(settings)(settings, dense, seed=file.seed)
            return pruner.streamed, tuple(pruner.gradients)

    @property
    def _kinds(self) -> Sequence[Any]:
        return self._statistics[1]

    @cached_property
    def _of_statistics(self) -> list[Holding]:
        from secateur.evaluators.forecast import memory

        streamed, kinds = self._statistics
        tokens = memory.empty_tokens(*self.file.calibrated_on)
        return memory.of_statistics(self.found, streamed, kinds, tokens, "prune")

    @cached_property
    def _trainings(self) -> Mapping[str, TrainingSize]:
        """Trainings of a recipe; a candidate has none."""
        from secateur.pruners.recipes.trainings import trainings_of

        if not isinstance(self.file, RecipeFile):
            return {}
        with self.found.shapes:
            return trainings_of(self.file.form, self.found.anatomy)
