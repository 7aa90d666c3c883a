"""Options of a space of recipes for calibration windows: checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from secateur.spaces.method import CONTRAST
from secateur.spaces.recipe.keys import CHUNK, SOURCE_NAME


class WindowOptions(Protocol):
    """Options for windows, of `RecipeSettings`, which has their meaning."""

    @property
    def quantiles(self) -> Sequence[tuple[float, float]]: ...
    @property
    def samples(self) -> Sequence[int]: ...
    @property
    def length(self) -> Sequence[int]: ...
    @property
    def choose(self) -> Sequence[str]: ...
    @property
    def pool_tokens(self) -> int: ...
    @property
    def sources(self) -> Mapping[str, str]: ...


def check_windows(of: WindowOptions) -> None:
    """Check options against each other.

    Raises:
        ValueError: if an option could never be carried out.
    """
    for low, high in of.quantiles:
        if not 0 <= low < high <= 1:
            raise ValueError(
                f"Expected `quantiles` from 0 to 1, the first below the second, got {[low, high]}."
            )
    for samples, length in ((of.samples[0], of.length[-1]), (of.samples[-1], of.length[0])):
        if samples * length > of.pool_tokens:  # the largest option would be infeasible
            raise ValueError(
                f"Expected `pool_tokens` for {samples} samples of {length} tokens, got {of.pool_tokens}."
            )
    odd = [length for length in of.length if length % CHUNK]
    by_chunks = [way for way in of.choose if way != "random"]
    if odd and by_chunks:
        raise ValueError(
            f"Expected `length` in multiples of {CHUNK} with `choose: {by_chunks[0]}`, got {odd[0]}. Take others, "
            "or `choose: [random]`."
        )
    for name in of.sources:
        if not SOURCE_NAME.fullmatch(name):
            raise ValueError(
                f"Expected names in `sources` of letters, digits, dots, dashes and underscores, got {name!r}."
            )
        if name == CONTRAST:
            raise ValueError(
                f"Expected other names in `sources` than {CONTRAST}, got it. Name that text in "
                "`evaluator.data.contrast`: it is in no mixture."
            )
