"""Recipe file of what a search found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from secateur.search.app.candidate_file import CalibrationData, CandidateFile
from secateur.search.app.pruning_file import PruningFile
from secateur.search.app.recipe_file import RecipeFile
from secateur.search.controller import Trial
from secateur.search.errors import UsageError
from secateur.search.files import dump_yaml
from secateur.search.results.run import Run
from secateur.search.show.values import shown
from secateur.spaces.method import CONTRAST
from secateur.spaces.recipe.candidate import Recipe
from secateur.spaces.recipe.settings import RecipeSettings


def recipe_of(run: Run, trial: Trial) -> PruningFile:
    """The file of a trial.

    Raises:
        UsageError: if the trial is the dense model, or candidates of the run's space fit no other model.
    """
    of, space = run.settings, run.settings.space
    text, dense = trial.measurement.candidate, run.study.about.baselines.get("dense")
    if text == dense:
        raise UsageError(
            f"Expected a pruned model, got trial {trial.number}, the dense one. Name another trial."
        )
    sources = run.described("facts.sources", dict[str, str], {})  # runs of old have none
    if isinstance(space, RecipeSettings):
        return _recipe_file(run, space, Recipe.parse(text), sources)
    try:
        form = run.space.portable(run.space.parse(text), run.linears)
    except ValueError as error:
        raise UsageError(str(error)) from error
    data = of.evaluator
    calibration = CalibrationData(
        text=sources.get("calibration", data.data.calibration),
        tokens=data.calibration_tokens,
        window=data.window,
        contrast=data.data.contrast,
    )
    changed = space.model_dump(mode="json", exclude_defaults=True)
    return CandidateFile(
        space={"kind": space.kind, **changed},
        candidate=dict(form),
        calibration=calibration,
        seed=run.settings.data_seed,
        moe_all_experts=data.moe_all_experts,
    )


def _recipe_file(run: Run, space: RecipeSettings, recipe: Recipe, sources: Mapping[str, str]) -> RecipeFile:
    of_evaluator, used = run.settings.evaluator.data.calibration, recipe.plain["calibration"]["sources"]
    contrast = run.settings.evaluator.data.contrast
    second = {} if contrast is None else {CONTRAST: sources.get(CONTRAST, contrast)}
    return RecipeFile(
        recipe=recipe.plain,
        sources={n: sources.get(n, text or of_evaluator) for n, text in space.texts.items() if n in used}
        | second,
        pool_tokens=space.pool_tokens,
        seed=run.settings.data_seed,
        moe_all_experts=run.settings.evaluator.moe_all_experts,
        dampening=space.dampening,
        protect=space.protect,
        profile=space.profile,
    )


def best_of(run: Run) -> Trial:
    """The pruned trial of lowest loss.

    Raises:
        UsageError: if there is none yet.
    """
    recipes = [trial for trial in run.trials() if trial.measurement.values.get("sparsity")]
    if not recipes:
        raise UsageError(
            f"Expected a run with pruned models that were measured, got {run.study.directory} without."
        )
    return min(recipes, key=lambda trial: trial.measurement.values["loss"])


def written(run: Run, trial: Trial) -> str:
    """The text of a trial's recipe file, with what it was found with at its head.

    Raises:
        UsageError: as `recipe_of` does.
    """
    file = recipe_of(run, trial)
    dumped = file.model_dump(mode="json")
    order = sorted(type(file).model_fields, key="seed".__eq__)
    values: dict[str, Any] = {name: dumped[name] for name in order}
    if isinstance(file, CandidateFile):  # what is at its default is left out
        defaults = file.settings.model_dump(mode="json", exclude_defaults=True)
        values["space"] = {"kind": file.space["kind"], **defaults}
    kept = {name: value for name, value in values.items() if value not in ([], None) and value is not False}
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
