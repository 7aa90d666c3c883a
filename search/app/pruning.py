"""From a recipe to a model on the disk, without a search."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.search.app.bench import Say, silent
from secateur.search.app.recipe_file import RecipeFile
from secateur.search.errors import UsageError
from secateur.spaces.measurement import Fidelity

if TYPE_CHECKING:
    from secateur.evaluators.exporting import ExportSummary


def prune(
    file: RecipeFile,
    model: str,
    to: Path,
    *,
    text: str = "docs",
    tokens: int = 8192,
    window: int = 512,
    form: str | None = None,
    loading: dict[str, Any] | None = None,
    say: Say = silent,
) -> ExportSummary:
    """Carry a recipe out on a model, measure both, and save the pruned one as `export` does.

    Args:
        file: the recipe.
        model: see `load_model`.
        to: new or empty directory, or one that holds this export already.
        text: source of text to measure on: parts of it that no source of the recipe overlaps with.
        tokens: to measure on, a multiple of `window`.
        window: tokens that the model sees at once.
        form: a name that ``secateur list formats`` shows; None: the usual one.
        loading: ``dtype``, ``device`` and ``trust_remote_code``.
        say: told in one line what is being done.

    Raises:
        UsageError: if the recipe, the model or a text is not what it should be, or the format can't carry the model.
        ExportError: if the model can't be written, or does not load as it should.
    """
    from secateur.evaluators.exporting import export_candidate
    from secateur.evaluators.plan import Plan
    from secateur.evaluators.session import Workbench
    from secateur.pruners.recipes.checks import NEEDS, check_recipe
    from secateur.pruners.recipes.shipping import recipe_formats

    if tokens < window or tokens % window:
        raise UsageError(f"Expected `--tokens` to be a multiple of the window, {window}, got {tokens}.")
    formats = recipe_formats(file.space)
    if form is not None and form not in formats:
        raise UsageError(f"Expected a format of recipes of this unit ({', '.join(formats)}), got {form!r}.")
    plan = Plan(
        model=model,
        **{"dtype": "auto", "device": "auto", "trust_remote_code": False, **(loading or {})},
        space=file.space,
        loss="kl",
        calibration=next(iter(file.sources.values())),
        search=text,
        test=text,
        window=window,
        calibration_tokens=window,
        fidelities=(Fidelity("search", window), Fidelity("test", tokens)),
        seed=file.seed,
    )
    try:
        # An unknown metric is refused before a model is loaded.
        NEEDS[file.recipe["unit"]](file.recipe["metric"])
        bench = Workbench(plan, say)
        check_recipe(file.recipe, bench.anatomy)
        say("measuring the dense model")
        test = plan.final_fidelities[-1]
        dense = {f"{test.text}, dense": bench.data().live_losses(test)}
        return export_candidate(
            bench,
            file.text,
            to,
            sequential=False,
            seeds={"recipe": file.seed},
            searched=dense,
            form=form,
            say=say,
        )
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(str(error)) from error
