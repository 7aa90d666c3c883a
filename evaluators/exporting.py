"""From a candidate to a model on the disk: pruned once more for real, measured, saved, loaded again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from secateur.evaluators.session import Workbench
from secateur.evaluators.shipping import check_shipping, new_manifest, save_pruned
from secateur.pruners.export.manifest import MANIFEST, Manifest, same_export
from secateur.pruners.export.saving import check_destination


@dataclass(frozen=True)
class ExportSummary:
    """An exported model.

    Args:
        directory: where it is.
        already: True if the same export was there before.
        measured: ``kl`` and ``ce`` in nats per token by what they were measured on.
        checks: what was checked, and the result.
        label: what to expect of it.
    """

    directory: Path
    already: bool
    measured: Mapping[str, Mapping[str, float]]
    checks: Mapping[str, object]
    label: str


def export_candidate(
    bench: Workbench,
    candidate: str,
    to: Path,
    *,
    sequential: bool,
    seeds: Mapping[str, int],
    searched: Mapping[str, Mapping[str, float]],
    form: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> ExportSummary:
    """Export a candidate; the bench's model is pruned afterwards.

    Args:
        bench: fresh, with the dense model.
        candidate: canonical text.
        to: new or empty directory, or one that holds this export already.
        sequential: statistics of a block come from already pruned blocks; otherwise from the dense model, which
            gives the very weights that the search measured.
        seeds: for the record, by what they are for.
        searched: what the search measured, for the record.
        form: a name in `FORMATS`; None: what the space was restricted to, else the usual one.
        say: told in one line what is being done.

    Raises:
        ValueError: if the text is no candidate, `to` is not empty, or the format can't carry the model.
        ExportError: if the model can't be written, or does not load as it should.
    """
    manifest = new_manifest(bench, candidate, sequential=sequential, seeds=seeds, form=form)
    if same_export(to, manifest):
        there = Manifest.from_json((to / MANIFEST).read_text(encoding="utf-8"))
        return ExportSummary(to, True, there.measured, there.checks, there.label)
    check_destination(to)  # before minutes of work, not after
    check_shipping(bench, manifest)
    exported = _prune_and_measure(bench, candidate, sequential=sequential, say=say)
    measured = {**exported, **searched}
    say("writing, and loading it again in a fresh process")
    report = save_pruned(bench, to, replace(manifest, measured=measured))
    return ExportSummary(to, False, measured, report.manifest.checks, report.manifest.label)


def _prune_and_measure(
    bench: Workbench, candidate: str, *, sequential: bool, say: Callable[[str], None]
) -> dict[str, dict[str, float]]:
    data, fidelities = bench.data(), bench.plan.final_fidelities
    for fidelity in fidelities:
        data.of(fidelity)  # the dense side, while the model is dense
    n_blocks = len(bench.anatomy.blocks)
    bench.prune(
        bench.space.config(bench.space.parse(candidate)),
        sequential=sequential,
        on_block=lambda index: say(f"pruning block {index + 1}/{n_blocks}"),
    )
    say("measuring the pruned model")
    return {f"{fidelity.text}, as exported": data.live_losses(fidelity) for fidelity in fidelities}
