"""Options of a space of recipes for the keys of their schedules."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import Field, model_validator

from secateur.spaces.method import Unit
from secateur.spaces.recipe.choices import SCHEDULE
from secateur.spaces.recipe.keys import leaves
from secateur.spaces.section import Section


class ScheduleOptions(Section):
    """Options for a recipe's ``schedule``, key by key; keys without options are as in `RecipeSettings.start`.

    What contradicts the other choices of a recipe is at its default there: rounds with a rule that looks at the dense
    model, any of it with a metric that prunes more than a layer at once.

    Args:
        step: shares of the dense model that go in a round, of structure and blocks.
        steps: numbers of rounds.
        shape: of the shares that the rounds reach, ``linear`` or ``cubic``.
        before: tokens of training before the first round.
        retrain: tokens of training in each round.
        after: tokens of training after the last round.
        loss: of the training, ``ce`` or ``kl``.
        lr: largest learning rates.
        penalty: factors of the squares of what was chosen to go.
    """

    step: list[float] = Field(default=[])
    steps: list[int] = Field(default=[])
    shape: list[str] = Field(default=[])
    before: list[int] = Field(default=[])
    retrain: list[int] = Field(default=[])
    after: list[int] = Field(default=[])
    loss: list[str] = Field(default=[])
    lr: list[float] = Field(default=[])
    penalty: list[float] = Field(default=[])

    @model_validator(mode="after")
    def _check(self) -> ScheduleOptions:
        known, given = leaves("structure"), dict(self.given())  # they have all keys
        if not given:
            raise ValueError(
                "Expected options for a key of `schedule`, got none. Name some, or leave it out."
            )
        for path, values in given.items():
            name = path.partition(".")[2]
            if wrong := [value for value in values if not known[path].rule.holds(value)]:
                raise ValueError(f"Expected `{name}` {known[path].rule.words}, got {wrong[0]!r}.")
            if len(set(values)) < len(values):
                raise ValueError(f"Expected `{name}` to list some, each once, got {values}.")
            if not isinstance(values[0], str) and values != sorted(values):
                raise ValueError(f"Expected `{name}` to ascend, got {values}.")
        return self

    def given(self) -> Iterator[tuple[str, list[Any]]]:
        """Keys with options, as ``schedule.key``, and these."""
        for name in type(self).model_fields:
            if values := getattr(self, name):
                yield f"{SCHEDULE}.{name}", values

    def check_unit(self, unit: Unit) -> None:
        """Check that recipes of a unit have these keys.

        Raises:
            ValueError: with the first one that they don't have.
        """
        for path, values in self.given():
            if path not in leaves(unit):
                raise ValueError(
                    f"Expected `schedule` without `{path.partition('.')[2]}` for recipes of {unit}, got {values}. "
                    "Remove it."
                )

    @property
    def trains(self) -> bool:
        """True if a recipe may train."""
        return any(map(any, (self.before, self.retrain, self.after)))
