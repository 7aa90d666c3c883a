"""Numbers and words of a report: the run at a glance, and how it was measured."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from secateur.search.controller import Trial
from secateur.search.losses import loss_of
from secateur.search.recovery.stage import DIRECTORY as RECOVERED
from secateur.search.results.paired import against_baseline
from secateur.search.results.run import Run
from secateur.search.results.shares import shares_words
from secateur.search.results.targets import best_by_target, best_references, target_sparsities
from secateur.search.show.forecast import truth_line
from secateur.search.show.front_table import feasible_baselines, loss_words
from secateur.search.show.values import duration, perplexity, scaled, shown
from secateur.search.study.foreseen import read_foreseen
from secateur.search.study.study import MEASUREMENTS


def tested(run: Run) -> dict[str, str]:
    """Ratio of the test loss of each target's best model to that of its best baseline, by its caption."""
    best = best_by_target(run.trials(), target_sparsities(feasible_baselines(run)))
    found = {label: against_baseline(run, trial, best=True) for label, trial in best.items()}
    return {
        f"the loss of {x.of} on the test text, {_at(run, label)}; ± 95 % over its windows": _times(x.text)
        for label, x in found.items()
        if x is not None
    }


def numbers(run: Run, facts: Mapping[str, Any]) -> dict[str, str]:
    """Summary of the run in a few large numbers, by their captions."""
    spent = facts["spent"]
    n_blocks = spent["blocks"] + spent["blocks_saved"]
    limits = ", ".join(f"{value:,} {name}" for name, value in facts["budget"].items())
    volume = facts["hypervolume"]
    cards = {
        f"evaluations, of a budget of {limits}": f"{spent['evaluations']:,}",
        "tokens evaluated for the search": scaled(spent["tokens"]),
        "of work, summed over workers": duration(spent["seconds"]),
        f"of {n_blocks:,} block evaluations saved by sharing": f"{spent['blocks_saved'] / max(1, n_blocks):.0%}",
        "trials on the front": str(facts["front"]),
        "hypervolume (1 = the baselines' box)": "–" if volume is None else f"{volume:.3f}",
    }
    baselines = feasible_baselines(run)
    references = best_references(baselines)
    for label, best in facts["best"].items():
        loss = baselines[references[label]].measurement.values["loss"]
        if loss > 0:
            name = (
                f"the loss of {references[label].rpartition('@')[0]}, {_at(run, label)}, on the search text"
            )
            cards[name] = _times(f"{best['loss'] / loss:.2f}")
    return cards


def _times(ratio: str) -> str:
    """Ratio with its sign, which never begins a line."""
    return f"{ratio}\N{NO-BREAK SPACE}×"


def _at(run: Run, label: str) -> str:
    """Target in words; the share that a structured model loses is no sparsity."""
    return f"at {'the target' if run.structured else 'sparsity'} {label}"


def measured(run: Run, trial: Trial) -> str:
    """Values of the trial in detail, on the search text and on the test text."""
    values, test = trial.measurement.values, run.test_of(trial)
    removed = run.removed(trial)
    share = (
        f"Sparsity {shown('sparsity', values.get('sparsity'))}" if removed is None else shares_words(removed)
    )
    text = f"{share}, {_loss_and_perplexity(values)}"
    if test is not None and test.infeasible is None:
        text += f"; on the test text {_loss_and_perplexity(test.values)}"
    return text


def _loss_and_perplexity(values: Mapping[str, float]) -> str:
    loss = f"loss {shown('loss', values['loss'])}"
    return f"{loss}, perplexity {shown('ppl', perplexity(values))}" if "ce" in values else loss


def method(run: Run) -> dict[str, str]:
    """Data and settings behind the numbers, date and host."""
    of, about = run.settings.evaluator, run.study.about
    facts = {
        "model": run.settings.model,
        "loss": loss_of(of.loss).summary + (", mean in " + unit if (unit := loss_of(of.loss).unit) else ""),
        "perplexity": f"exp of the mean cross-entropy of the next token, windows of {of.window} tokens, no overlap",
        "search text": f"{of.data.search}, {', '.join(f'{n:,}' for n in of.fidelities)} tokens (nested)",
        "test text": f"{of.data.test}, {of.test_tokens:,} tokens; no controller sees it",
        "calibration text": f"{of.data.calibration}, {of.calibration_tokens:,} tokens",
        **({} if of.data.contrast is None else {"contrast text": f"{of.data.contrast}, as many tokens"}),
        "seeds": f"{run.settings.seed} of the controller, {run.settings.data_seed} of the windows",
    }
    if of.training is not None:
        facts["light training"] = of.training.text
    also = [case.name for case in run.settings.space.cases]
    if also:
        facts["loss"] = f"{loss_words(run)}; cases: {'; '.join(['main', *also])}"
    if "host" in about.facts:
        facts["host"] = f"{about.facts['host']}, the driver"
    return facts | foreseen(run) | {"last measurement": last_measured(run)}


def foreseen(run: Run) -> dict[str, str]:
    """Forecasts of the search and of the recoveries beside the truth, by name."""
    places = {"forecast of the search": run.study.directory}
    recovered = run.study.directory / RECOVERED
    for path in sorted(recovered.glob("*/") if recovered.is_dir() else ()):
        places[f"forecast of the recovery {path.name}"] = path
    found = {name: read_foreseen(path) for name, path in places.items()}
    return {name: truth_line(*both) for name, both in found.items() if both is not None}


def hashes(run: Run) -> dict[str, str]:
    """Content hashes of model and data, and versions of packages, by name."""
    content = run.described("identity.content", dict[str, Any], {})
    found = {f"sha256 of {name.replace('_', ' ')}": str(value) for name, value in content.items()}
    versions = run.described("facts.versions", dict[str, Any], {})
    return found | {name: str(version) for name, version in versions.items()}


def last_measured(run: Run) -> str:
    """Date and time of the last change of the measurements."""
    path = run.study.directory / MEASUREMENTS
    return date(path.stat().st_mtime) if path.exists() else "–"


def date(seconds: float) -> str:
    """Text of a time since the epoch, in UTC."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
