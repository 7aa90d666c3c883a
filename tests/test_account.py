"""Account of a model's parameters: none is left out, and zeros that were there before are told."""

from __future__ import annotations

import json

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

from secateur.pruners.export.card import card
from secateur.pruners.export.manifest import MANIFEST, Manifest
from secateur.pruners.models.account import account, unknown_share, zeros_of
from secateur.pruners.models.discover import dissect
from secateur.pruners.models.loading import find_checkpoint
from secateur.search import app
from secateur.search.results.run import notes_on_model
from tests.families import make
from tests.test_app import SMALL


def rows_of(model):
    return {row.name: row for row in account(dissect(model))}


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon_h1", "recurrent_gemma", "qwen3_5 text"])
def test_every_parameter_of_the_blocks_is_counted_once(name):
    model = make(name)
    anatomy, rows = dissect(model), account(dissect(model))
    total = sum(p.numel() for block in anatomy.blocks for p in block.module.parameters())
    assert sum(row.n_params for row in rows) == total
    assert sum(row.share for row in rows) == pytest.approx(1)
    prunable = sum(row.n_params for row in rows if row.state == "prunable")
    assert prunable == sum(linear.n_weights for linear in anatomy.linears)
    assert unknown_share(rows) == 0


def test_what_is_kept_has_its_reason():
    rows = rows_of(make("falcon_h1"))
    kept = {name: row.kind for name, row in rows.items() if row.state == "kept"}
    assert kept == {
        "mamba.dt_bias": "state",
        "mamba.A_log": "state",
        "mamba.D": "state",
        "mamba.conv1d.weight": "convolution",
        "mamba.conv1d.bias": "convolution",
        "input_layernorm.weight": "norm",
        "pre_ff_layernorm.weight": "norm",
    }
    assert rows["mamba.in_proj.weight"].kind == "recurrent in"
    assert rows["self_attn.o_proj.weight"].kind == "attention o"
    mamba = rows_of(make("mamba"))
    assert (mamba["mixer.dt_proj.weight"].state, mamba["mixer.dt_proj.weight"].kind) == ("kept", "state")
    assert rows_of(make("gpt2"))["attn.c_attn.bias"].kind == "bias"


def test_what_is_not_understood_is_said():
    model = make("llama")
    model.model.layers[1].adapter = torch.nn.Linear(32, 4, bias=False)
    rows = account(dissect(model))
    [row] = [row for row in rows if row.state == "not understood"]
    assert (row.name, row.n_params) == ("adapter.weight", 128)
    total = sum(p.numel() for p in model.model.layers.parameters())
    assert unknown_share(rows) == pytest.approx(128 / total)
    [note] = notes_on_model(0.0, [vars(row) for row in rows])
    assert note == (
        f"Not understood, and left as they are: {128 / total:.2%} of the parameters of the blocks (adapter.weight)."
    )
    manifest = Manifest("p", "f", {}, "", {}, {}, {}, {}, "label", not_understood={"adapter.weight": 128})
    assert (
        "**Not understood, and left as they were: 128 parameters of the blocks (`adapter.weight`).**"
        in card(manifest)
    )
    assert "Not understood" not in card(Manifest("p", "f", {}, "", {}, {}, {}, {}, "label"))


@pytest.fixture(scope="module")
def sparse(tmp_path_factory):
    """Directory of the embedded model with a tenth of its first projection zero, as a dequantised one may have."""
    directory = tmp_path_factory.mktemp("sparse")
    tiny = find_checkpoint("tiny").location
    model = AutoModelForCausalLM.from_pretrained(tiny)
    weight = model.model.layers[0].mlp.up_proj.weight.data
    weight[:, : weight.shape[1] // 2] = 0
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(directory)
    return directory, zeros_of(dissect(model))


@pytest.mark.usefixtures("forked_reload")
def test_zeros_of_the_dense_model_are_in_the_run_its_front_and_the_card(sparse, tmp_path, secateur):
    model, zeros = sparse
    assert zeros == pytest.approx(1 / 48, rel=0.01), "half of one of three in an MLP of six blocks"
    said = []
    app.run(tmp_path / "run", **SMALL | {"model": str(model), "budget": {"evaluations": 4}}, say=said.append)
    run = app.open_run(tmp_path / "run")
    note = f"{zeros:.2%} of the dense model's prunable weights are zeros already; its sparsity of 0 leaves them out."
    assert note in said
    assert run.model_notes == (note,)
    assert run.study.about.facts["parameters"][0]["state"] == "prunable"
    assert json.loads(secateur("front", tmp_path / "run", "--json")[1])["notes"] == [note]
    assert f"{zeros:.2%} of the dense model's" in secateur("front", tmp_path / "run")[1].replace("\n", " ")
    run.export(run.front()[0], tmp_path / "model")
    record = json.loads((tmp_path / "model" / MANIFEST).read_text())
    assert record["parent_zeros"] == pytest.approx(zeros)
    assert record["texts"] == {"search": "docs", "test": "docs"}
    text = (tmp_path / "model" / "README.md").read_text()
    assert f"{zeros:.2%} of the parent's prunable weights were zeros before." in text
    results = {x.metric_type: x.metric_value for x in ModelCard(text).data.eval_results}
    fidelity = run.settings.evaluator.test_fidelity.text
    assert results["ce"] == record["measured"][f"{fidelity}, as exported"]["ce"]


def test_doctor_lists_what_becomes_of_each_parameter_of_a_model(sparse, secateur):
    status, out, _ = secateur("doctor", sparse[0], "--json")
    found = json.loads(out)
    assert status == 0
    assert (found["family"], found["blocks"], found["units"]) == ("llama", {"attention + mlp": 6}, "works")
    assert {row["state"] for row in found["parameters"]} == {"prunable", "kept"}
    _, out, _ = secateur("doctor", sparse[0])
    assert "mlp.up_proj.weight" in out
    assert "kept" in out
