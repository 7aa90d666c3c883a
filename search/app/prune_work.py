"""Work of a pruning that is foreseen: its steps, with their tokens and times."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from secateur.spaces.forecast import Work
from secateur.spaces.recipe.schedule import shares_of

if TYPE_CHECKING:
    from secateur.evaluators.forecast.prospect import Outline
    from secateur.evaluators.forecast.speed import Speed
    from secateur.pruners.learned.training_size import TrainingSize


@dataclass(frozen=True)
class PruneWork:
    """Work of a pruning.

    Args:
        form: of the recipe or the candidate.
        found: outline of the model.
        n_calibration: calibration tokens.
        n_tested: tokens to measure on.
        window: of these.
        kinds: of gradients that are collected.
        trainings: of the recipe, see `trainings_of`.
    """

    form: Mapping[str, Any]
    found: Outline
    n_calibration: int
    n_tested: int
    window: int
    kinds: Sequence[Any]
    trainings: Mapping[str, TrainingSize]

    @property
    def trains(self) -> bool:
        """True if blocks are passed backward: for gradients, or in training."""
        return bool(self.kinds or self.trainings)

    def steps(self, speed: Speed | None) -> Iterator[Work]:
        """Steps of the pruning.

        Args:
            speed: of this machine; None: without times.
        """
        read = None if speed is None else 2 * speed.read * self._n_bytes
        yield Work("loading", read, 0, "weights are read, converted and checked", "dtype")
        yield self._pruning(speed)
        yield self._measuring(speed)
        yield self._writing(speed)
        for name, size in self.trainings.items():
            yield self._training(name, size, speed)

    @property
    def _n_bytes(self) -> int:
        return sum(x.nbytes for x in self.found.anatomy.model.parameters())

    def _stack(self, window: int) -> float:
        """Multiply-accumulates of all blocks as a multiple of the first one's."""
        from secateur.evaluators.forecast.speed import block_shares

        return sum(block_shares(self.found.anatomy, window))

    def _pruning(self, speed: Speed | None) -> Work:
        seconds = None
        if speed is not None:
            stack = self._stack(self.window)
            of_token = 2 * stack * speed.block  # statistics, and the outputs of pruned blocks
            seconds = self.n_calibration * (of_token + len(self.kinds) * speed.training(stack))
        why = "statistics, and outputs of pruned blocks; not the method itself"
        return Work("pruning", seconds, self.n_calibration, why)

    def _measuring(self, speed: Speed | None) -> Work:
        seconds = None
        if speed is not None:
            of_token = 2 * (self._stack(self.window) * speed.block + speed.loss) + speed.teacher
            seconds = self.n_tested * of_token
        return Work("measuring", seconds, 2 * self.n_tested, "dense, and pruned", "--tokens")

    def _writing(self, speed: Speed | None) -> Work:
        from secateur.evaluators.forecast.speed import process_seconds

        seconds = None
        if speed is not None:
            seconds = 6 * speed.read * self._n_bytes + process_seconds(self.found.anatomy.model)
        return Work("writing", seconds, 0, "written, read again in a fresh process, compared")

    def _training(self, name: str, size: TrainingSize, speed: Speed | None) -> Work:
        """A training: of all blocks and the loss, or of blocks one after the other by their outputs."""
        from secateur.pruners.recipes.trainings import SCHEDULE

        share = 1.0 if size.n_blocks is None else size.n_blocks / len(self.found.anatomy.blocks)
        seconds = None
        if speed is not None:
            stack = share * self._stack(size.length)
            seconds = size.n_tokens * speed.training(stack, head=size.n_blocks is None, teacher=size.teacher)
        n_tokens = round(share * size.n_tokens)
        if name == SCHEDULE:
            why = f"in {len(shares_of(self.form))} rounds"
            return Work("training", seconds, n_tokens, why, "schedule.retrain")
        why = f"{size.n_steps} steps of {size.batch} windows" + (" a block" if size.n_blocks else "")
        return Work(f"training of {name}", seconds, n_tokens, why, "calibration")
