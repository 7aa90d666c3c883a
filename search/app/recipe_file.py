"""Recipe files: one way to prune, read, edited and run on any model that it fits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, field_validator, model_validator

from secateur.search.app.candidate_file import CandidateFile
from secateur.search.app.pruning_file import CALIBRATION, PruningFile, checked
from secateur.search.app.stock import SHARE, STOCK, stock_file
from secateur.search.errors import UsageError
from secateur.search.files import read_yaml
from secateur.spaces.formulas.metric import needs_contrast
from secateur.spaces.method import CONTRAST, Unit
from secateur.spaces.methods import RULES, check_protect
from secateur.spaces.names import nearest
from secateur.spaces.recipe.candidate import Recipe
from secateur.spaces.recipe.form import completed
from secateur.spaces.recipe.keys import CHUNK
from secateur.spaces.recipe.known import KNOWN

if TYPE_CHECKING:
    from secateur.pruners.models.anatomy import Anatomy


class RecipeFile(PruningFile):
    """A recipe with all that it depends on but the model.

    Args:
        recipe: its plain form; what it leaves out is at its default.
        sources: text sources by the names that the recipe has for them; ``contrast``: the second calibration text,
            for a metric over two.
        pool_tokens: of each source that samples are drawn from.
        dampening: share of the mean diagonal that is added to Gram matrices.
        protect: patterns of full names of linears that stay dense.
        profile: file with shares, or with an order, for a rule that follows one.
    """

    renamed: ClassVar[Mapping[str, str]] = {"damp": "dampening"}

    recipe: dict[str, Any]
    sources: dict[str, str]
    pool_tokens: int = Field(default=32768, gt=0)
    dampening: float = Field(default=0.01, gt=0)
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
        if CONTRAST in calibration["sources"]:
            raise ValueError(
                f"Expected other `calibration.sources` than {CONTRAST}, got it. Name the other texts."
            )
        metric = self.recipe["metric"]["name"]
        check_protect(self.unit, self.recipe["metric"], self.protect)
        if CONTRAST not in self.sources and needs_contrast(metric, self.unit):
            raise ValueError(
                f"Expected a second calibration text for the metric {metric}, got none. Name it in "
                f"`sources.{CONTRAST}`, or with `--contrast`."
            )
        return self

    @property
    def form(self) -> Mapping[str, Any]:
        return self.recipe

    @property
    def calibration_text(self) -> str:
        return next(text for name, text in self.sources.items() if name != CONTRAST)

    @property
    def texts(self) -> Mapping[str, str]:
        return self.sources

    def with_sparsity(self, sparsity: float) -> RecipeFile:
        return checked(RecipeFile, self.model_dump() | {"recipe": {**self.recipe, "sparsity": sparsity}})

    def check(self) -> None:
        from secateur.pruners.recipes.checks import needs_of

        needs_of(self.unit, self.recipe["metric"])

    def check_form(self, form: str | None) -> None:
        super().check_form(form)
        of = self.recipe.get("allocation", {})
        uneven = of.get("rule", "uniform") != "uniform" or of.get("skip_first") or of.get("skip_last")
        if form == "hf-stock" and self.unit == "structure" and (uneven or self.protect):
            raise UsageError(
                f"Expected an allocation that leaves all blocks alike for the format hf-stock, got {of.get('rule')} "
                "that does not. Choose another format, or leave the recipe out."
            )

    def check_model(self, anatomy: Anatomy) -> None:
        from secateur.pruners.recipes.checks import check_recipe

        check_recipe(self.recipe, anatomy, self.protect)

    # --- as the pruner of recipes takes settings ---

    @property
    def settings(self) -> RecipeFile:
        return self

    kind: ClassVar[str] = "recipe"

    @property
    def n_text_tokens(self) -> int:
        """Tokens of each source that windows are chosen from."""
        return self.pool_tokens

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


def read_recipe(path: Path) -> PruningFile:
    """The recipe or the candidate in a file.

    Raises:
        UsageError: in one line, with the first of the problems.
    """
    raw = read_yaml(path)
    if isinstance(raw, Mapping) and isinstance(raw.get("candidate"), Mapping):
        return checked(CandidateFile, raw)
    if not isinstance(raw, Mapping) or not isinstance(raw.get("recipe"), Mapping):
        raise UsageError(
            f"Expected a file with `recipe:` and its sections, or with `candidate:` and its `space:`, got {path} "
            "without. `secateur recipe RUN` writes one."
        )
    return checked(RecipeFile, raw)


def known_recipe(
    name: str, sparsity: float | None, source: str = CALIBRATION, contrast: str | None = None
) -> RecipeFile:
    """A published method with its own defaults.

    Args:
        name: as ``secateur list recipes`` shows it.
        sparsity: share to prune.
        source: of the text that it calibrates on.
        contrast: source of the second calibration text; None: there is none.

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
            f"Expected `--sparsity` with the known recipe {name}, got none. It is the share to prune."
        )
    row = KNOWN[name]
    form = {"unit": row.unit, "sparsity": sparsity, **row.form}
    sources = {"calibration": source} | ({} if contrast is None else {CONTRAST: contrast})
    return checked(RecipeFile, {"recipe": form, "sources": sources})


