"""Export: a model pruned for good, measured, saved, and loaded again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from secateur.evaluators.data.windows import EvaluationData
from secateur.pruners.export.manifest import UNSTRUCTURED, Manifest, same_export
from secateur.pruners.export.registry import ANY
from secateur.pruners.export.saving import check_destination, remove_leftovers
from secateur.pruners.models.account import account, zeros_of
from secateur.pruners.models.loading import LoadedModel
from secateur.pruners.pruner import Config, Pruner
from secateur.spaces.measurement import Fidelity


@dataclass(frozen=True)
class ExportSummary:
    """An exported model.

    Args:
        directory: of the model.
        already: True if the same export was there before.
        measured: means of the losses by fidelity and model, see `LossSums.means`.
        checks: results by name.
        label: expected gain in size and speed, in words.
        removed: paths of leftovers of killed exports to the directory, beside it.
        text: source and range of the text that was measured on; "" where the run says it.
        shares: removed ones of a structured model, see `removed_shares`.
    """

    directory: Path
    already: bool
    measured: Mapping[str, Mapping[str, float]]
    checks: Mapping[str, object]
    label: str
    removed: Sequence[str] = ()
    text: str = ""
    shares: Mapping[str, float] = field(default_factory=dict)


def new_manifest(
    pruner: Pruner,
    loaded: LoadedModel,
    candidate: str,
    config: Config,
    *,
    sequential: bool,
    seeds: Mapping[str, int],
    texts: Mapping[str, str],
    form: str | None = None,
    **method: Any,
) -> Manifest:
    """The manifest of an export, as far as it is known before the work.

    Args:
        pruner: of the dense model.
        loaded: the dense model.
        candidate: canonical text.
        config: its plain configuration.
        sequential: statistics, see `Pruner.prune`.
        seeds: for the record, by their use.
        texts: sources of the texts to measure on, by part.
        form: a name that ``secateur list formats`` shows; None: the one that the space was restricted to, or else its
            kind's usual one.
        method: further steps besides pruning, for the record.

    Raises:
        ValueError: if the space has no such format.
    """
    name: str = pruner.settings.export_format if form is None else form
    formats = pruner.formats(pruner.settings)
    if name not in (ANY, *formats):
        raise ValueError(
            f"Expected a format out of {', '.join(formats)}, got {name!r}. See `secateur list formats`."
        )
    statistics = "sequential" if sequential else pruner.searched_statistics
    return Manifest(
        parent=loaded.name,
        fingerprint=loaded.fingerprint,
        method={**pruner.record(config), "calibration": statistics, **method},
        candidate=candidate,
        calibration=pruner.calibration_record(),
        seeds=seeds,
        measured={},
        label=UNSTRUCTURED,
        revision=loaded.checkpoint.revision,
        format=formats[0] if name == ANY else name,
        parent_zeros=zeros_of(pruner.anatomy),
        not_understood={x.name: x.n_params for x in account(pruner.anatomy) if x.state == "not understood"},
        texts=texts,
        **pruner.asked(config),
    )


def export(
    pruner: Pruner,
    loaded: LoadedModel,
    config: Config,
    to: Path,
    manifest: Manifest,
    *,
    sequential: bool,
    data: EvaluationData,
    fidelities: Sequence[Fidelity],
    searched: Mapping[str, Mapping[str, float]],
    say: Callable[[str], None] = lambda line: None,
) -> ExportSummary:
    """Prune the live model for good, measure it, and save it; unless the same export is there.

    Args:
        pruner: of the dense model, with calibration data.
        loaded: the dense model; pruned afterwards.
        config: plain configuration of the candidate.
        to: new or empty directory, or one that holds this export already.
        manifest: from `new_manifest`.
        sequential: see `Pruner.prune`.
        data: to measure on.
        fidelities: to measure at.
        searched: earlier measurements, for the record, before those of the exported model.
        say: given progress, one line at a time.

    Raises:
        ValueError: if `to` is not empty, or holds this export with a damaged file, or the format can't carry the model.
        ExportError: if the model can't be written, or does not load as it should.
    """
    removed = remove_leftovers(to)
    if there := same_export(to, manifest):
        return ExportSummary(to, True, there.measured, there.checks, there.label, removed)
    check_destination(to)  # before minutes of work, not after
    pruner.check_format(config, loaded.tokenizer, manifest.format)
    for fidelity in fidelities:
        data.of(fidelity)  # the dense side, while the model is dense
    n_blocks = len(pruner.anatomy.blocks)
    pruner.prune(
        config, sequential=sequential, on_block=lambda index: say(f"pruning block {index + 1}/{n_blocks}")
    )
    say("measuring the pruned model")
    exported = {f"{fidelity.text}, as exported": data.live_losses(fidelity) for fidelity in fidelities}
    say("writing, and loading it again in a fresh process")
    manifest = replace(manifest, measured={**searched, **exported})
    saved = pruner.save(loaded, config, to, manifest, data.check_tokens).manifest
    return ExportSummary(to, False, saved.measured, saved.checks, saved.label, removed)
