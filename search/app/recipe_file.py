"""A recipe as a file that a person reads, edits and runs on any model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, ValidationError, field_validator, model_validator

from secateur.search.controller import Trial
from secateur.search.errors import UsageError
from secateur.search.files import dump_yaml, read_yaml
from secateur.search.results.run import Run
from secateur.search.settings.problems import problems
from secateur.search.show.values import shown
from secateur.spaces.methods import RULES, Unit
from secateur.spaces.names import nearest
from secateur.spaces.recipe.candidate import Recipe
from secateur.spaces.recipe.form import completed
from secateur.spaces.recipe.keys import CHUNK
from secateur.spaces.recipe.known import KNOWN
from secateur.spaces.recipe.settings import RecipeSettings
from secateur.spaces.section import Section

CALIBRATION = "docs"
"""The text that a known recipe calibrates on, unless another is named."""


class RecipeFile(Section):
    """A recipe with all that it depends on but the model.

    Args:
        recipe: its plain form; what it leaves out is at its default.
        sources: text sources by the names that the recipe has for them.
        pool_tokens: of each source that samples are drawn from.
        seed: of what is drawn: samples, clusters, the noise of methods that have some.
        damp: share of the mean diagonal that is added to Gram matrices.
        protect: patterns of full names of linears that stay dense.
        profile: file with shares, or with an order, for a rule that follows one.
    """

    recipe: dict[str, Any]
    sources: dict[str, str]
    pool_tokens: int = Field(default=32768, gt=0)
    seed: int = Field(default=0, ge=0)
    damp: float = Field(default=0.01, gt=0)
    protect: list[str] = Field(default=[])
    profile: str | None = None

    @field_validator("recipe")
    @classmethod
    def _complete(cls, plain: dict[str, Any]) -> dict[str, Any]:
        return completed(plain)

    @property
    def text(self) -> str:
        """The recipe as a candidate's text."""
        return Recipe.of(self.recipe).text

    @model_validator(mode="after")
    def _check(self) -> RecipeFile:
        calibration, rule = self.recipe["calibration"], self.recipe.get("allocation", {}).get("rule")
        n_tokens, length = calibration["samples"] * calibration["length"], calibration["length"]
        if n_tokens > self.pool_tokens:
            raise ValueError(
                f"Expected `pool_tokens` for {calibration['samples']} samples of {length} tokens, got "
                f"{self.pool_tokens}."
            )
        if calibration["choose"] != "random" and length % CHUNK:
            raise ValueError(
                f"Expected `length` in multiples of {CHUNK} with `choose: {calibration['choose']}`, got {length}. "
                "Take another, or `choose: random`."
            )
        if rule and "profile" in RULES[rule].evidence and self.profile is None:
            raise ValueError(f"Expected `profile`, the file that the rule {rule} follows, got none.")
        missing = [name for name in calibration["sources"] if name not in self.sources]
        if missing:
            raise ValueError(
                f"Expected `sources` with the text source of {missing[0]!r}, got {', '.join(self.sources)}."
            )
        return self

    # --- as the pruner of recipes takes settings ---

    cache_gb: ClassVar[float] = math.inf
    """Statistics of one recipe are deleted afterwards."""

    export_format: ClassVar[str] = "any"

    @property
    def unit(self) -> Unit:
        """Unit that is pruned: ``weights``, ``structure`` or ``blocks``."""
        unit: Unit = self.recipe["unit"]
        return unit

    @property
    def choose(self) -> tuple[str]:
        """Ways in which calibration windows are chosen."""
        return (self.recipe["calibration"]["choose"],)


def read_recipe(path: Path) -> RecipeFile:
    """The recipe in a file.

    Raises:
        UsageError: in one line, with the first of the problems.
    """
    raw = read_yaml(path)
    if not isinstance(raw, Mapping) or not isinstance(raw.get("recipe"), Mapping):
        raise UsageError(
            f"Expected a file with `recipe:` and its sections, got {path} without. `secateur recipe RUN` writes one."
        )
    return _checked(raw)


