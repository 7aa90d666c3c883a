"""Latency tables: what is timed, what is made of it, where it is kept. No test asserts a time."""

from __future__ import annotations

import contextlib
import json
import shutil
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from secateur.evaluators.latency import clock as clock_module
from secateur.evaluators.latency import key as key_module
from secateur.evaluators.latency.clock import CpuClock, CudaClock, Reading, clock_of
from secateur.evaluators.latency.forward import Forward
from secateur.evaluators.latency.key import conditions, key_of
from secateur.evaluators.latency.models import time_models
from secateur.evaluators.latency.prediction import all_of, kept_in, predicted_ms
from secateur.evaluators.latency.rounds import MIN_ROUNDS, Spread, time_in_turns
from secateur.evaluators.latency.setup import LatencySetup
from secateur.evaluators.latency.stacks import cut_stack, depth, exchanged
from secateur.evaluators.latency.store import (
    MeasuredTable,
    TableSource,
    find_table,
    load_table,
    save_table,
    table_sha256,
)
from secateur.evaluators.latency.table import measure_table, points
from secateur.evaluators.latency.threads import threads
from secateur.pruners.families.discover import dissect
from secateur.pruners.loading import find_checkpoint
from secateur.pruners.structure.kept import Kept
from secateur.pruners.structure.probe import lay_out
from secateur.search import app
from secateur.search.app.bench import plan
from secateur.search.errors import UsageError
from secateur.search.pick import Bound
from secateur.search.sections.latency import LatencySettings
from secateur.search.settings import identity, settings_from
from secateur.spaces.latency import PHASES, LatencyTable, Phase
from tests.models import random_tokens, small_anatomy, small_llama
from tests.test_families import CASES, build
from tests.toy import measurement

SETUP = LatencySetup(prompt=8, threads=1)
VOCABULARY = 4096  # of tiny's tokenizer


class FakeSubject:
    """Takes so many milliseconds a call."""

    def __init__(self, ms: float) -> None:
        self.ms = ms

    @contextmanager
    def ready(self):
        yield lambda: self.ms


class FakeClock:
    """Asks calls how long they take, on a machine whose speed changes from one round to the next."""

    def __init__(self, n_subjects: int = 1, slowdown: float = 1.0) -> None:
        self.n_subjects = n_subjects
        self.slowdown = slowdown
        self.seen: list[float] = []

    def time(self, call):
        nominal = call()
        turn = max(0, len(self.seen) - 2 * self.n_subjects) // self.n_subjects  # after two warm-up rounds
        self.seen.append(nominal)
        return Reading(nominal * self.slowdown**turn, 3 * nominal)


class CountingClock:
    """5 ms, and one for each weight that projections multiply with, once a token: what is additive exactly."""

    def time(self, call):
        count = 0

        def add(module, args, output):
            nonlocal count
            count += module.weight.numel() * args[0].shape[1] if isinstance(module, nn.Linear | Conv1D) else 0

        hook = nn.modules.module.register_module_forward_hook(add)
        try:
            call()
        finally:
            hook.remove()
        return Reading(5.0 + count, 0.0)


