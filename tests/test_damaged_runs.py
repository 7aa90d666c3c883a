"""Damaged files of a run: each is named in one line, with what to do, and never a traceback."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from secateur.search.errors import UsageError
from secateur.search.study.asks import AskLog
from secateur.search.study.study import Study
from tests.runs import make_run
from tests.toy import ABOUT, measurement, start

MEASUREMENTS = "measurements.jsonl"
COMMANDS = (["front", "--json"], ["pick", "--sparsity", "0.3"], ["status"], ["report"])
N_DAMAGED = 24
NOTES = {"controller": "evolution", "notes": {"asked": 3, "correlation": 0.5}}
OVERLAP = {"blocks": [0], "known": {"wanda": "abs(W) * X"}, "overlap": {"abs(W)": {"wanda": 0.5}}}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("whole") / "run"
    make_run(directory, 6)
    (directory / "notes.json").write_text(json.dumps(NOTES))
    (directory / "formulas.json").write_text(json.dumps(OVERLAP))
    return directory


@pytest.fixture
def run(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def change_line(directory: Path, number: int, **changes: Any) -> None:
    path = directory / MEASUREMENTS
    lines = path.read_text(encoding="utf-8").splitlines()
    lines[number - 1] = json.dumps({**json.loads(lines[number - 1]), **changes})
    path.write_text("\n".join([*lines, ""]), encoding="utf-8")


def values_of(directory: Path, number: int) -> dict[str, float]:
    lines = (directory / MEASUREMENTS).read_text(encoding="utf-8").splitlines()
    return json.loads(lines[number - 1])["values"]


def one_line(err: str) -> bool:
    return err.count("\n") == 1 and err.startswith("secateur: error: ") and "This is a bug" not in err


# --- nonsense measurements ---


@pytest.mark.parametrize("command", COMMANDS)
def test_a_candidate_that_is_none_of_the_space_is_named_with_its_line(secateur, run, command):
    change_line(run, 4, candidate="zz", values={**values_of(run, 4), "loss": 1e-9, "params": 1})
    code, _, err = secateur(command[0], run, *command[1:])
    assert code == 2
    assert one_line(err), err
    assert f"in line 4 of {run / MEASUREMENTS}, got 'zz'" in err


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", ["loss", "kl", "ce"])
def test_a_loss_below_zero_is_named_with_its_line(secateur, run, command, name):
    change_line(run, 5, values={**values_of(run, 5), name: -5})
    code, _, err = secateur(command[0], run, *command[1:])
    assert code == 2
    assert one_line(err), err
    assert f"in line 5 of {run / MEASUREMENTS}" in err
    assert f"Expected `{name}` to be a number >= 0, got '-5'" in err


def test_rounding_below_zero_is_no_damage(run):
    change_line(run, 5, values={**values_of(run, 5), "loss": -1e-6, "kl": 0})
    assert Study.open(run).trials[4].measurement.values["loss"] == -1e-6


@pytest.mark.parametrize(
    "changes",
    [
        {"candidate": 3},
        {"candidate": None},
        {"fidelity": "searched"},
        {"fidelity": ["search:64"]},
        {"values": [1]},
        {"values": {}},
        {"values": {"kl": 1.0}},
        {"values": {"loss": True}},
        {"values": {"loss": "low"}},
        {"values": {"loss": None}},
        {"values": {"loss": float("nan")}},
        {"values": {"loss": 10**400}},
        {"values": {"loss": 1.0, "sparsity": 1.5}},
        {"values": {"loss": 1.0, "sparsity": -0.5}},
        {"values": {"loss": 1.0, "params": -1}},
        {"values": {"loss": 1.0, "task:piqa": float("inf")}},
        {"infeasible": 3},
        {"seed": "0"},
        {"tokens": -1},
        {"tokens": 1.5},
        {"seconds": float("inf")},
        {"worker": {}},
        {"blocks": None},
    ],
)
def test_a_wrong_value_in_a_line_is_named(tmp_path, changes):
    with start(tmp_path) as study:
        study.append([measurement(0), measurement(1), measurement(2)])
    change_line(tmp_path, 2, **changes)
    for make in (start, Study.open):
        with pytest.raises(UsageError, match=r"in line 2 of .*Restore the line, or remove it"):
            make(tmp_path)


def test_of_one_candidate_and_fidelity_all_values_are_equal(tmp_path):
    with start(tmp_path) as study:
        study.append([measurement(0), measurement(1)])
    reader, path = Study.open(tmp_path), tmp_path / MEASUREMENTS
    first = json.loads(path.read_text().splitlines()[0])
    with path.open("a") as file:
        file.write(json.dumps(first) + "\n")
    assert not reader.refresh()
    with path.open("a") as file:
        file.write(json.dumps({**first, "values": {**first["values"], "loss": 0.25}}) + "\n")
    with pytest.raises(UsageError, match=r"in line 1 after byte .*the values differ"):
        reader.refresh()
    with pytest.raises(UsageError, match=r"in line 4 of .*the values differ"):
        Study.open(tmp_path)


def test_a_value_out_of_range_is_refused_before_it_is_written(tmp_path):
    with start(tmp_path) as study:
        with pytest.raises(ValueError, match="Expected `loss`"):
            study.append(
                [measurement(0), type(measurement(1))("c1", measurement(1).fidelity, {"loss": -5.0})]
            )
        assert not study.trials
        study.append([measurement(0)])
    assert len(Study.open(tmp_path).trials) == 1


# --- wrong types ---


@pytest.mark.parametrize("line", ['{"told": "x", "n": 1}', "5", "null", '{"about": []}', "[" * 100_000])
def test_a_damaged_end_of_the_log_of_asks_is_left_out(tmp_path, line):
    start(tmp_path).close()
    with start(tmp_path) as study:
        study.asks({"kind": "toy"})
    path = tmp_path / AskLog.NAME
    path.write_text(path.read_text() + line + "\n")
    with start(tmp_path, ABOUT) as study:
        assert study.asks({"kind": "toy"}).asks == []


@pytest.mark.parametrize("content", ["", "null\n", "[]\n", "3\n"])
def test_settings_that_are_no_mapping_are_not_taken_for_defaults(secateur, run, content):
    (run / "settings.yaml").write_text(content)
    code, _, err = secateur("front", run)
    assert code == 2
    assert one_line(err), err
    assert str(run / "settings.yaml") in err


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("facts.parameters", [{"name": "x"}]),
        ("facts.parameters", {"x": 1}),
        ("facts.zeros", "none"),
        ("facts.versions", ["torch"]),
        ("identity.content", ["model"]),
    ],
)
def test_a_fact_of_another_type_is_named_by_its_place(secateur, run, place, value):
    path, (part, name) = run / "study.json", place.split(".")
    about = json.loads(path.read_text())
    about[part][name] = value
    path.write_text(json.dumps(about))
    code, _, err = secateur("report", run)
    assert code == 2
    assert one_line(err), err
    assert f"Expected `{place}` in {path}, got an error" in err


@pytest.mark.parametrize("name", ["settings.yaml", "study.json", MEASUREMENTS])
def test_a_file_that_is_no_text_is_not_dumped(secateur, run, name):
    (run / name).write_bytes(bytes(range(256)) * 400 + b"\n{}\n")
    code, _, err = secateur("front", run)
    assert code == 2
    assert one_line(err), err
    assert str(run / name) in err
    assert len(err) < 500


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all values inside a nested one."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield (*at, key)
        if isinstance(inner, dict | list):
            yield from places(inner, (*at, key))


def swapped(value: Any, rng: random.Random) -> Any:
    """The value with a random part of it replaced."""
    new = rng.choice([None, 0, [], {}, "x", True, -1, 1e300])
    options = list(places(value)) if isinstance(value, dict | list) else []
    if not options or rng.random() < 0.05:
        return new
    *above, last = rng.choice(options)
    inner = value
    for key in above:
        inner = inner[key]
    inner[last] = new
    return value


def damage(directory: Path, rng: random.Random) -> str:
    """Damage one file of the run at random, and say how."""
    files = [p for p in sorted(directory.iterdir()) if p.suffix in (".yaml", ".json", ".jsonl")]
    path, how = rng.choice(files), rng.random()
    data = path.read_bytes()
    if how < 0.1:
        path.write_bytes(data[: rng.randrange(len(data))])
        return f"{path.name} cut"
    if how < 0.2:
        at = rng.randrange(len(data))
        path.write_bytes(data[:at] + b"\xff\xfe\x80" + data[at:])
        return f"{path.name} with other bytes"
    if path.suffix == ".yaml":
        path.write_text(yaml.safe_dump(swapped(yaml.safe_load(data), rng)))
    elif path.suffix == ".json":
        path.write_text(json.dumps(swapped(json.loads(data), rng)))
    else:
        lines = data.decode().splitlines()
        i = rng.randrange(len(lines))
        lines[i] = json.dumps(swapped(json.loads(lines[i]), rng))
        path.write_text("\n".join([*lines, ""]))
    return f"{path.name} changed"


@pytest.mark.filterwarnings("ignore")
def test_no_damage_to_a_run_ends_in_a_traceback(secateur, whole, tmp_path, monkeypatch):
    monkeypatch.setattr("secateur.search.show.front_table.plot_front", lambda *_: None, raising=False)
    rng = random.Random(0)
    for index in range(N_DAMAGED):
        directory = Path(shutil.copytree(whole, tmp_path / str(index)))
        how = damage(directory, rng)
        name, *more = COMMANDS[index % len(COMMANDS)]
        code, _, err = secateur(name, directory, *more)
        assert code in (0, 2), (how, name, err)
        assert code == 0 or one_line(err), (how, name, err)
        assert len(err) < 1000, (how, name)
