"""Exports: saved, loaded again by stock transformers in a fresh process, and compared."""

import ast
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from secateur.pruners.export import export_check, reload
from secateur.pruners.export.export_check import ExportError
from secateur.pruners.export.manifest import MANIFEST
from tests.exports import export, gpt2, leftovers, llama, prune


def test_an_export_loads_in_a_fresh_process(tmp_path):
    check_export(llama(tied=True), tmp_path)


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("make", [lambda: llama(tied=False), gpt2], ids=["untied", "gpt2"])
def test_other_exports_load(make, tmp_path):
    check_export(make(), tmp_path)


def check_export(model, tmp_path):
    manifest = prune(model)
    before = {name: (p.data_ptr(), p.clone()) for name, p in model.named_parameters()}
    report = export(model, tmp_path / "new" / "out", manifest)

    assert sum(report.manifest.zeros.values()) / sum(report.manifest.weights.values()) == 0.5
    assert report.comparison.logit_error <= 1e-5
    assert report.comparison.argmax_agreement == 1.0
    assert report.comparison.greedy_gap <= 1e-5
    assert len(report.comparison.greedy_tokens) == 8
    assert report.comparison.loaded_as == type(model).__name__
    files = {path.name for path in report.directory.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", MANIFEST} <= files
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in files)
    assert leftovers(tmp_path / "new") == ["out"]
    for name, parameter in model.named_parameters():  # the live model is what it was
        assert parameter.data_ptr() == before[name][0]
        assert torch.equal(parameter, before[name][1])

    saved = load_file(report.directory / "model.safetensors")
    for name, n_zeros in report.manifest.zeros.items():
        assert int((saved[f"{name}.weight"] == 0).sum()) == n_zeros
    assert report.manifest.size_bytes >= sum(p.numel() for p in model.parameters()) * 4


@pytest.mark.usefixtures("in_process")
def test_weights_that_are_views_are_saved_as_they_look(tmp_path):
    model = llama(tied=False)
    manifest = prune(model)
    first, second = (layer.mlp for layer in model.model.layers)
    first.up_proj.weight.data = first.up_proj.weight.data.T.contiguous().T  # transposed
    stack = torch.stack([first.gate_proj.weight.data, second.gate_proj.weight.data])
    first.gate_proj.weight.data, second.gate_proj.weight.data = stack[0], stack[1]  # parts of one tensor
    save_file({"down": first.down_proj.weight.data}, tmp_path / "level.safetensors")
    mapped = load_file(tmp_path / "level.safetensors")["down"]
    first.down_proj.weight.data = mapped
    second.down_proj.weight.data = mapped  # the same tensor in two places, and yet not tied
    report = export(model, tmp_path / "out", manifest)
    assert report.comparison.logit_error <= 1e-5
    assert first.gate_proj.weight.data_ptr() == stack.data_ptr()


@pytest.mark.usefixtures("in_process")
def test_a_lossless_dtype_is_checked_as_strictly_and_a_lossy_one_by_its_rounding(tmp_path):
    model = llama(tied=True)
    manifest = prune(model)
    lossy = export(model, tmp_path / "a", manifest, dtype=torch.bfloat16)
    assert 1e-4 < lossy.comparison.logit_error <= lossy.comparison.logit_tolerance == 5e-2
    model.to(torch.bfloat16).to(torch.float32)
    exact = export(model, tmp_path / "b", manifest, dtype=torch.bfloat16)
    assert exact.comparison.logit_error <= 1e-5 < exact.comparison.logit_tolerance == 1e-4
    assert model.dtype == torch.float32
    saved = load_file(tmp_path / "b" / "model.safetensors")
    assert {weight.dtype for weight in saved.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "b" / "config.json").read_text())["dtype"] == "bfloat16"


# --- differences ---


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda saved: saved.pop("model.norm.weight"),
            "weights that its class has, got missing: model.norm.weight",
        ),
        (lambda saved: saved["model.layers.0.mlp.up_proj.weight"].fill_(1.0), "zeros after loading.*up_proj"),
        (lambda saved: saved["model.norm.weight"].mul_(1.01), "Expected logits within 0.0001"),
        (lambda saved: saved["model.norm.weight"].fill_(float("nan")), "Expected logits within"),
    ],
    ids=["missing", "zeros", "logits", "nan"],
)
def test_a_saved_model_that_differs_fails_and_leaves_nothing(tmp_path, monkeypatch, change, message):
    model = llama(tied=True)
    manifest = prune(model)
    save = model.save_pretrained

    def save_and_change(directory):
        save(directory)
        saved = {name: weight.clone() for name, weight in load_file(directory / "model.safetensors").items()}
        change(saved)
        save_file(saved, directory / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(model, "save_pretrained", save_and_change)
    with pytest.raises(ExportError, match=message) as caught:
        export(model, tmp_path / "out", manifest)
    assert "\n" not in str(caught.value)
    assert leftovers(tmp_path) == []


def test_a_model_that_does_not_load_fails_and_leaves_nothing(tmp_path, monkeypatch):
    model = llama(tied=True)
    manifest = prune(model)
    script = tmp_path / "script.py"
    script.write_text("raise OSError('line one\\nno weights here')")
    monkeypatch.setattr(export_check, "_SCRIPT", script)
    with pytest.raises(ExportError, match="in a fresh process, got exit status 1: no weights here") as caught:
        export(model, tmp_path / "out", manifest)
    assert "\n" not in str(caught.value)
    assert leftovers(tmp_path) == ["script.py"]


def test_a_model_that_is_not_pruned_as_asked_is_refused(tmp_path):
    model = llama(tied=True)
    manifest = prune(model)
    name = next(iter(manifest.asked))
    with pytest.raises(ExportError, match=f"sparsity of 0.9000, got 0.5000 at {name}"):
        export(model, tmp_path / "out", replace(manifest, asked={name: 0.9}))
    with pytest.raises(ValueError, match="linears of the model, got 'nowhere'"):
        export(model, tmp_path / "out", replace(manifest, asked={"nowhere": 0.5}))
    assert leftovers(tmp_path) == []


def test_the_reloading_script_imports_stock_packages_alone():
    tree = ast.parse(Path(reload.__file__).read_text())
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in (
            [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
        )
    }
    own = {"inspect", "json", "sys", "pathlib", "typing"}
    assert imported <= own | {"torch", "safetensors", "transformers"}
