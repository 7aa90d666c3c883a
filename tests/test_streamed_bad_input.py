"""Bad input of streamed models: one line, its exit status, and nothing half-written that looks whole."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from secateur.pruners.export import streamed
from secateur.pruners.export.saving import unfinished
from secateur.pruners.stores import block_files
from secateur.search import app
from tests.command import secateur  # noqa: F401  # a fixture
from tests.streaming import recipe, saved
from tests.test_streamed_search import EVALUATOR, SPACES, measured, settings

INDEX = "model.safetensors.index.json"


def quick(directory: Path) -> tuple[object, ...]:
    """Options of a quick prune, with its recipe in a file."""
    plain = recipe().model_dump(mode="json", exclude_unset=True)
    (directory / "recipe.yaml").write_text(yaml.safe_dump(plain))
    return ("--recipe", directory / "recipe.yaml", "--tokens", 128, "--window", 32)


def sharded(directory: Path) -> Path:
    """A model in two shards."""
    model = saved(directory, "llama", torch.bfloat16)
    tensors = load_file(model / "model.safetensors")
    halves = [dict(list(tensors.items())[part::2]) for part in (0, 1)]
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    for name, half in zip(names, halves, strict=True):
        save_file(half, model / name, metadata={"format": "pt"})
    of = {x: name for name, half in zip(names, halves, strict=True) for x in half}
    (model / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": of}))
    (model / "model.safetensors").unlink()
    return model


def lose_a_shard(model: Path, stream: str) -> str:
    (model / "model-00002-of-00002.safetensors").unlink()
    return "model-00002-of-00002.safetensors', which the index lists; it is not there"


def lose_a_tensor(model: Path, stream: str) -> str:
    path = model / "model-00002-of-00002.safetensors"
    tensors = load_file(path)
    lost = min(name for name in tensors if "mlp" in name)
    del tensors[lost]
    save_file(tensors, path, metadata={"format": "pt"})
    return f"1 are missing, e.g. {lost}"


def cut_a_shard(model: Path, stream: str) -> str:
    path = model / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return "Expected a whole safetensors file"


def contradict_the_weights(model: Path, stream: str) -> str:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))
    return (
        "40), as the config has it, got (32, 48)"
        if stream == "never"
        else "(40, 32), as the config has it, got (48, 32)"
    )


@pytest.mark.parametrize("spoil", [lose_a_shard, lose_a_tensor, cut_a_shard, contradict_the_weights])
@pytest.mark.parametrize("stream", ["always", "never"])
@pytest.mark.parametrize("command", ["prune", "evaluate", "search"])
def test_a_model_that_is_not_whole_is_refused(tmp_path, secateur, command, stream, spoil):  # noqa: F811
    model = sharded(tmp_path / "model")
    said = spoil(model, stream)
    options = {
        "prune": (model, *quick(tmp_path), "--to", tmp_path / "to", "--stream", stream),
        "evaluate": (model, "--tokens", 128, "--window", 32, "--stream", stream),
        "search": ("-o", f"model={model}", "-o", f"stream={stream}", "--run", tmp_path / "run"),
    }
    status, out, err = secateur(command, *options[command])
    assert status == 2, err
    assert out == ""
    [line] = [x for x in err.splitlines() if x.startswith("secateur: error: ")]
    assert said in line
    assert not (tmp_path / "to").exists()
    assert not list(tmp_path.rglob("*.jsonl"))


def quick_search(model: Path) -> tuple[object, ...]:
    space, evaluator = SPACES["ranks"], {**EVALUATOR, "fidelities": [64]}
    sections = {"space": space, "evaluator": evaluator, "controller": {"kind": "random"}}
    plain = {"model": str(model), "stream": "always", "budget": {"evaluations": 4}}
    return tuple(
        x for name, value in (sections | plain).items() for x in ("-o", f"{name}={json.dumps(value)}")
    )


@pytest.mark.parametrize("stream", ["always", "never"])
def test_a_disk_without_room_is_refused_before_anything_is_written(tmp_path, secateur, monkeypatch, stream):  # noqa: F811
    model = saved(tmp_path / "model", "llama", torch.bfloat16)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    status, _, err = secateur("prune", model, *quick(tmp_path), "--to", tmp_path / "to", "--stream", stream)
    assert status == 2
    assert "got 1 kB free" in err.splitlines()[-1]
    status, _, err = secateur("search", *quick_search(model), "--run", tmp_path / "run")
    assert status == 2
    assert "got 1 kB free" in err.splitlines()[-1]
    assert sorted(x.name for x in tmp_path.iterdir() if x.name != "run") == ["model", "recipe.yaml"]
    assert not list(tmp_path.rglob("block-*"))


def test_a_disk_that_fills_up_while_levels_are_written(tmp_path, secateur, monkeypatch):  # noqa: F811
    model, run = saved(tmp_path / "model", "llama", torch.bfloat16), tmp_path / "run"
    save = block_files.save_file

    def full(tensors: object, path: Path, **further: object) -> None:
        if path.name.startswith("block-0001"):
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(tensors, path, **further)

    with monkeypatch.context() as patch:
        patch.setattr(block_files, "save_file", full)
        status, _, err = secateur("search", *quick_search(model), "--run", run)
    assert status == 6
    [line] = [x for x in err.splitlines() if x.startswith("secateur: error: ")]
    assert "No space left on device" in line
    assert [x.name for x in sorted((run / "levels").iterdir())] == [
        "block-0000.safetensors",
        "states-0001.safetensors",
        "store.json",
    ]
    assert json.loads((run / "levels" / "store.json").read_text())["finished"] is False
    assert secateur("search", *quick_search(model), "--run", run)[0] == 0
    of = {"evaluator": {**EVALUATOR, "fidelities": [64]}, "budget": {"evaluations": 4}}
    app.search(settings(model, "never", SPACES["ranks"], **of), tmp_path / "whole")
    assert measured(run) == measured(tmp_path / "whole")


def test_a_disk_that_fills_up_while_a_model_is_written(tmp_path, secateur, monkeypatch):  # noqa: F811
    model, to = saved(tmp_path / "model", "llama", torch.bfloat16), tmp_path / "to"
    save = streamed.save_file

    def full(tensors: object, path: Path, **further: object) -> None:
        if path.name.startswith("model-00003"):
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(tensors, path, **further)

    monkeypatch.setattr(streamed, "save_file", full)
    status, _, err = secateur("prune", model, *quick(tmp_path), "--to", to, "--stream", "always")
    assert status == 6
    [line] = [x for x in err.splitlines() if x.startswith("secateur: error: ")]
    assert "No space left on device" in line
    assert not to.exists()
    assert not (unfinished(to) / "model" / INDEX).exists()
    assert not list((unfinished(to) / "model").glob("model-00003*"))
