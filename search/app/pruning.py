"""From a recipe to a model on the disk, without a search."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from secateur.search.app.pruning_file import PruningFile
from secateur.search.app.session import Say, silent, usage_errors
from secateur.search.errors import UsageError
from secateur.spaces.measurement import Fidelity

if TYPE_CHECKING:
    from secateur.evaluators.exporting import ExportSummary


@usage_errors()
def prune(
    file: PruningFile,
    model: str,
    to: Path,
    *,
    text: str = "docs",
    tokens: int = 8192,
    window: int = 512,
    bos: bool | Literal["auto"] = "auto",
    form: str | None = None,
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
        form: a name that ``secateur list formats`` shows; None: the usual one.
        loading: ``dtype``, ``device`` and ``trust_remote_code``.
        say: told in one line what is being done.

    Raises:
        UsageError: if the recipe, the model or a text is not what it should be, or the format can't carry the model.
        ExportError: if the model can't be written, or does not load as it should.
    """
    from secateur.evaluators.data.text import load_parts, load_sources, measured_address
    from secateur.evaluators.data.tokens import windows
    from secateur.evaluators.data.windows import EvaluationData
    from secateur.evaluators.exporting import export, new_manifest
    from secateur.pruners.calibration.tokens import Calibration, Source, bos_token, tokenize
    from secateur.pruners.export.registry import check_config
    from secateur.pruners.models.discover import dissect
    from secateur.pruners.models.loading import load_model
    from secateur.pruners.pruner import DenseModel, pruner_class

    if tokens < window or tokens % window:
        raise UsageError(f"Expected `--tokens` to be a multiple of the window, {window}, got {tokens}.")
    file.check()  # before a model is loaded
    parts = load_parts(file.calibration_text, text, text)
    sources = load_sources(file.texts, file.calibration_text, text, text) if file.texts else {}
    say(f"loading {model}")
    defaults = {"dtype": "auto", "device": "auto", "trust_remote_code": False}

    loaded = load_model(model, **{**defaults, **(loading or {})}, check=partial(check_config, form), say=say)
    tokenizer, pruner_type = loaded.tokenizer, pruner_class(file.settings)
    begun = bos_token(tokenizer, bos)
    anatomy = replace(dissect(loaded.model, begun), all_experts=file.moe_all_experts)
    file.check_model(anatomy)
    test = windows(tokenizer, parts["test"], window, tokens, bos=begun)
    calibrated = test[:0]  # where the form chooses its own windows
    if file.calibration_windows is not None:
        n_tokens, length = file.calibration_windows
        calibrated = windows(tokenizer, parts["calibration"], length, n_tokens, "random", file.seed, begun)
    n_first = file.settings.n_text_tokens
    pruner = pruner_type(
        file.settings,
        DenseModel.of(loaded, anatomy, window, blocks=pruner_type.is_smaller(file.settings)),
        seed=file.seed,
        calibration=Calibration(
            calibrated,
            file.calibration_text,
            {
                name: Source(tokenize(tokenizer, source.text, n_first), source.sha256, source.source)
                for name, source in sources.items()
            },
            all_experts=file.moe_all_experts,
        ),
    )
    config = pruner.fitted(file.form)
    fidelity = Fidelity("test", tokens)
    data = EvaluationData(anatomy, {"test": test}, [fidelity])
    manifest = new_manifest(
        pruner, loaded, file.text, config, sequential=file.sequential, seeds={"recipe": file.seed}, form=form
    )
    pruner.check_format(config, tokenizer, manifest.format)  # before anything is measured
    say("measuring the dense model")
    data.of(fidelity)
    dense = {f"{fidelity.text}, dense": data.live_losses(fidelity)}
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
    return replace(summary, text=measured_address(text, [file.calibration_text]))
