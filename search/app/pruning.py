"""From a recipe to a model on the disk, without a search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from secateur.search.app.pruning_file import PruningFile
from secateur.search.app.session import Say, silent, usage_errors
from secateur.search.app.within import least_share
from secateur.search.errors import UsageError
from secateur.search.results.pick import BOUND_KINDS, Bound
from secateur.search.results.shares import removed_shares, shares_words
from secateur.search.settings.evaluator import LatencySettings
from secateur.spaces.architecture.cost import cost, dense_of
from secateur.spaces.measurement import Fidelity

if TYPE_CHECKING:
    from torch import Tensor

    from secateur.evaluators.data.text import Text
    from secateur.evaluators.exporting import ExportSummary
    from secateur.pruners.models.anatomy import Anatomy
    from secateur.pruners.models.loading import LoadedModel
    from secateur.pruners.pruner import Config, Pruner
    from secateur.spaces.latency import LatencyTable


@usage_errors()
def prune(  # noqa: PLR0913  # the options of a command
    file: PruningFile,
    model: str,
    to: Path,
    *,
    text: str = "docs",
    tokens: int = 8192,
    window: int = 512,
    bos: bool | Literal["auto"] = "auto",
    allow_long_windows: bool = False,
    form: str | None = None,
    bounds: Sequence[Bound] = (),
    loading: dict[str, Any] | None = None,
    say: Say = silent,
) -> ExportSummary:
    """Prune a model by a recipe or a found candidate, measure both, and save the pruned one as `export` does.

    Args:
        file: the recipe or the candidate.
        model: see `load_model`.
        to: new or empty directory, or one that holds this export already.
        text: source of text to measure on: parts of it that no source of the recipe overlaps with; of a file that is
            named without a range the last 3/7, as its test part, or 3/10 where the recipe calibrates on it.
        tokens: to measure on, a multiple of `window`.
        window: tokens that the model sees at once.
        bos: begin windows with the tokenizer's BOS token; ``auto``: where it does so by itself.
        allow_long_windows: permit windows longer than the model's positions, where these are not learned.
        form: a name that ``secateur list formats`` shows; None: the usual one.
        bounds: upper limits of the whole pruned model, met by the least share that does; none: the file's share.
        loading: ``dtype``, ``device`` and ``trust_remote_code``.
        say: told in one line what is being done.

    Raises:
        UsageError: if the recipe, the model or a text is not what it should be, or the format can't carry the model.
        ExportError: if the model can't be written, or does not load as it should.
    """
    from secateur.evaluators.data.text import measured_address
    from secateur.evaluators.data.windows import EvaluationData
    from secateur.evaluators.exporting import export, new_manifest
    from secateur.pruners.models.usable import check_windows
    from secateur.pruners.pruner import pruner_class

    if tokens < window or tokens % window:
        raise UsageError(f"Expected `--tokens` to be a multiple of the window, {window}, got {tokens}.")
    if bounds and not pruner_class(file.settings).is_smaller(file.settings):
        raise UsageError(
            f"Expected a recipe that removes structure for a bound on {', '.join(b.name for b in bounds)}, got one "
            "whose zeros are stored. Take another recipe, or `--sparsity`."
        )
    file.check()  # before a model is loaded
    file.check_form(form)
    loaded, pruner, test = _opened(file, model, form, text, tokens, window, bos, bounds, loading or {}, say)
    for length in (window, *file.window_lengths):
        check_windows(loaded.model, length, allow_long=allow_long_windows)
    if bounds:
        file, config = _fitted_within(file, pruner, bounds, say)
    else:
        config = pruner.fitted(file.form)
    fidelity = Fidelity("test", tokens)
    data = EvaluationData(pruner.anatomy, {"test": test}, [fidelity])
    measured_on = measured_address(text, [file.calibration_text])
    manifest = new_manifest(
        pruner,
        loaded,
        file.text,
        config,
        sequential=file.sequential,
        seeds={"recipe": file.seed},
        texts={"test": measured_on},
        form=form,
    )
    pruner.check_format(config, loaded.tokenizer, manifest.format)  # before anything is measured
    say("measuring the dense model")
    data.of(fidelity)
    dense = {f"{fidelity.text}, dense": data.live_losses(fidelity)}
    smaller = pruner.is_smaller(pruner.settings)
    shares = removed_shares(pruner.costs_of(config), pruner.dense.shape.n_params) if smaller else {}
    summary = export(
        pruner,
        loaded,
        config,
        to,
        manifest,
        sequential=file.sequential,
        data=data,
        fidelities=[fidelity],
        searched=dense,
        say=say,
    )
    return replace(summary, text=measured_on, shares=shares)


def _opened(  # all that `prune` is given
    file: PruningFile,
    model: str,
    form: str | None,
    text: str,
    tokens: int,
    window: int,
    bos: bool | Literal["auto"],
    bounds: Sequence[Bound],
    loading: Mapping[str, Any],
    say: Say,
) -> tuple[LoadedModel, Pruner, Tensor]:
    """The dense model, its pruner with calibration data, and the windows to measure on."""
    from secateur.evaluators.data.text import load_parts, load_sources
    from secateur.evaluators.data.tokens import windows
    from secateur.pruners.calibration.tokens import bos_token
    from secateur.pruners.export.registry import check_config
    from secateur.pruners.models.discover import dissect
    from secateur.pruners.models.loading import load_model
    from secateur.pruners.pruner import pruner_class

    pruner_type = pruner_class(file.settings)

    def check(config: Any) -> None:
        check_config(form, config)
        pruner_type.check_config(file.settings, config)

    parts = load_parts(file.calibration_text, text, text, say)
    sources = load_sources(file.texts, file.calibration_text, text, text) if file.texts else {}
    say(f"loading {model}")
    defaults = {"dtype": "auto", "device": "auto", "trust_remote_code": False}
    loaded = load_model(model, **{**defaults, **loading}, check=check, say=say)
    tokenizer = loaded.tokenizer
    begun = bos_token(tokenizer, bos)
    anatomy = replace(dissect(loaded.model, begun), all_experts=file.moe_all_experts)
    file.check_model(anatomy)
    test = windows(tokenizer, parts["test"], window, tokens, bos=begun, say=say)
    calibrated = test[:0]  # where the form chooses its own windows
    if file.calibration_windows is not None:
        n_tokens, length = file.calibration_windows
        calibrated = windows(tokenizer, parts["calibration"], length, n_tokens, "random", file.seed, begun)
    latency = _latency(anatomy, model, bounds)
    return loaded, pruner_on(file, loaded, anatomy, sources, window, calibrated, latency), test


def pruner_on(
    file: PruningFile,
    loaded: LoadedModel,
    anatomy: Anatomy,
    sources: Mapping[str, Text],
    window: int,
    calibrated: Tensor,
    latency: LatencyTable | None = None,
) -> Pruner:
    """Pruner of a dense model by a file, with its calibration data.

    Args:
        file: the recipe or the candidate.
        loaded: the model.
        anatomy: of it.
        sources: texts that the form chooses windows from, by name.
        window: tokens that a token attends to, when multiply-accumulates are counted.
        calibrated: windows to calibrate on; none where the form chooses its own.
        latency: table for bounds that need one.

    Raises:
        ValueError: if the model can't be cut, and would be.
    """
    from secateur.pruners.calibration.tokens import Calibration, Source, tokenize
    from secateur.pruners.pruner import DenseModel, pruner_class

    pruner_type = pruner_class(file.settings)
    settings = pruner_type.settled(file.settings, anatomy)
    chosen = {
        name: Source(tokenize(loaded.tokenizer, text.text, settings.n_text_tokens), text.sha256, text.source)
        for name, text in sources.items()
    }
    blocks, held = pruner_type.is_smaller(settings), pruner_type.held_of(settings, anatomy)
    dense = DenseModel.of(loaded, anatomy, window, blocks=blocks, latency=latency, held=held)
    calibration = Calibration(calibrated, file.calibration_text, chosen, all_experts=file.moe_all_experts)
    return pruner_type(settings, dense, seed=file.seed, calibration=calibration)


def _fitted_within(
    file: PruningFile, pruner: Pruner, bounds: Sequence[Bound], say: Say
) -> tuple[PruningFile, Config]:
    """The file at the least share that keeps within the bounds, and its configuration."""
    shape = pruner.dense.shape

    def attempt(share: float) -> tuple[Config, Mapping[str, float]]:
        config = pruner.fitted(file.with_sparsity(share).form)
        return config, pruner.costs_of(config)

    file.with_sparsity(0.5)  # refuses a file with shares of its own
    dense = cost(shape, [dense_of(block) for block in shape.blocks])
    share, config, costs = least_share(bounds, dense, attempt)
    say(f"pruned to keep within the bounds: {shares_words(removed_shares(costs, shape.n_params))}")
    return file.with_sparsity(share), config


def _latency(anatomy: Anatomy, model: str, bounds: Sequence[Bound]) -> LatencyTable | None:
    """The latency table under default conditions, if a bound needs one."""
    from secateur.evaluators.latency.conditions import LatencySetup
    from secateur.evaluators.latency.store import TableSource, find_table

    if not any(BOUND_KINDS[bound.name].value.startswith("latency") for bound in bounds):
        return None
    of = LatencySettings()
    setup = LatencySetup(of.batch, of.prompt, of.threads, of.clock)
    return find_table(anatomy, TableSource(setup, None, None), model)
