"""Latencies at several batch sizes: measured, recorded, shown, bounded."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from secateur.evaluators.latency.conditions import LatencySetup, conditions, key_of, setups_of
from secateur.evaluators.latency.models import all_of, predicted_ms
from secateur.evaluators.latency.store import MeasuredTable, TableSource, find_table, save_table
from secateur.pruners.export.manifest import MANIFEST
from secateur.pruners.models.loading import find_checkpoint
from secateur.search import app
from secateur.search.app.bounded import bounded
from secateur.search.app.session import plan
from secateur.search.cli import _dispatch
from secateur.search.errors import UsageError
from secateur.search.results.pick import Bound
from secateur.search.settings.settings import settings_from
from secateur.search.show.front_table import columns, front_rows
from secateur.spaces.architecture.candidate import read_kept
from secateur.spaces.latency import PHASES, LatencyTable
from tests.models import small_anatomy, small_llama
from tests.timing import SETUP, VOCABULARY, CountingClock, measured, table
from tests.toy import measurement

N_LAYERS = 4
BLOCK = 240 * 32  # weights of a block's projections


@pytest.fixture(scope="module")
def anatomy():
    return small_anatomy(n_layers=3)


def tables(anatomy, *batches):
    return [measured(anatomy, replace(SETUP, batch=batch)) for batch in batches]


def test_settings_and_conditions_take_a_list():
    wanted = {"objectives": ["loss", "latency_decode", "latency_decode@8"]}
    asked = plan(settings_from({**wanted, "evaluator": {"latency": {"batch": [1, 8, 2], "prompt": 64}}}))
    assert asked.latency == TableSource(LatencySetup(1, 64), further=(8, 2))
    assert [setup.batch for setup in asked.latency.setups] == [1, 8, 2]
    assert setups_of({"batch": "1,8", "prompt": 4}) == [LatencySetup(1, 4), LatencySetup(8, 4)]
    assert setups_of({"batch": [2, 3]}) == [LatencySetup(2), LatencySetup(3)]
    assert setups_of({"batch": 5}) == [LatencySetup(5)]
    assert setups_of({}) == [LatencySetup()]


@pytest.mark.parametrize("batch", [[1, 1], [0], [], ["a"]])
def test_wrong_lists_are_refused(batch):
    with pytest.raises(UsageError, match=r"Expected .*batch"):
        settings_from({"evaluator": {"latency": {"batch": batch}}})


def test_a_search_finds_the_tables_of_its_batch_sizes_in_the_cache(anatomy, cache):
    first, second = tables(anatomy, 1, 8)
    second = replace(second, table=table(second.table.key, ffn=48))
    save_table(first)
    source = TableSource(SETUP, further=(8,))
    with pytest.raises(ValueError, match=r"batch 8.* secateur latency M --batch 1,8 --prompt 8 --threads 1$"):
        find_table(anatomy, source, "M")
    save_table(second)
    found = find_table(anatomy, source, "M")
    assert list(found.phases) == ["prefill", "decode", "prefill@8", "decode@8"]
    assert found.phases["decode@8"] == second.table.phases["decode"]
    assert find_table(anatomy, TableSource(SETUP), "M") == first.table  # as a search of one batch size has it


def test_a_file_of_several_batch_sizes_serves_a_search_that_names_them(anatomy, tmp_path):
    joined = MeasuredTable.joined(tables(anatomy, 1, 8))
    assert joined.conditions["batch"] == [1, 8]
    assert joined.table.key == key_of({**conditions(anatomy, SETUP), "batch": [1, 8]})
    path = tmp_path / "phone.json"
    path.write_text(json.dumps(joined.to_json()))
    assert find_table(anatomy, TableSource(SETUP, str(path), further=(8,)), "M") == joined.table
    with pytest.raises(ValueError, match=r"at the batch sizes \[1, 4\], got one at \[1, 8\]"):
        find_table(anatomy, TableSource(SETUP, str(path), further=(4,)), "M")


def test_a_table_has_both_phases_of_each_batch_size():
    phases = dict(table().phases)
    for wrong in (
        {"decode@8": phases["decode"]},
        {"decode@x": phases["decode"], "prefill@x": phases["decode"]},
    ):
        with pytest.raises(ValueError, match="Expected the phases"):
            LatencyTable("key", phases | wrong)


def test_a_bound_may_name_a_batch_size():
    values = {"latency_decode": 14.0, "latency_decode@8": 60.0, "params": 5.0}
    trial = SimpleNamespace(measurement=replace(measurement(0), values=values))
    dense = SimpleNamespace(
        measurement=replace(measurement(0), values={"latency_decode": 20.0, "latency_decode@8": 120.0})
    )
    assert Bound.parse("max-latency", "60ms@8").excess(trial, None) == 0
    assert Bound.parse("max-latency", "50 ms @ 8").excess(trial, None) == pytest.approx(0.2)
    assert Bound.parse("max-latency", "0.4x@8").excess(trial, dense) == pytest.approx(12 / 48)
    assert Bound.parse("max-latency", "14@1").where_first_is(1).excess(trial, None) == 0
    with pytest.raises(UsageError, match=r"trials with `latency_decode@4` for `max-latency`"):
        Bound.parse("max-latency", "14@4").where_first_is(1).excess(trial, None)
    for name, text in (("max-latency", "14@0"), ("max-latency", "14@"), ("max-params", "90M@8")):
        with pytest.raises(UsageError, match=f"Expected `{name}` such as"):
            Bound.parse(name, text)


@pytest.fixture
def small(tmp_path):
    source = Path(find_checkpoint("tiny").location)
    small_llama(n_layers=N_LAYERS, vocab_size=VOCABULARY, max_position_embeddings=1024).save_pretrained(
        tmp_path / "dense"
    )
    for path in source.glob("tokenizer*"):
        shutil.copy(path, tmp_path / "dense")
    return str(tmp_path / "dense")


@pytest.fixture
def counted(cache, monkeypatch):
    monkeypatch.setattr("secateur.evaluators.latency.table.clock_of", lambda device: CountingClock())
    monkeypatch.setattr("secateur.evaluators.latency.models.clock_of", lambda device: CountingClock())


@pytest.mark.usefixtures("counted")
def test_the_command_measures_and_compares_at_each_batch_size(secateur, cache, small):
    how = ("--batch", "1,8", "--prompt", 16, "--threads", 1, "--rounds", 10)
    status, out, err = secateur("latency", small, *how, "--json")
    assert status == 0, err
    found = json.loads(out)
    assert found["conditions"]["batch"] == [1, 8]
    dense = {phase: spread["median"] for phase, spread in found["dense_ms"].items()}
    n_weights = N_LAYERS * BLOCK
    head = VOCABULARY * 32  # logits of the last token of each sequence
    assert dense["decode@8"] == pytest.approx(5 + 8 * (n_weights + head))
    assert dense["prefill@8"] == pytest.approx(5 + 8 * (16 * n_weights + head))
    assert dense["decode"] == pytest.approx(5 + n_weights + head)
    assert len(list((cache / "latency").iterdir())) == 2  # a file a batch size
    status, out, err = secateur("latency", small, *how)
    assert status == 0, err
    assert "batch 1, 8, prompt 16" in out
    assert "decode@8" in out
    shutil.copytree(small, small + "-copy")
    status, out, err = secateur("latency", small + "-copy", "--against", small, *how, "--json")
    assert status == 0, err
    rows = json.loads(out)["phases"]
    assert list(rows) == ["prefill", "decode", "prefill@8", "decode@8"]
    assert rows["decode@8"][small]["ms"] == pytest.approx(dense["decode@8"])
    assert rows["decode@8"][small]["predicted_ms"] == pytest.approx(dense["decode@8"])


@pytest.mark.parametrize("batch", ["1,1", "1,x", "", "0"])
def test_wrong_batch_sizes_of_the_command_end_with_2(secateur, cache, batch):
    status, _, err = secateur("latency", "tiny", "--batch", batch)
    assert status == 2
    assert "Expected `batch`" in err


def wanted(model, **space):
    return {
        "model": model,
        "space": {"kind": "architecture", "target": 0.3, "baselines": [], **space},
        "controller": {"kind": "random"},
        "objectives": ["loss", "latency_decode", "latency_decode@8"],
        "evaluator": {
            "window": 16,
            "calibration_tokens": 64,
            "fidelities": [32],
            "test_tokens": 16,
            "latency": {"prompt": 16, "threads": 1, "batch": [1, 8]},
        },
        "budget": {"evaluations": 4},
    }


@pytest.mark.usefixtures("counted", "forked_reload")
def test_a_search_records_shows_bounds_and_exports_latencies_at_each_batch_size(small, tmp_path, capsys):
    asked = wanted(small, of="latency_decode@8")
    app.measure_latency(small, {"prompt": 16, "threads": 1, "batch": [1, 8]})
    run = app.run(tmp_path / "run", **asked)
    dense = run.baselines["dense"].measurement.values
    blocks = N_LAYERS * BLOCK
    assert dense["latency_decode"] == pytest.approx(5 + blocks + VOCABULARY * 32)
    assert dense["latency_decode@8"] == pytest.approx(5 + 8 * (blocks + VOCABULARY * 32))
    pruned = next(t for t in run.trials() if t.measurement.values["sparsity"])
    removed = dense["latency_decode@8"] - pruned.measurement.values["latency_decode@8"]
    assert removed == pytest.approx(0.3 * 8 * blocks, rel=0.1)
    rows = front_rows(run)
    column = dict(columns(run, rows))["decode latency at batch 8"]
    assert column(rows[0]).endswith(" ms")
    one, eight = dense["latency_decode"], dense["latency_decode@8"]
    for bound in (f"{eight - removed / 2}ms@8", f"{one - removed / 16}@1", f"{one - removed / 16}"):
        picked = run.pick([Bound.parse("max-latency", bound)])
        assert picked.measurement.values["sparsity"] > 0
    with pytest.raises(UsageError, match=r"within max-latency 0\.01x@8.* with latency_decode@8 "):
        run.pick([Bound.parse("max-latency", "0.01x@8")])
    assert app.run(tmp_path / "run", **asked).pick(number=0)  # continued, with the table that it began with
    at = ["--max-latency", f"{eight - removed / 2}ms@8", "--to", str(tmp_path / "out")]
    _dispatch(["export", str(tmp_path / "run"), *at])
    facts = json.loads((tmp_path / "out" / MANIFEST).read_text())["measured"]["search:32, as searched"]
    assert facts["latency_decode@8"] <= eight - removed / 2
    assert "latency_decode@8 (search:32, as searched)" in (tmp_path / "out" / "README.md").read_text()
    capsys.readouterr()
    _dispatch(["report", str(tmp_path / "run"), "--max-latency", f"{eight - removed / 2}ms@8"])
    assert "decode latency at batch 8" in (tmp_path / "run" / "report" / "index.html").read_text()


@pytest.mark.usefixtures("counted")
def test_a_target_at_a_batch_size_without_times_is_refused(small, tmp_path):
    asked = wanted(small, of="latency_decode@4")
    app.measure_latency(small, {"prompt": 16, "threads": 1, "batch": [1, 8]})
    with pytest.raises(
        UsageError,
        match=r"for `of: latency_decode@4`, got one of prefill, decode, prefill@8.* secateur latency MODEL --batch 4\.",
    ):
        app.run(tmp_path / "run", **asked)
    with pytest.raises(UsageError, match=r"`space\.of` to be 'params', .*got 'latency_decode@0'"):
        settings_from(wanted(small, of="latency_decode@0"))


def test_a_search_takes_a_limit_at_a_batch_size():
    settings = settings_from(wanted("tiny"))
    assert bounded(settings, {"max-latency": "0.7x@8"}).space.of == "latency_decode@8"
    assert bounded(settings, {"max-latency": "0.7x@1"}).space.of == "latency_decode"


@pytest.mark.usefixtures("forked_reload")
def test_a_prune_takes_a_limit_at_a_batch_size(secateur, cache, small, tmp_path):
    anatomy = small_anatomy(n_layers=N_LAYERS, vocab_size=VOCABULARY)
    first, eighth = (measured(anatomy, LatencySetup(batch)) for batch in (1, 8))
    heavy = replace(first.table.phases["decode"], rest_ms=100.0)  # of which blocks are hardly anything
    save_table(replace(first, table=replace(first.table, phases=dict.fromkeys(PHASES, heavy))))
    save_table(eighth)
    few = ("--tokens", 64, "--window", 32, "--to", tmp_path / "m")
    status, _, err = secateur("prune", small, "--max-latency", "0.8x@1", *few)
    assert status == 2, "no blocks can give a fifth of the latency at batch 1"
    assert "max-latency 0.8x@1" in err
    status, _, err = secateur("prune", small, "--max-latency", "0.8x@8", *few)
    assert status == 0, err
    kept = read_kept({"blocks": json.loads((tmp_path / "m" / MANIFEST).read_text())["kept"]})
    ratio = predicted_ms(eighth.table, "decode", kept) / predicted_ms(eighth.table, "decode", all_of(anatomy))
    assert 0.6 < ratio <= 0.8
