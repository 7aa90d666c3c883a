"""Streamed export of a model: pruned, measured and written block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from secateur.evaluators.data.windows import BATCH_TOKENS, TEACHER_BYTES, EvaluationData
from secateur.evaluators.exporting import ExportSummary
from secateur.evaluators.losses import LossSums, Teacher, loss_sums
from secateur.pruners.blockwise import BlockwisePruning
from secateur.pruners.calibration.tokens import tokens_sha256
from secateur.pruners.export.manifest import Manifest, same_export
from secateur.pruners.export.saving import (
    check_destination,
    check_dtypes,
    new_directory,
    remove_leftovers,
    versions,
)
from secateur.pruners.export.streamed import StreamedExport
from secateur.pruners.models.anatomy import Anatomy
from secateur.pruners.models.mapped import MappedModel, NotStreamedError
from secateur.spaces.measurement import Fidelity


def export_streamed(
    loaded: MappedModel,
    anatomy: Anatomy,
    pruning: BlockwisePruning,
    to: Path,
    manifest: Manifest,
    *,
    data: EvaluationData,
    fidelities: Sequence[Fidelity],
    searched: Mapping[str, Mapping[str, float]] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> ExportSummary:
    """Prune a mapped model, measure both and save the pruned one, as `export` does, without ever holding the model.

    What a killed call left is continued by the next one with the same arguments.

    Args:
        loaded: the dense model; dense afterwards.
        anatomy: of it.
        pruning: of its blocks.
        to: new or empty directory, or one that holds this export already.
        manifest: from `new_manifest`.
        data: to measure on; its model is not run.
        fidelities: to measure at.
        searched: earlier measurements, for the record; None: those of the dense model.
        say: given progress, one line at a time.

    Raises:
        NotStreamedError: if a mixture is stored in another dtype than it computes in: in the stored one, in which the
            result is checked, its tokens may be routed otherwise.
        ValueError: if `to` is not empty, or holds this export with a damaged file, or another process writes to there.
        ExportError: if the model can't be written, or does not load as it should.
    """
    if loaded.converts and any(block.mixture for block in anatomy.blocks):
        raise NotStreamedError("Expected `--dtype` as the weights of a mixture are stored, got another.")
    to = to.expanduser().absolute()
    removed = remove_leftovers(to, continued=True)
    if there := same_export(to, manifest):
        return ExportSummary(to, True, there.measured, there.checks, there.label, removed)
    check_destination(to)
    check_dtypes(loaded.precision, loaded.stored_dtype)
    texts = {fidelity.text: data.windows_of(fidelity) for fidelity in fidelities}
    identity = {
        "manifest": asdict(replace(manifest, measured={})),
        "precision": str(loaded.precision),
        "tokens": {name: tokens_sha256(x) for name, x in {**texts, "": pruning.tokens}.items()},
        "shapes": {name: list(x.shape) for name, x in {**texts, "": pruning.tokens}.items()},
        "versions": versions(),
    }
    n_bytes = sum(x.numel() for x in loaded.model.parameters()) * loaded.stored_dtype.itemsize
    n_tokens = 2 * sum(x.numel() for x in texts.values()) + (
        pruning.tokens.numel() if pruning.detail != "nothing" else 0
    )
    n_bytes += 2 * n_tokens * anatomy.width * loaded.precision.itemsize  # states before and after a block
    with new_directory(to, n_bytes, continued=True) as (made, scratch):
        streamed = StreamedExport(
            loaded, anatomy, pruning, texts, BATCH_TOKENS, data.check_tokens, made, scratch, identity, say
        )
        streamed.run()
        say("measuring the dense and the pruned model")
        losses = _Losses(anatomy, acceptance=data.acceptance)
        before, after = dict[str, Mapping[str, float]](), dict[str, Mapping[str, float]]()
        for fidelity in fidelities:
            name, tokens, damaged = fidelity.text, texts[fidelity.text], data.damaged_of(fidelity)
            rows = max(1, BATCH_TOKENS // tokens.shape[1])
            at = None if damaged is None else damaged.split(rows)
            states = zip(tokens.split(rows), streamed.dense(name), streamed.pruned(name), strict=True)
            before[f"{name}, dense"], after[f"{name}, as exported"] = losses.of(states, at)
        say("writing, and loading it again in a fresh process")
        measured = {**(before if searched is None else searched), **after}
        saved = streamed.finish(to, replace(manifest, measured=measured)).manifest
    return ExportSummary(to, False, saved.measured, saved.checks, saved.label, removed)


class _Losses:
    """Means of the losses from outputs of the last block, as `EvaluationData.live_losses` gives them.

    Args:
        anatomy: for the final norm and the head.
        acceptance: see `EvaluationData`.
    """

    def __init__(self, anatomy: Anatomy, *, acceptance: bool) -> None:
        self._anatomy, self._acceptance = anatomy, acceptance
        self._kept = 0  # bytes of probabilities, as if all were kept, so that the numbers are the same

    @torch.no_grad()
    def of(
        self,
        batches: Iterable[
            tuple[
                Int64[Tensor, "batch length"],
                Float[Tensor, "batch length width"],
                Float[Tensor, "batch length width"],
            ]
        ],
        damaged: Sequence[Tensor] | None = None,
    ) -> tuple[Mapping[str, float], Mapping[str, float]]:
        """Measurements of the dense and of the pruned model.

        Args:
            batches: token ids, and the outputs of the last block of the dense and of the pruned model.
            damaged: positions of each batch that ``weighted_kl`` is measured at.
        """
        anatomy, sums = self._anatomy, [LossSums(), LossSums()]
        for index, (tokens, *states) in enumerate(batches):
            room = tokens.numel() * Teacher.bytes_per_token(anatomy)
            keep = self._kept + room <= TEACHER_BYTES
            self._kept += room if keep else 0
            teacher = Teacher(
                anatomy,
                lambda dense=states[0]: dense,  # type: ignore[misc]
                keep=keep,
                acceptance=self._acceptance,
                damaged=None if damaged is None else damaged[index],
            )
            sums = [
                so_far + loss_sums(anatomy, x, tokens, teacher)
                for so_far, x in zip(sums, states, strict=True)
            ]
        return sums[0].means(), sums[1].means()
