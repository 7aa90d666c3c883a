"""Cells of a board: a method on a model at one share, with one choice of calibration data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from secateur.search.board.settings import BoardSettings
from secateur.spaces.recipe.known import KNOWN, KnownRecipe

DENSE = "dense"
NO_DATA = "no data"
"""Calibration of a method that takes none."""

_BAR = " | "


@dataclass(frozen=True)
class Cell:
    """One measurement of a board; the dense model has no share, no calibration data and no seed.

    Args:
        model: its name in the settings.
        method: name of a published recipe, or ``dense``.
        share: to remove; 0 for the dense model.
        calibration: ``equal``, ``published`` or ``no data``.
        seed: of the windows, and of what the method draws; of one without data the first of the settings.
    """

    model: str
    method: str
    share: float = 0.0
    calibration: str = NO_DATA
    seed: int = 0

    @property
    def text(self) -> str:
        """Canonical text, the cell's identity in the run: ``tiny | wanda 0.5 | equal | seed 0``."""
        if self.method == DENSE:
            return f"{self.model}{_BAR}{DENSE}"
        data = f"{self.calibration}{_BAR}seed {self.seed}" if self.calibration != NO_DATA else NO_DATA
        return f"{self.model}{_BAR}{self.method} {self.share:.10g}{_BAR}{data}"

    @classmethod
    def parse(cls, text: str) -> Cell:
        """Inverse of `text`.

        Raises:
            ValueError: if the text is no cell's.
        """
        model, *parts = text.split(_BAR)
        if parts == [DENSE]:
            return cls(model, DENSE)
        method, _, share = parts[0].rpartition(" ") if parts else ("", "", "")
        calibration = parts[1] if len(parts) > 1 else ""
        seed = parts[2].removeprefix("seed ") if len(parts) > 2 else "0"
        try:
            cell = cls(model, method, float(share), calibration, int(seed))
        except ValueError:
            cell = None
        if cell is None or cell.text != text:
            raise ValueError(
                f"Expected a cell such as 'tiny | wanda 0.5 | equal | seed 0', got {text[:80]!r}."
            )
        return cell

    @property
    def row(self) -> KnownRecipe:
        """The published recipe; none of the dense model."""
        return KNOWN[self.method]

    def windows(self, settings: BoardSettings, n_positions: int | None = None) -> tuple[int, int]:
        """Number and tokens of the calibration windows.

        Published windows that are longer than the model's positions are as long as these, as released code takes
        them; their number stays.

        Args:
            n_positions: of the model; None: unknown, or no limit.

        Raises:
            ValueError: if no published calibration is known.
        """
        if self.calibration != "published":
            length = settings.calibration_window
            return settings.calibration_tokens // length, length
        if self.row.calibration is None:
            raise ValueError(
                "Expected a published number of calibration windows, got none: the paper and its code were not found "
                "to name one. See `--calibration equal`."
            )
        n_windows, length = self.row.calibration
        return n_windows, min(length, n_positions or length)

    def form(self, settings: BoardSettings, n_positions: int | None = None) -> dict[str, Any]:
        """Plain form of the recipe, with its calibration windows; see `windows`, also for what is raised."""
        samples, length = self.windows(settings, n_positions)
        calibration = {"samples": samples, "length": length}
        return {"unit": self.row.unit, "sparsity": self.share, **self.row.form, "calibration": calibration}


def cells_of(settings: BoardSettings) -> Iterator[Cell]:
    """Cells in the order of their measurement: the dense models first, the first seed of all before the second.

    A method that takes no calibration data draws nothing, either: it has one cell a share.
    """
    for model in settings.models:
        yield Cell(model, DENSE)
    for seed in settings.seeds:
        for calibration in settings.calibration:
            for model in settings.models:
                for name in settings.names:
                    once = not KNOWN[name].uses_data
                    if once and (seed, calibration) != (settings.seeds[0], settings.calibration[0]):
                        continue
                    for share in settings.shares(KNOWN[name].unit):
                        yield (
                            Cell(model, name, share) if once else Cell(model, name, share, calibration, seed)
                        )
