"""From a recipe to a model on the disk, without a search."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from secateur.search.app.pruning_file import PruningFile
from secateur.search.app.session import Say, silent, usage_errors
from secateur.search.app.within import least_share
from secateur.search.errors import UsageError
from secateur.search.results.pick import Bound
from secateur.search.results.shares import removed_shares, shares_words
from secateur.search.settings.evaluator import LatencySettings
from secateur.spaces.architecture.cost import cost, dense_of
from secateur.spaces.measurement import Fidelity

if TYPE_CHECKING:
    from torch import Tensor

    from secateur.evaluators.data.text import Text
    from secateur.evaluators.data.windows import EvaluationData
    from secateur.evaluators.exporting import ExportSummary
    from secateur.pruners.export.manifest import Manifest
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
    stream: str = "auto",
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
        stream: a word of `STREAM`.
        loading: ``dtype``, ``device`` and ``trust_remote_code``.
        say: told in one line what is being done.

    Raises:
        UsageError: if the recipe, the model or a text is not what it should be, or the format can't carry the model, or
            is to be streamed and can't be.
        ExportError: if the model can't be written, or does not load as it should.
    """
    from secateur.evaluators.data.text import measured_address
    from secateur.evaluators.data.windows import EvaluationData
    from secateur.pruners.models.mapped import MappedModel, NotStreamedError
    from secateur.pruners.models.opening import open_model, refuse
    from secateur.pruners.models.usable import check_windows

    if tokens < window or tokens % window:
        raise UsageError(f"Expected `--tokens` to be a multiple of the window, {window}, got {tokens}.")
    _check(file, bounds, form, stream)
    loading = {"dtype": "auto", "device": "auto", "trust_remote_code": False, **(loading or {})}
    fidelity = Fidelity("test", tokens)
    measured_on = measured_address(text, [file.calibration_text])

    def opened(stream: str) -> _Pruning:
        load = partial(open_model, stream=stream, say=say, **loading)
        loaded, pruner, test = _opened(file, model, form, text, tokens, window, bos, bounds, load, say)
        for length in (window, *file.window_lengths):
            check_windows(loaded.model, length, allow_long=allow_long_windows)
        data = EvaluationData(pruner.anatomy, {"test": test}, [fidelity])
        return _Pruning(loaded, pruner, data, fidelity, measured_on, form, say)

    pruning = opened("never" if file.is_smaller else stream)
    if isinstance(pruning.loaded, MappedModel):
        try:
            return pruning.streamed(file, to)
        except NotStreamedError as error:
            refuse(stream, error, say)
            pruning = opened("never")
    return pruning.whole(file, to, bounds)


@dataclass(frozen=True)
class _Pruning:
    """An opened model that is pruned, measured and saved.

    Args:
        loaded: the model.
        pruner: of it.
        data: to measure on.
        fidelity: to measure at.
        measured_on: address of the text.
        form: of the export; None: the usual one.
        say: told in one line what is being done.
    """

    loaded: LoadedModel
    pruner: Pruner
    data: EvaluationData
    fidelity: Fidelity
    measured_on: str
    form: str | None
    say: Say

    def streamed(self, file: PruningFile, to: Path) -> ExportSummary:
        """Prune the mapped model block by block.

        Raises:
            NotStreamedError: if it can't be, with the reason.
        """
        from secateur.evaluators.streaming import export_streamed
        from secateur.pruners.models.mapped import MappedModel

        assert isinstance(self.loaded, MappedModel), "looked at before"
        config = self.pruner.fitted(file.form)
        blockwise = self.pruner.blockwise(config, sequential=file.sequential)
        parts = (self.loaded, self.pruner.anatomy, blockwise, to, self._manifest(file, config))
        summary = export_streamed(*parts, data=self.data, fidelities=[self.fidelity], say=self.say)
        return replace(summary, text=self.measured_on)

    def whole(self, file: PruningFile, to: Path, bounds: Sequence[Bound]) -> ExportSummary:
        """Prune the model in memory, within the bounds if there are some."""
        from secateur.evaluators.exporting import export

        pruner, fidelity = self.pruner, self.fidelity
        if bounds:
            file, config = _fitted_within(file, pruner, bounds, self.say)
        else:
            config = pruner.fitted(file.form)
        manifest = self._manifest(file, config)
        pruner.check_format(config, self.loaded.tokenizer, manifest.format)  # before anything is measured
        self.say("measuring the dense model")
        self.data.of(fidelity)
        n_params = pruner.dense.shape.n_params
        shares = removed_shares(pruner.costs_of(config), n_params) if file.is_smaller else {}
        summary = export(
            pruner,
            self.loaded,
            config,
            to,
            manifest,
            sequential=file.sequential,
            data=self.data,
            fidelities=[fidelity],
            searched={f"{fidelity.text}, dense": self.data.live_losses(fidelity)},
            say=self.say,
        )
        return replace(summary, text=self.measured_on, shares=shares)

    def _manifest(self, file: PruningFile, config: Config) -> Manifest:
        from secateur.evaluators.exporting import new_manifest

        return new_manifest(
            self.pruner,
            self.loaded,
            file.text,
            config,
            sequential=file.sequential,
            seeds={"recipe": file.seed},
            texts={"test": self.measured_on},
            form=self.form,
        )


