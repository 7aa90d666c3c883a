"""The commands as functions, with the command line's words as keyword arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from secateur.api.runs import Found, Run
from secateur.search.errors import UsageError
from secateur.search.files import read_yaml
from secateur.search.results.pick import parse_bounds
from secateur.search.settings.settings import settings_from
from secateur.spaces.methods import REGISTERED
from secateur.spaces.own_metrics import register_metric
from secateur.spaces.streaming import Stream

if TYPE_CHECKING:
    from secateur.evaluators.exporting import ExportSummary
    from secateur.search.app.pushing import Pushed
    from secateur.search.recovery.stage import Recovered

Say = Callable[[str], None]
Bos = bool | Literal["auto"]


def silent(line: str) -> None:
    """No progress."""


def search(
    settings: str | Path | Mapping[str, Any] | None = None,
    *,
    run: str | Path,
    say: Say = silent,
    anyway: bool = False,
    **sections: Any,
) -> Run:
    """Start a search, or continue one where it stopped.

    Args:
        settings: a YAML file or a mapping like one; None: all at their defaults.
        run: directory of the run; made if it is missing.
        say: given progress, one line at a time, e.g. `print`.
        anyway: go on where the forecast says that memory or disk do not suffice.
        sections: settings that override those, as in a file: ``model="tiny", space={"target": 0.5}``. The metric of
            the space may be a function, see `register_metric`.

    Returns:
        The run; of a search in stages the last one.

    Raises:
        UsageError: if the settings are wrong, or the directory belongs to another search.

    Example:
        >>> run = secateur.search(run="runs/mine", model="tiny", space={"target": 0.5}, budget={"evaluations": 40})
        >>> run.pick(sparsity=0.5).export("models/mine")
    """
    from secateur.search import app

    asked, directory = settings_from(raw_settings(settings, sections)), Path(run)
    app.search(
        asked,
        directory,
        say=say,
        forecast=lambda note: app.forecast_before(asked, directory, note, anyway=anyway),
    )
    return Run(app.open_run(app.last_stage(directory)))


def raw_settings(
    settings: str | Path | Mapping[str, Any] | None, sections: Mapping[str, Any]
) -> dict[str, Any]:
    """Plain settings of a file or a mapping, and of keyword arguments, which win."""
    given = read_yaml(Path(settings)) if isinstance(settings, str | Path) else settings
    raw = _merged(given or {}, sections)
    if isinstance(raw.get("space"), Mapping):
        raw["space"] = _with_metrics(raw["space"])
    return raw


def prune(
    model: str,
    *,
    to: str | Path,
    recipe: str | None = None,
    sparsity: float | None = None,
    calibration: str | None = None,
    contrast: str | None = None,
    format: str | None = None,
    text: str = "docs",
    tokens: int = 8192,
    window: int = 512,
    allow_long_windows: bool = False,
    bos: Bos = "auto",
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    anyway: bool = False,
    stream: Stream = "auto",
    say: Say = silent,
    **limits: float | str,
) -> ExportSummary:
    """Prune a model by a recipe, measure it, and write a directory that stock transformers loads.

    Args:
        model: ``tiny``, a hub id, a directory or a .gguf file.
        to: new or empty directory.
        recipe: a file, or a name of ``secateur list recipes``; None: equal blocks for a stock class.
        sparsity: share to prune, in [0, 1]; None: see the recipe.
        calibration: text of a published recipe; None: ``docs``.
        contrast: second calibration text, of a published recipe that compares two.
        format: a name of ``secateur list formats``; None: the usual one.
        text, tokens, window, bos: what the models are measured on.
        allow_long_windows: windows longer than the model's rotary positions, too.
        dtype, device, trust_remote_code: how the model is loaded.
        anyway: go on where the forecast says that memory or disk do not suffice.
        stream: block by block from the files, without the model in memory; auto: where it is large beside the free
            memory.
        say: given progress, one line at a time.
        limits: of the whole pruned model, in place of `sparsity`: ``max_params="0.7x"``, ``max_size="500MB"``.

    Raises:
        UsageError: if the recipe, the model or a text is not what it should be, or the format can't carry the model.
    """
    from secateur.search import app
    from secateur.search.app.forecast_prune import forecast_prune
    from secateur.search.app.forecasting import foretold, stream_by
    from secateur.search.app.recipe_file import file_for

    bounds = parse_bounds({name.replace("_", "-"): str(x) for name, x in limits.items()}) if limits else ()
    if bounds and sparsity is not None:
        raise UsageError("Expected `sparsity` or limits such as `max_params`, got both. Leave one out.")
    file, chosen = file_for(recipe, sparsity, calibration, format, bounded=bool(bounds), contrast=contrast)
    if chosen:
        say(chosen)
    loading = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
    measured: dict[str, Any] = {"tokens": tokens, "window": window, "loading": loading}
    forecast = partial(forecast_prune, file, model, **measured, stream=stream, to=Path(to))
    found = foretold(lambda timing: forecast(timing=timing), say, anyway=anyway)
    return app.prune(
        file,
        model,
        Path(to),
        text=text,
        allow_long_windows=allow_long_windows,
        bos=bos,
        form=format,
        bounds=bounds,
        stream=stream_by(found, stream),
        say=say,
        **measured,
    )


def push(
    source: str | Path,
    repo: str,
    *,
    upload: bool = False,
    private: bool = False,
    revision: str | None = None,
    say: Say = silent,
) -> Pushed:
    """Upload an exported model with its card to the Hugging Face hub, or show what would be uploaded.

    Args:
        source: directory of the model, or of a run, which stands for the newest model in it.
        repo: ``owner/name``; made if it is missing.
        upload: do it; False: a dry run, which sends nothing.
        private: make the repository one for its owner alone.
        revision: branch, made if it is missing; None: the main one.
        say: given progress and warnings, one line at a time.

    Raises:
        UsageError: if there is no export, a file of it is damaged, or the hub refuses.
        UnavailableError: if the hub does not answer.
    """
    from secateur.search import app

    return app.push(Path(source), repo, upload=upload, private=private, revision=revision, say=say)


def evaluate(
    model: str,
    *,
    text: str = "docs",
    tokens: int = 8192,
    window: int = 512,
    allow_long_windows: bool = False,
    bos: Bos = "auto",
    tasks: Sequence[str] = (),
    task_dir: str | Path | None = None,
    samples: int | None = None,
    verify: bool = False,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    stream: Stream = "auto",
    say: Say = silent,
) -> dict[str, float | str | int]:
    """Perplexity of a model, its share of zero weights, and its accuracy in tasks, by name.

    Args:
        model: ``tiny``, a hub id, a directory or a .gguf file.
        text, tokens, window, bos: what it is measured on.
        allow_long_windows: windows longer than the model's rotary positions, too.
        tasks: names of tasks of lm-eval.
        task_dir: directory of their files.
        samples: of each task; None: all.
        verify: check the files of an export first.
        dtype, device, trust_remote_code: how the model is loaded.
        stream: see `prune`.
        say: given progress, one line at a time.

    Raises:
        UsageError: if the model, the text or a task is wrong.
    """
    from secateur.search import app

    directory = None if task_dir is None else Path(task_dir)
    return app.evaluate(
        model,
        text=text,
        n_tokens=tokens,
        window=window,
        allow_long_windows=allow_long_windows,
        bos=bos,
        tasks=app.tasks_in(tasks, directory, samples, trusted=trust_remote_code),
        verify=verify,
        say=say,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
        stream=stream,
    )


def latency(
    *models: str,
    against: str | None = None,
    batch: int | Sequence[int] = 1,
    prompt: int = 512,
    threads: int | None = None,
    clock: Literal["wall", "cpu"] = "wall",
    eager: bool = False,
    rounds: int = 20,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    say: Say = silent,
) -> dict[str, Any]:
    """A model's latencies by sub-layer, kept for latency objectives; or whole models beside a dense one.

    Args:
        models: one model for a table, or those to compare.
        against: the dense model to compare with.
        batch, prompt, threads, clock, eager: conditions, see ``secateur latency --help``; `batch` may be a list.
        rounds: of measurements, at least ten.
        dtype, device, trust_remote_code: how models are loaded.
        say: given progress, one line at a time.

    Returns:
        What ``secateur latency --json`` prints, in milliseconds.

    Raises:
        UsageError: if a model or the conditions are wrong.
    """
    from secateur.search import app

    if len(models) < 1 or (against is None and len(models) > 1):
        raise UsageError(
            f"Expected one model for a table, got {len(models)}. Compare several with `against`."
        )
    conditions = {"batch": batch, "prompt": prompt, "threads": threads, "clock": clock, "eager": eager}
    how: dict[str, Any] = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
    if against is not None:
        return app.compare_latency(models, against, conditions, rounds=rounds, say=say, **how)
    table, _ = app.measure_latency(models[0], conditions, rounds=rounds, say=say, **how)
    return table.to_json()


def recover(
    run: Run | str | Path,
    trials: Sequence[int | Found] = (),
    *,
    method: Literal["lora", "full", "norms", "spp", "scale_lora", "perp", "slope", "last", "merged"] = "lora",
    loss: Literal["kl", "ce", "reconstruct"] = "kl",
    tokens: int = 65536,
    lr: float | None = None,
    rank: int = 16,
    data: Literal["all", "paser"] = "all",
    share: float = 0.2,
    address: str | None = None,
    anyway: bool = False,
    say: Say = silent,
    **bounds: float | str,
) -> list[Recovered]:
    """Train picked models with their zeros kept, and save them in the run's ``recovered``; the same call continues.

    Args:
        run: the run, or its directory.
        trials: in place of `bounds`.
        method: parameters that are trained.
        loss: distillation from the dense model, cross-entropy, or reconstruction block by block.
        tokens: of training, repetitions included.
        lr: learning rate; None: depends on the method.
        rank: of low-rank updates.
        data: windows to train on: all, or those that PASER chooses.
        share: of the windows, that PASER chooses at most.
        address: of a Ray cluster; None: a local one.
        anyway: go on where the forecast says that memory or disk do not suffice.
        say: given progress, one line at a time.
        bounds: as for `Run.pick`.

    Raises:
        UsageError: if Ray or PEFT is not installed, the run's model or data have changed, or no trial fits.
    """
    from secateur.search import app
    from secateur.search.app.forecast_recover import forecast_recover
    from secateur.search.app.forecasting import foretold, stream_by
    from secateur.search.recovery.stage import recovery_settings

    directory = run.directory if isinstance(run, Run) else Path(run)
    view = app.open_run(directory)
    settings = recovery_settings(
        method=method, loss=loss, tokens=tokens, lr=lr, rank=rank, data=data, share=share, address=address
    )
    numbers = [x.number if isinstance(x, Found) else x for x in trials]
    chosen = [view.pick(number=number) for number in numbers]
    if not chosen:
        chosen = [view.pick(parse_bounds({name.replace("_", "-"): str(x) for name, x in bounds.items()}))]
    foreseen = foretold(
        lambda timing: forecast_recover(directory, chosen, settings.training, timing=timing),
        say,
        anyway=anyway,
    )
    stream = stream_by(foreseen, view.settings.stream)
    return app.recover(directory, chosen, settings, stream=stream, say=say)


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings, those above last."""
    found = dict(below)
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(found.get(key), Mapping)
        found[key] = _merged(found[key], value) if both else value
    return found


def _with_metrics(space: Mapping[str, Any]) -> dict[str, Any]:
    """The section ``space`` with names in place of functions, which are registered."""

    def name_of(metric: Any) -> Any:
        if not callable(metric):
            return metric
        known = next((row.name for row in REGISTERED.values() if row.function is metric), None)
        if known is None:
            register_metric(metric)
        return known or metric.__name__

    found = dict(space)
    if "metric" in found:
        found["metric"] = name_of(found["metric"])
    if isinstance(found.get("metrics"), list | tuple):
        found["metrics"] = [name_of(metric) for metric in found["metrics"]]
    return found
