"""Streamed export of a model: pruned, measured and written block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from secateur.evaluators.data.windows import BATCH_TOKENS, CHECK_TOKENS, TEACHER_BYTES
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
    windows: Int64[Tensor, "windows length"],
    fidelity: Fidelity,
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
        windows: to measure on.
        fidelity: of all windows, for the record.
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
    check_tokens = windows[:1, :CHECK_TOKENS]
    identity = {
        "manifest": asdict(replace(manifest, measured={})),
        "precision": str(loaded.precision),
        "tokens": [tokens_sha256(x) for x in (windows, pruning.tokens)],
        "shapes": [list(x.shape) for x in (windows, pruning.tokens)],
        "versions": versions(),
    }
    n_bytes = sum(x.numel() for x in loaded.model.parameters()) * loaded.stored_dtype.itemsize
    n_tokens = 2 * windows.numel() + (pruning.tokens.numel() if pruning.detail != "nothing" else 0)
    n_bytes += 2 * n_tokens * anatomy.width * loaded.precision.itemsize  # states before and after a block
    with new_directory(to, n_bytes, continued=True) as (made, scratch):
        streamed = StreamedExport(
            loaded, anatomy, pruning, windows, BATCH_TOKENS, check_tokens, made, scratch, identity, say
        )
        streamed.run()
        say("measuring the dense and the pruned model")
        batches = windows.split(max(1, BATCH_TOKENS // windows.shape[1]))
        dense, pruned = losses_of_states(anatomy, zip(batches, streamed.dense, streamed.pruned, strict=True))
        say("writing, and loading it again in a fresh process")
        measured = {f"{fidelity.text}, dense": dense, f"{fidelity.text}, as exported": pruned}
        saved = streamed.finish(to, replace(manifest, measured=measured)).manifest
    return ExportSummary(to, False, saved.measured, saved.checks, saved.label, removed)


@torch.no_grad()
def losses_of_states(
    anatomy: Anatomy,
    batches: Iterable[
        tuple[
            Int64[Tensor, "batch length"],
            Float[Tensor, "batch length width"],
            Float[Tensor, "batch length width"],
        ]
    ],
) -> tuple[Mapping[str, float], Mapping[str, float]]:
    """Means of the losses of the dense and of the pruned model, as `EvaluationData.live_losses` gives them.

    Args:
        anatomy: for the final norm and the head.
        batches: token ids, and the outputs of the last block of the dense and of the pruned model.
    """
    sums, kept = [LossSums(), LossSums()], 0
    for tokens, *states in batches:
        room = tokens.numel() * Teacher.bytes_per_token(anatomy)
        keep = kept + room <= TEACHER_BYTES  # as if all were kept, so that the numbers are the same
        kept += room if keep else 0
        dense = states[0]
        teacher = Teacher(anatomy, lambda dense=dense: dense, keep=keep)  # type: ignore[misc]
        sums = [
            so_far + loss_sums(anatomy, x, tokens, teacher) for so_far, x in zip(sums, states, strict=True)
        ]
    return sums[0].means(), sums[1].means()