def _check(file: PruningFile, bounds: Sequence[Bound], form: str | None, stream: str) -> None:
    """Raise a ValueError for a file that fits no model, or not the other options; before a model is loaded."""
    if stream == "always" and file.is_smaller:
        raise UsageError(
            "Expected a recipe that zeros weights, such as wanda, for `--stream always`, got one that removes "
            "structure. Use `--stream never` to load the model whole."
        )
    if bounds and not file.is_smaller:
        raise UsageError(
            f"Expected a recipe that removes structure for a bound on {', '.join(b.name for b in bounds)}, got one "
            "whose zeros are stored. Take another recipe, or `--sparsity`."
        )
    file.check()
    file.check_form(form)


def _opened(  # all that `prune` is given
    file: PruningFile,
    model: str,
    form: str | None,
    text: str,
    tokens: int,
    window: int,
    bos: bool | Literal["auto"],
    bounds: Sequence[Bound],
    load: Callable[..., LoadedModel],
    say: Say,
) -> tuple[LoadedModel, Pruner, Tensor]:
    """The dense model, its pruner with calibration data, and the windows to measure on."""
    from secateur.evaluators.data.text import load_contrast, load_parts, load_sources
    from secateur.evaluators.data.tokens import windows
    from secateur.pruners.calibration.tokens import bos_token
    from secateur.pruners.export.registry import check_config
    from secateur.pruners.pruner import pruner_class

    pruner_type = pruner_class(file.settings)

    def check(config: Any) -> None:
        check_config(form, config)
        pruner_type.check_config(file.settings, config)

    parts = load_parts(file.calibration_text, text, text, say)
    sources = load_sources(file.texts, file.calibration_text, text, text) if file.texts else {}
    second = None
    if file.contrast_text is not None:
        second = load_contrast(file.contrast_text, file.calibration_text, text, text)
    say(f"loading {model}")
    loaded = load(model, check=check)
    tokenizer = loaded.tokenizer
    begun = bos_token(tokenizer, bos)
    anatomy = replace(loaded.dissect(begun), all_experts=file.moe_all_experts)
    file.check_model(anatomy)
    test = windows(tokenizer, parts["test"], window, tokens, bos=begun, say=say)
    calibrated, contrast = test[:0], None  # where the form chooses its own windows
    if file.calibration_windows is not None:
        n_tokens, length = file.calibration_windows
        calibrated = windows(tokenizer, parts["calibration"], length, n_tokens, "random", file.seed, begun)
        if second is not None:
            contrast = windows(tokenizer, second, length, n_tokens, "random", file.seed, begun, at_most=True)
    latency = _latency(anatomy, model, bounds)
    return loaded, pruner_on(file, loaded, anatomy, sources, window, calibrated, latency, contrast), test


def pruner_on(
    file: PruningFile,
    loaded: LoadedModel,
    anatomy: Anatomy,
    sources: Mapping[str, Text],
    window: int,
    calibrated: Tensor,
    latency: LatencyTable | None = None,
    contrast: Tensor | None = None,
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
        contrast: windows of a second calibration text; None: there are none, or the form chooses them.

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
    calibration = Calibration(calibrated, file.calibration_text, chosen, file.moe_all_experts, contrast)
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
    bounds = [bound.where_first_is(LatencySettings().batches[0]) for bound in bounds]
    share, config, costs = least_share(bounds, dense, attempt)
    say(f"pruned to keep within the bounds: {shares_words(removed_shares(costs, shape.n_params))}")
    return file.with_sparsity(share), config


def _latency(anatomy: Anatomy, model: str, bounds: Sequence[Bound]) -> LatencyTable | None:
    """The latency table under default conditions, if a bound needs one."""
    from secateur.evaluators.latency.conditions import LatencySetup
    from secateur.evaluators.latency.store import TableSource, find_table

    if not any(bound.value.startswith("latency") for bound in bounds):
        return None
    setup = LatencySetup()
    further = dict.fromkeys(bound.where_first_is(setup.batch).batch for bound in bounds)
    source = TableSource(setup, further=tuple(batch for batch in further if batch is not None))
    return find_table(anatomy, source, model)
