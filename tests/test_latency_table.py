"""Latency tables: what is made of times, and where it is kept."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from secateur.evaluators.latency import conditions as conditions_module
from secateur.evaluators.latency.conditions import LatencySetup, conditions, key_of
from secateur.evaluators.latency.models import all_of, kept_in, predicted_ms, time_models
from secateur.evaluators.latency.store import (
    MeasuredTable,
    TableSource,
    find_table,
    load_table,
    save_table,
    table_sha256,
)
from secateur.evaluators.latency.table import measure_table, points
from secateur.pruners.models.discover import dissect
from secateur.spaces.architecture.candidate import Kept
from secateur.spaces.latency import PHASES, LatencyTable
from tests.models import small_anatomy
from tests.test_families import CASES, build
from tests.timing import SETUP, CountingClock, measured, table


@pytest.fixture(scope="module")
def anatomy():
    return small_anatomy(n_layers=3)


def test_a_table_of_additive_times_predicts_every_model_exactly(anatomy):
    found = measure_table(anatomy, LatencySetup(prompt=6, threads=1), rounds=10, clock=CountingClock())
    block, n_blocks = anatomy.blocks[0], len(anatomy.blocks)
    for phase, n_tokens in (("prefill", 6), ("decode", 1)):
        times = found.table.phases[phase]
        group = (2 * 16 + 2 * 8) * 32 * n_tokens  # q and o: two heads of 8; k and v: one
        assert times.attention_ms == pytest.approx([0.0, group, 2 * group])
        for width, ms in times.ffn:
            assert ms == pytest.approx(width * 3 * 32 * n_tokens)
        assert times.rest_ms == pytest.approx(5 + 97 * 32)  # logits of one token
        assert [width for width, _ in times.ffn] == [0, *points(block.ffn_width)]
        assert predicted_ms(found.table, phase, all_of(anatomy)) == pytest.approx(found.dense[phase].median)
        fewer = predicted_ms(found.table, phase, [Kept(1, 12)] + [Kept(0, 0)] * (n_blocks - 1))
        assert fewer == pytest.approx(times.rest_ms + group + 12 * 3 * 32 * n_tokens)


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "phi3", "opt-projected", "gpt2", "gpt_neox"])
def test_tables_of_all_kinds_of_families_add_up(name, monkeypatch):
    monkeypatch.setattr("secateur.evaluators.latency.table.MOST_POINTS", 1)
    anatomy = dissect(build(CASES[name][0]))
    found = measure_table(anatomy, LatencySetup(prompt=6, threads=1), rounds=10, clock=CountingClock())
    for phase in PHASES:
        assert predicted_ms(found.table, phase, all_of(anatomy)) == pytest.approx(found.dense[phase].median)


@pytest.mark.parametrize("ms", [[3.0, 2.0, 4.0, 9.0, 8.0], [-1.0, 0.0, 1.0, 1.0, 2.0]])
def test_noise_does_not_make_a_smaller_sublayer_slower(anatomy, ms, monkeypatch):
    from secateur.evaluators.latency import table as table_module

    found = table_module._monotone(ms)
    assert found == sorted(found)
    assert found[0] >= 0
    assert np.mean(np.square(np.subtract(found, ms))) < 1.0


def test_blocks_of_several_shapes_have_no_table():
    anatomy = small_anatomy()
    *others, mlp = anatomy.blocks[1].mixers
    odd_block = replace(anatomy.blocks[1], mixers=(*others, replace(mlp, channels=24)))
    odd = replace(anatomy, blocks=(anatomy.blocks[0], odd_block))
    with pytest.raises(ValueError, match=r"Expected blocks of one shape .* got 2 shapes"):
        measure_table(odd, SETUP, clock=CountingClock())


# --- keys and files ---


@pytest.mark.parametrize(
    "changes", [{"batch": 2}, {"prompt": 9}, {"threads": 2}, {"clock": "cpu"}], ids=lambda c: next(iter(c))
)
def test_another_setup_is_another_key(anatomy, changes):
    base = key_of(conditions(anatomy, SETUP))
    assert key_of(conditions(anatomy, replace(SETUP, **changes))) != base
    assert key_of(conditions(anatomy, SETUP)) == base


def test_the_key_depends_on_shape_precision_device_and_versions_but_not_on_weights(anatomy, monkeypatch):
    base = key_of(conditions(anatomy, SETUP))
    assert key_of(conditions(small_anatomy(seed=1, n_layers=3), SETUP)) == base
    others = [small_anatomy(n_layers=2), small_anatomy(n_layers=3, intermediate_size=40)]
    others.append(small_anatomy(n_layers=3))
    others[-1].model.to(torch.bfloat16)
    assert len({base, *(key_of(conditions(other, SETUP)) for other in others)}) == 4
    monkeypatch.setattr(conditions_module, "device_name", lambda device: "another")
    elsewhere = key_of(conditions(anatomy, SETUP))
    monkeypatch.setattr(conditions_module.metadata, "version", lambda name: "9")
    assert len({base, elsewhere, key_of(conditions(anatomy, SETUP))}) == 3


def test_a_table_is_kept_and_found(anatomy, cache):
    assert load_table(anatomy, SETUP) is None
    path = save_table(measured(anatomy))
    assert path.parent == cache / "latency"
    assert load_table(anatomy, SETUP) == measured(anatomy)
    assert MeasuredTable.from_json(json.loads(path.read_text())) == measured(anatomy)
    assert find_table(anatomy, TableSource(SETUP), "model") == measured(anatomy).table
    for damaged in (path.read_text()[:-40], "[" * 100_000):
        path.write_text(damaged)
        with pytest.raises(ValueError, match=r"Expected a latency table in .* Measure it again"):
            load_table(anatomy, SETUP)


def test_a_missing_table_is_an_error_that_says_how_to_measure_one(anatomy, cache):
    with pytest.raises(ValueError, match="got none") as error:
        find_table(anatomy, TableSource(SETUP), "some/model")
    assert str(error.value).endswith("secateur latency some/model --prompt 8 --threads 1")
    assert "threads 1" in str(error.value)


def test_a_table_from_another_machine_counts_if_its_model_has_the_shape(anatomy, cache, tmp_path):
    path = tmp_path / "phone.json"
    elsewhere = replace(measured(anatomy), conditions={**conditions(anatomy, SETUP), "device": "phone"})
    path.write_text(json.dumps(elsewhere.to_json()))
    assert find_table(anatomy, TableSource(SETUP, str(path)), "model") == elsewhere.table
    with pytest.raises(ValueError, match=r"got one of a model of another shape in .*phone\.json"):
        find_table(small_anatomy(n_layers=2), TableSource(SETUP, str(path)), "model")
    with pytest.raises(ValueError, match=r"Expected a latency table in .*none\.json"):
        find_table(anatomy, TableSource(SETUP, str(tmp_path / "none.json")), "model")


def test_the_hash_of_a_table_is_of_its_numbers():
    assert table_sha256(table()) == table_sha256(LatencyTable.from_json(table().to_json()))
    assert table_sha256(table()) != table_sha256(table(ffn=64))


# --- whole models ---


def test_whole_models_are_compared_with_the_first(anatomy):
    small = small_anatomy(n_layers=1)
    found = time_models({"dense": anatomy.model, "small": small.model}, SETUP, clock=CountingClock())
    for phase, n_tokens in (("prefill", 8), ("decode", 1)):
        block = (96 + 144) * 32 * n_tokens
        assert found[phase]["small"].ratio.median == pytest.approx(
            (5 + 97 * 32 + block) / (5 + 97 * 32 + 3 * block)
        )


def test_an_export_says_what_it_kept(anatomy, tmp_path):
    kept = [{"kv_groups": 1, "ffn": 24}, {"kv_groups": 0, "ffn": 48}, {"kv_groups": 2, "ffn": 0}]
    plain = {"parent": "", "fingerprint": "f", "method": {}, "candidate": "", "asked": {}, "calibration": {}}
    plain |= {"seeds": {}, "measured": {}, "label": "", "kept": kept}
    (tmp_path / "secateur.json").write_text(json.dumps(plain))
    blocks = kept_in(str(tmp_path), anatomy, "f")
    assert blocks == (Kept(1, 24), Kept(0, 48), Kept(2, 0))
    assert predicted_ms(table(), "decode", blocks) == 1.0 + 0.5 + 0.75 + 1.25 + 1.0
    assert kept_in(str(tmp_path), anatomy, "another") is None
    assert kept_in(str(tmp_path / "none"), anatomy, "f") is None
    assert kept_in("some/model", anatomy, "f") is None
