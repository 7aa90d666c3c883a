"""Forecasts: from config.json alone, with the sizes that the code itself then has."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from secateur import api
from secateur.evaluators.forecast import speed
from secateur.evaluators.forecast.prospect import outline, prospect
from secateur.pruners.models.discover import dissect
from secateur.pruners.models.loading import find_checkpoint, load_model, read_config
from secateur.pruners.models.skeleton import Counted, ShapesOnly, miniature, n_experts_of, skeleton
from secateur.search import app
from secateur.search.app import level_building
from secateur.search.app.exporting import LEVELS
from secateur.search.app.forecast_parts import parse_devices
from secateur.search.app.forecast_prune import forecast_prune
from secateur.search.app.forecast_search import forecast_search
from secateur.search.app.forecast_work import SearchWork
from secateur.search.app.recipe_file import file_for
from secateur.search.app.session import plan
from secateur.search.errors import UsageError
from secateur.search.settings.settings import settings_from
from secateur.search.show.forecast import full_lines, refusal
from secateur.spaces.forecast import PROCESS
from secateur.spaces.registry import SPACES
from tests.families import FAMILIES, make

DATA = {"window": 128, "calibration_tokens": 512, "test_tokens": 512, "fidelities": [256, 512]}


def small(**changes):
    return settings_from(
        {
            "controller": {"kind": "random"},
            "evaluator": DATA,
            "budget": {"evaluations": 5},
            **changes,
        }
    )


@pytest.fixture
def config_alone(tmp_path) -> Path:
    """A directory with the config of `tiny`, and nothing else."""
    place = tmp_path / "config-alone"
    place.mkdir()
    shutil.copy(Path(find_checkpoint("tiny").location) / "config.json", place)
    return place


# --- a model without memory ---


@pytest.mark.parametrize("name", FAMILIES)
def test_the_parts_of_a_family_are_found_without_weights(name):
    model = make(name)
    real = dissect(model)
    empty = skeleton(model.config, torch.float32)
    with ShapesOnly(n_experts_of(model.config)):
        found = dissect(empty)
    assert [(x.name, x.role, x.weight.shape) for x in found.linears] == [
        (x.name, x.role, x.weight.shape) for x in real.linears
    ]
    assert (found.final_norm, found.width) == (real.final_norm, real.width)
    assert all(x.is_meta for x in found.model.parameters())


def test_live_bytes_are_those_of_tensors_that_are_alive():
    with Counted() as counted:
        first = torch.empty(100, device="meta")
        second = first[:50] + 1
        assert counted.now == 400 + 200
        del first
        assert counted.now == 200
        third = second.view(2, 25)
        del second
        assert (counted.now, counted.most) == (200, 600)
        del third
        assert counted.now == 0


# --- sizes ---


@pytest.mark.parametrize("kind", SPACES)
def test_every_space_is_forecast_from_the_config_alone(kind, config_alone):
    settings = small(space={"kind": kind}, model=str(config_alone))
    found = forecast_search(settings, Path("runs/none"), timing=False)
    held = {x.name: x for x in found.holdings}
    loaded = load_model("tiny").model
    assert held["weights"].n_bytes == sum(p.nbytes for p in loaded.parameters()) + sum(
        b.nbytes for b in loaded.buffers()
    )
    assert held["dense side of the loss, search text"].n_bytes >= 2 * 4096 * 512
    assert found.tokens > 5 * 512
    assert found.seconds is None
    assert refusal(found) is None


@pytest.mark.parametrize(
    "space",
    [
        {"kind": "allocation", "metric": "wanda"},
        {"kind": "allocation", "metric": "sparsegpt", "step": 0.25},
        {"kind": "allocation", "metric": "gblm"},
        {"kind": "architecture"},
        {"kind": "masks"},
        {"kind": "formula"},
    ],
)
def test_the_store_has_the_bytes_that_were_foreseen(space, tmp_path):
    settings = small(space=space, controller={"kind": "uniform"})
    found = forecast_search(settings, tmp_path / "run", timing=False)
    foreseen = found.left
    states = [x for x in found.holdings if x.name == "hidden states, kept"]
    assert [(x.n_bytes, x.where, x.during) for x in states] == [(2 * 512 * 128 * 4, "disk", ("prepare",))]
    assert found.peak("disk")[0] == foreseen + sum(x.n_bytes for x in states)
    app.search(settings, tmp_path / "run")
    files = [p for p in tmp_path.rglob("*.safetensors") if LEVELS in str(p)]
    headers = 16384 * len(files)
    assert foreseen - 0.15 * foreseen <= sum(p.stat().st_size for p in files) <= foreseen + headers


def test_the_loss_has_the_bytes_that_were_foreseen():
    from secateur.evaluators.data.windows import EvaluationData
    from secateur.evaluators.forecast.memory import of_data
    from secateur.spaces.measurement import Fidelity

    found = prospect(app.plan(small()))
    [held, _] = of_data(found.outline, 128, {"search": 512}, {"search": ("search",)})
    anatomy = dissect(load_model("tiny").model)
    tokens = torch.zeros(4, 128, dtype=torch.int64)
    [batch] = EvaluationData(anatomy, {"search": tokens}, [Fidelity("search", 512)]).of(
        Fidelity("search", 512)
    )
    probabilities = sum(x.nbytes for x in batch.teacher._stored.values())
    assert probabilities <= held.n_bytes <= 1.2 * probabilities + batch.inputs.hidden.nbytes


def test_a_pruning_is_forecast(config_alone):
    for recipe in ("wanda", "flap", "sparsegpt", None):
        file, _ = file_for(recipe, 0.5)
        found = forecast_prune(file, str(config_alone), timing=False)
        names = {x.name: x for x in found.holdings}
        assert names["exported model"].n_bytes == 2 * 1_705_600  # stored in float16
        assert names["hidden states"].n_bytes == 4 * 128 * file.calibrated_on[0]


def test_the_training_of_a_schedule_is_forecast(config_alone):
    for recipe, tokens in (("gradual", 65536), ("minitron_distilled", 65536), ("wanda", None)):
        file, _ = file_for(recipe, 0.5)
        found = forecast_prune(file, str(config_alone), timing=False)
        assert {x.name: x.tokens for x in found.work}.get("training") == tokens
        holding = {x.name: x.n_bytes for x in found.holdings}
        assert ("training" in holding) == (tokens is not None)
        if (
            tokens is not None
        ):  # weights, gradients and two moments in fp32, and what is between the projections
            assert holding["training"] > 4 * holding["pruned weights"]


def test_a_hypothetical_device(config_alone):
    found = forecast_search(
        small(model=str(config_alone)), Path("runs"), devices=parse_devices("cuda:141GB"), timing=False
    )
    assert found.device == "cuda"
    assert found.room["device"] == 141_000_000_000
    assert found.subject["dtype"] == "bfloat16"
    assert found.peak("device")[0] > 2 * 1_705_600
    for wrong in ("cuda:GB", "gpu:3GB", ""):
        with pytest.raises(UsageError, match="cuda:141GB"):
            parse_devices(wrong)


def test_levels_and_shared_outputs_take_shares_of_the_device(config_alone):
    settings = small(model=str(config_alone))
    found = {
        device: {
            x.name: x.n_bytes
            for x in forecast_search(
                settings, Path("runs"), devices=parse_devices(device), timing=False
            ).holdings
        }
        for device in ("cuda:0.005GB", "cuda:141GB", "cuda", "cpu:1GB")
    }
    room = 5_000_000 - found["cuda:0.005GB"]["weights"]
    assert found["cuda:0.005GB"]["levels on the device"] == room // 2
    assert found["cuda:141GB"]["levels on the device"] == found["cuda:141GB"]["level store"]
    assert found["cuda:0.005GB"]["outputs of shared blocks"] == room // 8
    for fixed in ("cuda", "cpu:1GB"):  # memory that is not known, or the host's
        assert "levels on the device" not in found[fixed]


# --- refusals, commands, Python ---


def test_what_does_not_fit_is_refused_in_one_line(config_alone, secateur):
    status, out, err = secateur("plan", config_alone, "--device", "cuda:0.02GB", "--no-time")
    assert status == 2
    assert "in the device memory, got 20 MB free" in err
    assert len(err.strip().splitlines()) == 1
    assert "device memory" in out


def test_the_refusal_names_a_setting_that_would_do(config_alone):
    settings = small(model=str(config_alone), evaluator={**DATA, "fidelities": [128 * 2048]})
    found = forecast_search(settings, Path("runs"), devices=parse_devices("cuda:0.2GB"), timing=False)
    line = refusal(found)
    assert line is not None
    assert "evaluator.fidelities" in line
    share = int(line.split(" of its size")[0].split()[-1].removesuffix("%")) / 100
    fits = settings_from(
        {"model": str(config_alone), "evaluator": {**DATA, "fidelities": [128 * int(2048 * share)]}}
    )
    assert (
        refusal(forecast_search(fits, Path("runs"), devices=parse_devices("cuda:0.202GB"), timing=False))
        is None
    )


def test_the_command_and_the_function_say_the_same(config_alone, secateur):
    arguments = ["-o", "budget.evaluations=5", "-o", "controller.kind=random", "--no-time"]
    status, out, err = secateur("plan", config_alone, *arguments, "--json")
    assert status == 0, err
    found = json.loads(out)
    plan = secateur_plan(config_alone)
    assert found["tokens"] == plan.tokens
    assert found["peak"]["disk"] == plan.disk_bytes
    assert "1.706 M parameters in float32" in repr(plan)
    assert "<table>" in plan._repr_html_()
    assert plan.problem is None
    assert plan.lines[0].startswith(f"{config_alone}: llama, 6 blocks")


def secateur_plan(model) -> api.Plan:
    return api.plan(str(model), time=False, budget={"evaluations": 5}, controller={"kind": "random"})


def test_a_block_is_timed():
    found = forecast_search(small(), Path("runs"))
    assert found.seconds is not None
    assert 0 < found.seconds < 600
    assert any("calibrated on the first block" in line for line in full_lines(found))


def test_a_config_that_is_none_is_refused(tmp_path, secateur):
    (tmp_path / "config.json").write_text("{}")
    status, _, err = secateur("plan", tmp_path, "--no-time")
    assert (status, len(err.strip().splitlines())) == (2, 1)
    with pytest.raises(ValueError, match="Expected `model`"):
        read_config("no-such-model")


# --- before a command, and in the record after it ---

QUICK = [
    "-o",
    "controller.kind=uniform",
    "-o",
    "evaluator.window=128",
    "-o",
    "evaluator.calibration_tokens=256",
]
QUICK += [
    "-o",
    "evaluator.fidelities=[256]",
    "-o",
    "evaluator.test_tokens=256",
    "-o",
    "space.metric=magnitude",
]


def test_a_search_begins_with_its_forecast_and_keeps_it_beside_the_truth(tmp_path, secateur):
    run = tmp_path / "run"
    status, _, err = secateur("search", *QUICK, "--run", run)
    assert status == 0, err
    assert err.index("forecast: memory") < err.index("loading tiny")
    record = json.loads((run / "forecast.json").read_text())
    truth, foreseen = record["truth"], record["forecast"]
    assert truth["disk"] == pytest.approx(
        sum(p.stat().st_size for p in run.rglob("*") if p.is_file()), abs=1e6
    )
    assert truth["driver"] > 1e8
    assert truth["seconds"] > 0
    assert foreseen["peak"]["disk"] == 1_179_648  # a byte a prunable weight
    out = secateur("status", run)[1]
    assert "disk 1.18 MB, measured " in out
    assert json.loads(secateur("status", run, "--json")[1])["forecast"]["truth"] == truth
    status, _, err = secateur("search", *QUICK, "--run", run)  # continued: times add up
    assert status == 0, err
    assert json.loads((run / "forecast.json").read_text())["truth"]["seconds"] > truth["seconds"]


def test_a_damaged_or_missing_record_is_none(tmp_path):
    from secateur.search.study.foreseen import FORECAST, read_foreseen

    assert read_foreseen(tmp_path) is None
    for text in ("", "{}", '{"forecast": {"driver": 1, "seconds": 1, "peak": {"disk": "x"}}, "truth": {}}'):
        (tmp_path / FORECAST).write_text(text)
        assert read_foreseen(tmp_path) is None


@pytest.mark.parametrize("command", ["search", "prune", "dry-run"])
def test_commands_refuse_before_they_load_unless_told(command, tmp_path, secateur, monkeypatch):
    for module in ("forecast_search", "forecast_prune"):
        monkeypatch.setattr(f"secateur.search.app.{module}.room_of", lambda *of: {"host": 1_000_000})
    arguments = {
        "search": ["search", *QUICK, "--run", tmp_path / "run"],
        "prune": ["prune", "tiny", "--to", tmp_path / "model", "--tokens", "512"],
        "dry-run": ["search", *QUICK, "--run", tmp_path / "run", "--dry-run"],
    }[command]
    status, _, err = secateur(*arguments)
    assert status == 2
    assert "loading tiny" not in err
    assert "--anyway" in err.splitlines()[-1]
    assert not (tmp_path / "run").exists()
    if command == "search":
        status, _, err = secateur(*arguments, "--anyway")
        assert status == 0, err


def test_a_forecast_that_fails_stops_nothing(tmp_path, secateur, monkeypatch):
    def fail(*of, **more):
        raise RuntimeError("no kernel")

    monkeypatch.setattr("secateur.search.app.forecasting.forecast_search", fail)
    status, _, err = secateur("search", *QUICK, "--run", tmp_path / "run")
    assert status == 0, err
    assert "forecast: none for this model (RuntimeError)" in err
    assert not (tmp_path / "run" / "forecast.json").exists()


def test_a_recovery_is_forecast(tmp_path):
    from secateur.search.app.forecast_recover import forecast_recover
    from secateur.search.recovery.stage import recovery_settings

    app.search(small(controller={"kind": "uniform"}), tmp_path / "run")
    view = app.open_run(tmp_path / "run")
    held = {}
    for method in ("full", "lora", "norms", "merged"):
        of = recovery_settings(method=method, loss="kl", tokens=4096, lr=None, rank=4, address=None)
        found = forecast_recover(tmp_path / "run", [view.front()[0]], of.training, timing=False)
        assert found.tokens == 4096
        held[method] = next(x.n_bytes for x in found.holdings if x.name == "gradients and optimizer")
    assert held["full"] == 12 * 1_705_600
    assert held["norms"] == 12 * 128 * 13  # two a block, and the last
    assert held["norms"] < held["lora"] < held["full"]
    block = 196_864
    assert held["merged"] == 12 * 4 * block  # of six: two dropped ones with two neighbours each


# --- the block that is timed ---


def test_a_large_vocabulary_is_timed_in_part_and_counted_whole(config_alone, monkeypatch):
    monkeypatch.setattr(speed, "timed", lambda call, *of: (call(), 1.0)[1])
    found = [speed.measure_speed(outline(str(config_alone)), 128)]
    config = json.loads((config_alone / "config.json").read_text())
    large = config | {"vocab_size": 1 << 18, "pad_token_id": (1 << 18) - 1}
    (config_alone / "config.json").write_text(json.dumps(large))
    of_large = outline(str(config_alone))
    found.append(speed.measure_speed(of_large, 128))
    assert of_large.anatomy.vocab_size == 1 << 18
    assert found[1].loss == pytest.approx(16 * found[0].loss)
    assert found[1].block == found[0].block
    live = miniature(of_large.config, torch.float32, torch.device("cpu"))
    assert live.get_input_embeddings().num_embeddings == live.get_output_embeddings().out_features == 16_384
    assert of_large.config.vocab_size == 1 << 18


# --- level stores that workers build ---


def test_workers_that_build_share_the_time_and_hold_the_statistics_each(monkeypatch, tmp_path):
    asked = small(
        space={"metric": "wanda"}, executor={"kind": "ray", "workers": 4}, controller={"kind": "random"}
    )
    measured = speed.Speed(1.0, 0.0, 0.0, watched=3.0, levels=8.0, switch=None, read=0.0, device="cpu")

    def foreseen():
        found = forecast_search(asked, tmp_path, timing=False)
        held = {x.name: x.copies for x in found.holdings if x.during == ("prepare",)}
        work = SearchWork(asked, prospect(plan(asked)), 4, max(1, held["statistics of a block"]))
        return held, {x.name: x.seconds for x in work.steps(measured)}

    held, alone = foreseen()
    assert held == {"hidden states": 0, "statistics of a block": 0, "hidden states, kept": 0}
    assert (alone["statistics"], alone["levels"]) == (512 * 6 * 3, 6 * 8)
    monkeypatch.setattr(level_building, "WORTH_WORKERS", 0)
    held, spread = foreseen()
    assert held == {"hidden states": 4, "statistics of a block": 4, "hidden states, kept": 4, PROCESS: 4}
    # The last worker's range is the last quarter of the blocks: it passes the others without statistics.
    assert spread["statistics"] == pytest.approx(512 * 6 * (0.75 * 1 + 0.25 * 3))
    assert spread["levels"] == 6 * 8 / 4
    gradients = small(space={"metric": "gblm"}, executor={"kind": "ray", "workers": 4})
    of_one = forecast_search(gradients, tmp_path, timing=False)
    assert {x.copies for x in of_one.holdings if x.during == ("prepare",)} == {0}


def test_the_process_that_checks_an_export_imports_the_class_of_the_model(monkeypatch):
    commands = []
    monkeypatch.setattr(speed.subprocess, "run", lambda command, **of: commands.append(command))
    speed.process_seconds(load_model("tiny").model)
    assert commands[0][-1].endswith("AutoTokenizer, DynamicCache, LlamaForCausalLM")