def known_recipe(name: str, sparsity: float | None, source: str = CALIBRATION) -> RecipeFile:
    """A published method with its own defaults.

    Args:
        name: as ``secateur list recipes`` shows it.
        sparsity: share that goes.
        source: of the text that it calibrates on.

    Raises:
        UsageError: if there is no such method, or no sparsity.
    """
    if name not in KNOWN:
        raise UsageError(
            f"Expected `--recipe` to be a file, or a name that `secateur list recipes` shows, got {name!r}."
            f"{nearest(name, KNOWN)}"
        )
    if sparsity is None:
        raise UsageError(
            f"Expected `--sparsity` with the known recipe {name}, got none. It is the share that goes."
        )
    row = KNOWN[name]
    form = {"unit": row.unit, "sparsity": sparsity, **row.form}
    return _checked({"recipe": form, "sources": {"calibration": source}})


def open_recipe(name: str, sparsity: float | None = None, source: str | None = None) -> RecipeFile:
    """The recipe in a file, or a published method.

    Args:
        name: of the file, or as ``secateur list recipes`` shows it.
        sparsity: share that goes; None: as the file says.
        source: of the text that a published method calibrates on; None: the usual one.

    Raises:
        UsageError: if there is no such recipe, or it is none.
    """
    if not Path(name).is_file() and not name.endswith((".yaml", ".yml")):
        return known_recipe(name, sparsity, source or CALIBRATION)
    if source is not None:
        raise UsageError(f"Expected no `--calibration` with a file, whose `sources` say it, got {source!r}.")
    file = read_recipe(Path(name))
    return file if sparsity is None else with_sparsity(file, sparsity)


def with_sparsity(file: RecipeFile, sparsity: float) -> RecipeFile:
    """The same recipe at another sparsity.

    Raises:
        UsageError: if it is out of range.
    """
    return _checked(file.model_dump() | {"recipe": {**file.recipe, "sparsity": sparsity}})


def recipe_of(run: Run, trial: Trial) -> RecipeFile:
    """What a trial of a run is.

    Raises:
        UsageError: if the run did not search recipes, or the trial is the dense model.
    """
    settings, space = run.settings, run.settings.space
    if not isinstance(space, RecipeSettings):
        raise UsageError(f"Expected a run over the space recipe, got one over {space.kind}.")
    recipe = Recipe.parse(trial.measurement.candidate)
    if recipe.is_dense:
        raise UsageError(f"Expected a recipe, got trial {trial.number}, the dense model. Name another trial.")
    used = recipe.plain["calibration"]["sources"]
    of_evaluator = settings.evaluator.data.calibration
    cut = run.study.about.facts.get("sources", {})  # runs of old have none
    return RecipeFile(
        recipe=recipe.plain,
        sources={n: cut.get(n, text or of_evaluator) for n, text in space.texts.items() if n in used},
        pool_tokens=space.pool_tokens,
        seed=settings.evaluator.seed,
        damp=space.damp,
        protect=space.protect,
        profile=space.profile,
    )


def best_of(run: Run) -> Trial:
    """The recipe of lowest loss.

    Raises:
        UsageError: if there is none yet.
    """
    recipes = [trial for trial in run.trials() if trial.measurement.values.get("sparsity")]
    if not recipes:
        raise UsageError(
            f"Expected a run with recipes that were measured, got {run.study.directory} without."
        )
    return min(recipes, key=lambda trial: trial.measurement.values["loss"])


def written(run: Run, trial: Trial) -> str:
    """The text of a trial's recipe file, with what it was found with at its head.

    Raises:
        UsageError: as `recipe_of` does.
    """
    file = recipe_of(run, trial)
    values = {name: file.model_dump(mode="json")[name] for name in RecipeFile.model_fields}
    kept = {name: value for name, value in values.items() if value not in ([], None)}
    found = trial.measurement
    others = ", ".join(
        f"{name} {shown('loss', baseline.measurement.values['loss'])}"
        for name, baseline in run.baselines.items()
        if name != "dense" and baseline.measurement.infeasible is None
    )
    head = [
        f"Trial {trial.number} of a search on {run.settings.model}: loss {shown('loss', found.values['loss'])} on "
        f"{found.fidelity.text}, sparsity {shown('sparsity', found.values['sparsity'])}.",
        f"Baselines: {others}.",
        "Run it with: secateur prune --recipe THIS MODEL --to DIR",
    ]
    return "".join(f"# {line}\n" for line in head) + dump_yaml(kept)


def _checked(raw: Mapping[str, Any]) -> RecipeFile:
    try:
        file = RecipeFile.model_validate(raw)
    except ValidationError as error:
        raise UsageError(problems(error, RecipeFile)[0]) from error
    return file