def file_for(
    recipe: str | None,
    sparsity: float | None = None,
    source: str | None = None,
    form: str | None = None,
    *,
    bounded: bool = False,
    contrast: str | None = None,
) -> tuple[PruningFile, str]:
    """The file that ``secateur prune`` runs, and a line about what was chosen; "" if everything was named.

    Without a recipe, and for a published one of structure in the format ``hf-stock``, see `stock_file`.

    Args:
        recipe: name or file, see `open_recipe`; None: none.
        sparsity: share to prune.
        source: of the calibration text.
        form: export format; None: the usual one.
        bounded: the share follows from bounds.
        contrast: source of the second calibration text, of a metric over two.

    Raises:
        UsageError: as `open_recipe` does.
    """
    published = recipe in KNOWN and not Path(str(recipe)).is_file()
    if contrast is not None and not published:
        raise UsageError(
            f"Expected `--contrast` with a published recipe, got {contrast!r} with {recipe or 'none'}. A file names "
            f"its own in `sources.{CONTRAST}`."
        )
    if recipe is None or (published and form == STOCK and KNOWN[str(recipe)].unit == "structure"):
        share = SHARE if sparsity is None else sparsity
        what = "the default recipe" if recipe is None else recipe
        asked = "" if bounded or sparsity is not None else f", {SHARE:.0%} of the blocks' parameters"
        line = f"{what}: equal blocks for {form or STOCK}{asked}; --recipe, --sparsity, --max-params choose otherwise"
        return stock_file(recipe, share, source, form), line
    if bounded and sparsity is None and published:
        sparsity = 0.5  # replaced
    return open_recipe(str(recipe), sparsity, source, contrast), ""


def open_recipe(
    name: str, sparsity: float | None = None, source: str | None = None, contrast: str | None = None
) -> PruningFile:
    """The recipe in a file, or a published method.

    Args:
        name: of the file, or as ``secateur list recipes`` shows it.
        sparsity: share to prune; None: as the file says.
        source: of the text that a published method calibrates on; None: the usual one.
        contrast: source of its second calibration text.

    Raises:
        UsageError: if there is no such recipe, or it is none.
    """
    if not Path(name).is_file() and not name.endswith((".yaml", ".yml")):
        return known_recipe(name, sparsity, source or CALIBRATION, contrast)
    if source is not None:
        raise UsageError(f"Expected no `--calibration` with a file, which names its texts, got {source!r}.")
    file = read_recipe(Path(name))
    return file if sparsity is None else file.with_sparsity(sparsity)
