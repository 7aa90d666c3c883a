"""Run directories of each space that version 0.1 made stay readable: they are continued, and exported from."""

import json
import shutil
from pathlib import Path

import pytest

from secateur.search import app
from secateur.search.results.run import open_run

OLD = Path(__file__).parent / "old_runs"
KINDS = ("allocation", "architecture", "formula", "recipe")


def lines(directory: Path) -> list[str]:
    return (directory / "measurements.jsonl").read_text(encoding="utf-8").splitlines()


@pytest.mark.usefixtures("forked_reload")
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_of_version_0_1_is_continued_and_exported(kind, tmp_path):
    directory = tmp_path / kind
    shutil.copytree(OLD / kind, directory)
    before = lines(directory)
    view = open_run(directory)
    front = view.front()
    assert front, "read from the file alone"
    n_done = view.settings.budget.evaluations
    settings = view.settings.model_copy(
        update={"budget": view.settings.budget.model_copy(update={"evaluations": n_done + 2})}
    )
    said: list[str] = []
    app.search(settings, directory, say=said.append)
    notes = [line for line in said if "`space.calibration` is called `space.statistics` now" in line]
    assert len(notes) == ("calibration" in view.study.settings["space"])
    after = lines(directory)
    assert after[: len(before)] == before, "what was measured is not touched"
    assert len(after) >= len(before) + 2
    assert not {json.loads(line)["candidate"] for line in after[len(before) :]} & {
        json.loads(line)["candidate"]
        for line in before
        if json.loads(line)["fidelity"] == json.loads(after[-1])["fidelity"]
    }, "and nothing is measured again"
    chosen = max(front, key=lambda trial: len(trial.measurement.candidate))
    summary = app.export(directory, chosen, tmp_path / "model", calibration="dense")
    searched = next(values for name, values in summary.measured.items() if name.endswith("as searched"))
    exported = summary.measured[f"{chosen.measurement.fidelity.text}, as exported"]
    assert exported["kl"] == pytest.approx(searched["kl"], rel=1e-4, abs=1e-6)
