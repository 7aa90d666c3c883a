"""From a candidate to a model on the disk: pruned once more for real, measured, saved, loaded again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from secateur.evaluators.workbench import Workbench
from secateur.pruners.export import check_destination, export_model
from secateur.pruners.manifest import MANIFEST, UNSTRUCTURED, Manifest, same_export

CHECK_TOKENS = 256
"""Positions on which the saved model's logits are compared."""


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
        say: told in one line what is being done.

    Raises:
        ValueError: if the text is no candidate, or `to` is not empty.
        ExportError: if the model can't be written, or does not load as it should.
    """
    config = bench.space.config(bench.space.parse(candidate))
    method = bench.plan.rig.method(bench.plan, config)
    manifest = Manifest(
        parent=bench.loaded.name,
        fingerprint=bench.loaded.fingerprint,
        method={**method.record, "calibration": "sequential" if sequential else "dense"},
        candidate=candidate,
        asked=config["sparsity"],
        calibration={
            "text": bench.plan.calibration,
            "tokens": bench.calibration.numel(),
            "sha256": bench.calibration_sha256,
        },
        seeds=seeds,
        measured={},
        label=UNSTRUCTURED,
    )
    if same_export(to, manifest):
        there = Manifest.from_json((to / MANIFEST).read_text(encoding="utf-8"))
        return ExportSummary(to, True, there.measured, there.checks, there.label)
    check_destination(to)  # before minutes of work, not after
    exported = _prune_and_measure(bench, config, sequential=sequential, say=say)
    measured = {**exported, **searched}
    say("writing, and loading it again in a fresh process")
    report = export_model(
        bench.loaded.model,  # type: ignore[arg-type]  # a transformers model, known to mypy as a module
        bench.loaded.tokenizer,
        to,
        manifest=replace(manifest, measured=measured),
        check_tokens=bench.windows["test"][:1, :CHECK_TOKENS],
        dtype=bench.loaded.stored_dtype,
    )
    return ExportSummary(to, False, measured, report.manifest.checks, report.manifest.label)


def _prune_and_measure(
    bench: Workbench, config: Mapping[str, Any], *, sequential: bool, say: Callable[[str], None]
) -> dict[str, dict[str, float]]:
    data, fidelities = bench.data(), bench.plan.fidelities[-2:]
    for fidelity in fidelities:
        data.of(fidelity)  # the dense side, while the model is dense
    n_blocks = len(bench.anatomy.blocks)
    bench.prune(
        config,
        sequential=sequential,
        on_block=lambda index: say(f"pruning block {index + 1}/{n_blocks}"),
    )
    say("measuring the pruned model")
    return {f"{fidelity.text}, as exported": data.live_losses(fidelity) for fidelity in fidelities}