@pytest.fixture(scope="module")
def anatomy():
    return small_anatomy(n_layers=3)


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def table(key: str = "key", n_groups: int = 2, ffn: int = 48) -> LatencyTable:
    phase = Phase(1.0, tuple(0.5 * i for i in range(n_groups + 1)), ((0, 0.0), (ffn // 2, 0.75), (ffn, 1.25)))
    return LatencyTable(key, dict.fromkeys(PHASES, phase))


def measured(anatomy, setup=SETUP) -> MeasuredTable:
    found = conditions(anatomy, setup)
    dense = {phase: Spread(5.0, 4.5, 6.0) for phase in PHASES}
    return MeasuredTable(table(key_of(found)), found, dense, 10)


# --- rounds ---


def test_each_subject_is_read_once_a_round_in_an_order_that_changes():
    subjects = {name: FakeSubject(ms) for name, ms in (("dense", 8.0), ("half", 4.0), ("small", 1.0))}
    clock = FakeClock(3)
    time_in_turns(subjects, clock, rounds=12)
    rounds = [tuple(clock.seen[i : i + 3]) for i in range(6, len(clock.seen), 3)]
    assert len(rounds) == 12
    assert {tuple(sorted(seen)) for seen in rounds} == {(1.0, 4.0, 8.0)}
    assert len(set(rounds)) > 3


def test_a_machine_that_slows_down_does_not_change_ratios():
    subjects = {"dense": FakeSubject(8.0), "half": FakeSubject(4.0)}
    timings = time_in_turns(subjects, FakeClock(2, slowdown=1.5), rounds=11)
    assert asdict(timings["half"].ratio) == pytest.approx({"median": 0.5, "low": 0.5, "high": 0.5})
    assert timings["half"].ms.median == pytest.approx(0.5 * timings["dense"].ms.median)
    assert timings["dense"].ms.high > timings["dense"].ms.low
    assert timings["dense"].ratio.median == 1.0
    assert timings["half"].cpu_ms.median == 12.0


def test_processor_time_counts_where_it_is_asked_for():
    subjects = {"dense": FakeSubject(8.0), "half": FakeSubject(4.0)}
    assert time_in_turns(subjects, FakeClock(2), of="cpu")["half"].ms.median == 12.0


def test_few_rounds_are_refused():
    with pytest.raises(ValueError, match=f"Expected `rounds` >= {MIN_ROUNDS}, got 3"):
        time_in_turns({"dense": FakeSubject(1.0)}, FakeClock(), rounds=3)


# --- clocks ---


def test_a_cpu_clock_makes_the_call_and_reads_both_times(monkeypatch):
    ticks = {"perf_counter": iter((1.0, 3.0)), "process_time": iter((5.0, 5.5))}
    times = SimpleNamespace(**{name: lambda found=found: next(found) for name, found in ticks.items()})
    monkeypatch.setattr(clock_module, "time", times)
    made = []
    reading = CpuClock().time(lambda: made.append(0))
    assert len(made) == 1
    assert reading == Reading(wall_ms=2000.0, cpu_ms=500.0)


def test_a_cuda_clock_reads_events_around_the_call(monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("record")

        def elapsed_time(self, end):
            return 6.0

    @contextmanager
    def on(device):
        log.append(str(device))
        yield

    fake = SimpleNamespace(Event=Event, device=on, synchronize=lambda: log.append("wait"))
    monkeypatch.setattr(clock_module.torch, "cuda", fake)
    reading = CudaClock(torch.device("cuda:1")).time(lambda: log.append("call"))
    assert reading.wall_ms == 6.0
    assert log == ["cuda:1", "wait", "record", "call", "record", "wait"]


def test_an_unknown_device_has_no_clock():
    assert isinstance(clock_of(torch.device("cpu")), CpuClock)
    with pytest.raises(ValueError, match="Expected a `device` of cpu, cuda, got meta"):
        clock_of(torch.device("meta"))


def test_threads_are_put_back():
    before = torch.get_num_threads()
    with contextlib.suppress(KeyError), threads(before + 1):
        assert torch.get_num_threads() == before + 1
        raise KeyError
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("changes", [{"batch": 0}, {"prompt": 0}, {"threads": 0}, {"clock": "sun"}])
def test_a_setup_out_of_range_is_refused(changes):
    with pytest.raises(ValueError, match=f"Expected `{next(iter(changes))}`"):
        LatencySetup(**changes)


# --- what is timed ---


@pytest.mark.parametrize("phase", PHASES)
@torch.no_grad()
def test_a_forward_pass_can_be_repeated_and_equals_the_models_own(anatomy, phase):
    forward = Forward(anatomy.model, phase, LatencySetup(prompt=7))
    logits = []
    for _ in range(3):
        with forward.ready() as call:
            logits.append(call().logits)
    assert {x.shape for x in logits} == {(1, 1, anatomy.vocab_size)}
    assert all(torch.equal(x, logits[0]) for x in logits)
    tokens = torch.randint(anatomy.vocab_size, (1, 7), generator=torch.Generator().manual_seed(0))
    if phase == "decode":
        tokens = torch.cat([tokens, tokens[:, :1]], 1)
    assert torch.allclose(logits[0][:, -1], anatomy.model(input_ids=tokens).logits[:, -1], atol=1e-4)


def test_a_prompt_that_does_not_fit_is_refused(anatomy):
    with pytest.raises(ValueError, match=r"Expected `prompt` < 64, .* got 64"):
        Forward(anatomy.model, "prefill", LatencySetup(prompt=64))


@torch.no_grad()
def test_stacks_of_whole_blocks_are_the_model_and_cut_ones_leave_it_alone(anatomy):
    tokens, before = random_tokens(2, 9), {k: v.clone() for k, v in anatomy.model.state_dict().items()}
    logits = anatomy.model(input_ids=tokens).logits
    layouts = lay_out(anatomy)
    whole, cut, empty = (cut_stack(layouts, *shape) for shape in ((2, 48), (1, 12), (0, 0)))
    with exchanged(anatomy, whole):
        assert torch.equal(anatomy.model(input_ids=tokens).logits, logits)
    with exchanged(anatomy, cut):
        assert not torch.allclose(anatomy.model(input_ids=tokens).logits, logits)
    with exchanged(anatomy, empty):
        nothing = anatomy.model(input_ids=tokens).logits
    with exchanged(anatomy, nn.ModuleList()):
        assert torch.equal(anatomy.model(input_ids=tokens).logits, nothing)
    assert torch.equal(anatomy.model(input_ids=tokens).logits, logits)
    assert all(torch.equal(v, before[k]) for k, v in anatomy.model.state_dict().items())
    shapes = {name: tuple(p.shape) for name, p in cut[0].named_parameters() if p.ndim > 1}
    assert shapes["self_attn.o_proj.weight"] == (32, 16)
    assert shapes["self_attn.k_proj.weight"] == (8, 32)
    assert shapes["mlp.down_proj.weight"] == (32, 12)
    assert all(p.is_contiguous() for p in cut.parameters())


def test_stacks_stay_within_memory(anatomy, monkeypatch):
    assert depth(anatomy, 10) == 3
    monkeypatch.setattr("secateur.evaluators.latency.stacks.STACK_BYTES", 2 * 10 * 4 * 8000)
    assert depth(anatomy, 10) == 2
    monkeypatch.setattr("secateur.evaluators.latency.stacks.STACK_BYTES", 1)
    assert depth(anatomy, 10) == 1


@pytest.mark.parametrize(("n", "wanted"), [(1, [1]), (3, [1, 2, 3]), (48, [6, 12, 18, 24, 30, 36, 42, 48])])
def test_some_sizes_are_measured_the_full_one_always(n, wanted):
    assert points(n) == wanted


# --- tables ---


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
    odd = replace(anatomy, blocks=(anatomy.blocks[0], replace(anatomy.blocks[1], ffn_width=24)))
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
    monkeypatch.setattr(key_module, "device_name", lambda device: "another")
    elsewhere = key_of(conditions(anatomy, SETUP))
    monkeypatch.setattr(key_module.metadata, "version", lambda name: "9")
    assert len({base, elsewhere, key_of(conditions(anatomy, SETUP))}) == 3


def test_a_table_is_kept_and_found(anatomy, cache):
    assert load_table(anatomy, SETUP) is None
    path = save_table(measured(anatomy))
    assert path.parent == cache / "latency"
    assert load_table(anatomy, SETUP) == measured(anatomy)
    assert MeasuredTable.from_json(json.loads(path.read_text())) == measured(anatomy)
    assert find_table(anatomy, TableSource(SETUP), "model") == measured(anatomy).table
    path.write_text(path.read_text()[:-40])
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


# --- settings and commands ---


def test_a_search_looks_for_a_table_only_if_it_needs_one():
    assert plan(settings_from({})).latency is None
    assert plan(settings_from({"objectives": ["loss", "latency_decode"]})).latency == TableSource(
        LatencySetup()
    )
    controller = {"kind": "optuna", "objectives": ["loss", "latency_prefill"]}
    assert plan(settings_from({"controller": controller})).latency is not None
    section = {"prompt": 64, "threads": 1, "clock": "cpu", "table": "t.json"}
    asked = settings_from({"objectives": ["loss", "latency_decode"], "evaluator": {"latency": section}})
    assert plan(asked).latency == TableSource(LatencySetup(1, 64, 1, "cpu"), "t.json")


def test_defaults_are_those_of_the_command_and_older_studies_can_be_continued():
    defaults = LatencySettings().model_dump()
    assert defaults.pop("table") is None
    assert defaults == asdict(LatencySetup())
    assert {"latency", "tasks"}.isdisjoint(identity(settings_from({}))["evaluator"])


def test_bounds_on_latencies_may_be_relative():
    trial = SimpleNamespace(
        measurement=replace(measurement(0), values={"latency_decode": 14.0, "latency_prefill": 80.0})
    )
    dense = SimpleNamespace(
        measurement=replace(measurement(0), values={"latency_decode": 20.0, "latency_prefill": 100.0})
    )
    assert Bound.parse("max-latency", "0.7x").excess(trial, dense) == 0
    assert Bound.parse("max-latency", "0.6x").excess(trial, dense) == pytest.approx(2 / 12)
    assert Bound.parse("max-prefill", "0.08s").excess(trial, None) == 0


@pytest.fixture
def small(tmp_path):
    """Two equal models on the disk."""
    source = Path(find_checkpoint("tiny").location)
    for name in ("dense", "copy"):
        small_llama(n_layers=4, vocab_size=VOCABULARY).save_pretrained(tmp_path / name)
        for path in source.glob("tokenizer*"):
            shutil.copy(path, tmp_path / name)
    return str(tmp_path / "dense"), str(tmp_path / "copy")


def test_the_command_measures_a_table_and_compares_models(secateur, cache, monkeypatch, small):
    monkeypatch.setattr("secateur.evaluators.latency.table.clock_of", lambda device: CountingClock())
    monkeypatch.setattr("secateur.evaluators.latency.models.clock_of", lambda device: CountingClock())
    (dense, copy), how = small, ("--prompt", 16, "--threads", 1, "--rounds", 10)
    status, out, err = secateur("latency", dense, *how)
    assert status == 0, err
    assert "1 threads, batch 1, prompt 16; wall time, 10 rounds" in out
    (path,) = (cache / "latency").iterdir()
    assert str(path) in out
    status, out, _ = secateur("latency", dense, *how, "--json")
    assert json.loads(out) == json.loads(path.read_text())
    status, out, err = secateur("latency", copy, "--against", dense, *how, "--json")
    assert status == 0, err
    rows = json.loads(out)["phases"]["decode"]
    assert rows[copy]["ratio"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert rows[dense]["predicted_ms"] == pytest.approx(rows[dense]["ms"])
    assert rows[copy]["predicted_ms"] is None
    status, out, _ = secateur("latency", copy, "--against", dense, *how)
    assert f"1.000x (1.000 to 1.000)  {copy}" in out
    assert f"ms, 1.000x  {dense}" in out


def test_a_run_keeps_the_table_that_it_began_with(cache, monkeypatch, small, tmp_path):
    monkeypatch.setattr("secateur.evaluators.latency.table.clock_of", lambda device: CountingClock())
    (model, _), run = small, tmp_path / "run"
    wanted = {
        "model": model,
        "space": {"kind": "architecture", "of": "latency_decode", "target": 0.3, "baselines": []},
        "controller": {"kind": "random"},
        "objectives": ["loss", "latency_decode"],
        "evaluator": {"window": 16, "calibration_tokens": 64, "fidelities": [32], "test_tokens": 16},
        "budget": {"evaluations": 4},
    }
    wanted["evaluator"]["latency"] = {"prompt": 16, "threads": 1}
    _, path = app.measure_latency(model, {"prompt": 16, "threads": 1})
    first = app.run(run, **wanted)
    dense = first.baselines["dense"].measurement.values["latency_decode"]
    blocks = 4 * 240 * 32
    assert dense == pytest.approx(5 + VOCABULARY * 32 + blocks)
    share = 1 - 0.3 * blocks / dense
    picked = first.pick([Bound.parse("max-latency", f"{share + 0.01}x")]).measurement.values
    assert picked["latency_decode"] / dense == pytest.approx(share, abs=0.01)
    path.unlink()
    wanted["budget"] = {"evaluations": 6}
    again = app.run(run, **wanted)
    assert len(again.trials()) == 6
    assert again.baselines["dense"].measurement.values["latency_decode"] == dense
    with pytest.raises(UsageError, match="secateur latency"):
        app.run(tmp_path / "another", **wanted)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tiny", "--rounds", 2), "Expected `rounds` >= 10, got 2"),
        (("tiny", "--clock", "sun"), "Expected `clock` wall or cpu, got 'sun'"),
        (("tiny", "tiny"), "Expected one model for a table, got 2"),
        (("tiny", "--against", "tiny"), "Expected models to compare with tiny"),
        (("tiny", "--prompt", 4096), "Expected `prompt` < "),
    ],
)
def test_wrong_use_of_the_command_ends_with_2(secateur, cache, arguments, message):
    status, _, err = secateur("latency", *arguments)
    assert status == 2
    assert message in err


def test_a_search_without_a_table_is_refused_before_it_starts(cache, tmp_path):
    wanted = {
        "objectives": ["loss", "latency_decode"],
        "evaluator": {"window": 64, "calibration_tokens": 128},
    }
    wanted["evaluator"] |= {"fidelities": [64], "test_tokens": 64, "latency": {"prompt": 16, "threads": 1}}
    with pytest.raises(UsageError, match="secateur latency tiny --prompt 16 --threads 1"):
        app.run(tmp_path / "run", **wanted)
    assert not (tmp_path / "run").exists()


def test_an_objective_that_the_space_does_not_have_is_refused_before_it_starts(tmp_path):
    wanted = {"objectives": ["loss", "nodes"], "evaluator": {"window": 64, "calibration_tokens": 128}}
    wanted["evaluator"] |= {"fidelities": [64], "test_tokens": 64}
    with pytest.raises(UsageError, match="candidates of the space allocation have, got 'nodes'"):
        app.run(tmp_path / "run", **wanted)
    assert not (tmp_path / "run").exists()
