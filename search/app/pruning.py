"""From a recipe to a model on the disk, without a search."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.search.app.recipe_file import RecipeFile
from secateur.search.app.session import Say, silent
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
    """Prune a model by a recipe, measure both, and save the pruned one as `export` does.

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
    if tokens < window or tokens % window:
        raise UsageError(f"Expected `--tokens` to be a multiple of the window, {window}, got {tokens}.")
    try:
        return _prune(file, model, to, text, tokens, window, form, loading or {}, say)
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(str(error)) from error


def _prune(
    file: RecipeFile,
    model: str,
    to: Path,
    text: str,
    tokens: int,
    window: int,
    form: str | None,
    loading: dict[str, Any],
    say: Say,
) -> ExportSummary:
    from secateur.evaluators.data.text import load_parts, load_sources
    from secateur.evaluators.data.tokens import windows
    from secateur.evaluators.data.windows import EvaluationData
    from secateur.evaluators.exporting import export, format_of, new_manifest
    from secateur.pruners.calibration.pool import first_tokens
    from secateur.pruners.models.discover import dissect
    from secateur.pruners.models.loading import load_model
    from secateur.pruners.pruner import Calibration, DenseModel, Source
    from secateur.pruners.recipes.checks import check_recipe, needs_of
    from secateur.pruners.recipes.pruner import RecipePruner

    needs_of(file.unit, file.recipe["metric"])  # before a model is loaded
    parts = load_parts(next(iter(file.sources.values())), text, text)
    sources = load_sources(file.sources, next(iter(file.sources.values())), text, text)
    say(f"loading {model}")
    loaded = load_model(model, **{"dtype": "auto", "device": "auto", "trust_remote_code": False, **loading})
    anatomy = dissect(loaded.model)
    check_recipe(file.recipe, anatomy)
    test = windows(loaded.tokenizer, parts["test"], window, tokens)
    pruner = RecipePruner(
        file,
        DenseModel.of(loaded, anatomy, window, blocks=RecipePruner.is_smaller(file)),
        seed=file.seed,
        calibration=Calibration(
            test[:0],  # a recipe chooses its own windows
            text,
            {
                name: Source(
                    first_tokens(loaded.tokenizer, source.text, file.pool_tokens),
                    source.sha256,
                    source.source,
                )
                for name, source in sources.items()
            },
        ),
    )
    fidelity = Fidelity("test", tokens)
    data = EvaluationData(anatomy, {"test": test}, [fidelity])
    format_of(pruner, form)
    say("measuring the dense model")
    data.of(fidelity)
    dense = {f"{fidelity.text}, dense": data.live_losses(fidelity)}
    manifest = new_manifest(
        pruner, loaded, file.text, file.recipe, sequential=False, seeds={"recipe": file.seed}, form=form
    )
    return export(
        pruner,
        loaded,
        file.recipe,
        to,
        manifest,
        sequential=False,
        data=data,
        fidelities=[fidelity],
        searched=dense,
        say=say,
    )
