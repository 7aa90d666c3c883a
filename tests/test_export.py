"""Exports: saved, loaded again by stock transformers in a fresh process, and compared."""

import ast
import json
import resource
import signal
import socket
import subprocess
import sys
import traceback
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from secateur.pruners.export import export_check, reload, saving
from secateur.pruners.export.card import card
from secateur.pruners.export.export import export_model
from secateur.pruners.export.export_check import ExportError
from secateur.pruners.export.manifest import MANIFEST, UNSTRUCTURED, Manifest, check_files, same_export

SIZES = {"vocab_size": 96, "bos_token_id": 1, "eos_token_id": 2}


@pytest.fixture(scope="module")
def tokenizer():
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(95)} | {"[UNK]": 95}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")


@pytest.fixture
def tokens():
    return torch.randint(96, (2, 24), generator=torch.Generator().manual_seed(0))


def llama(*, tied):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        **SIZES,
    )
    return LlamaForCausalLM(config)


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, **SIZES))


def prune(model, sparsity=0.5):
    """Zeros in place, at random, in every projection; returns the manifest for it."""
    asked = {}
    for name, module in model.named_modules():
        if name.endswith(("_proj", "c_attn", "c_fc", "c_proj")):
            weight = module.weight.data
            dropped = torch.randperm(weight.numel(), generator=torch.Generator().manual_seed(1))
            weight.view(-1)[dropped[: round(sparsity * weight.numel())]] = 0.0
            asked[name] = sparsity
    return Manifest(
        parent="someone/small-model",
        fingerprint="f" * 64,
        method={"metric": "random"},
        candidate="0.5",
        asked=asked,
        calibration={"source": "docs", "tokens": 128, "sha256": "0" * 64},
        seeds={"search": 0},
        measured={"test:48": {"loss": 0.25, "params": 1000}},
        label=UNSTRUCTURED,
    )


@pytest.fixture
def in_process(monkeypatch):
    """Runs the reloading script in this process: it takes seconds to start another one."""

    def run(command, **_):
        try:
            reload.main(Path(command[-2]), Path(command[-1]))
        except Exception:  # noqa: BLE001 — as a process would end
            return subprocess.CompletedProcess(command, 1, "", traceback.format_exc())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(export_check.subprocess, "run", run)


def leftovers(directory):
    return [path.name for path in directory.iterdir()]


def test_an_export_loads_in_a_fresh_process(tmp_path, tokenizer, tokens):
    check_export(llama(tied=True), tmp_path, tokenizer, tokens)


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("make", [lambda: llama(tied=False), gpt2], ids=["untied", "gpt2"])
def test_other_exports_load(make, tmp_path, tokenizer, tokens):
    check_export(make(), tmp_path, tokenizer, tokens)


def check_export(model, tmp_path, tokenizer, tokens):
    manifest = prune(model)
    before = {name: (p.data_ptr(), p.clone()) for name, p in model.named_parameters()}
    report = export_model(model, tokenizer, tmp_path / "new" / "out", manifest=manifest, check_tokens=tokens)

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
def test_manifest_and_card_say_what_it_is(tmp_path, tokenizer, tokens):
    model = llama(tied=True)
    manifest = prune(model)
    report = export_model(model, tokenizer, tmp_path / "out", manifest=manifest, check_tokens=tokens)
    text = (tmp_path / "out" / MANIFEST).read_text()
    assert Manifest.from_json(text) == report.manifest
    read = json.loads(text)
    assert read["dtype"] == "float32"
    assert read["asked"].keys() == read["zeros"].keys() == read["weights"].keys()
    assert read["versions"]["torch"] == torch.__version__
    assert read["checks"]["tokens_compared"] == tokens.numel()
    card = (tmp_path / "out" / "README.md").read_text()
    for part in (UNSTRUCTURED, "50.00% of the weights", "base_model: someone/small-model", "0.25", "random"):
        assert part in card

    assert same_export(tmp_path / "out", manifest)
    assert same_export(tmp_path / "out", manifest, "float32")
    assert not same_export(tmp_path / "out", manifest, "bfloat16")
    assert not same_export(tmp_path / "out", replace(manifest, candidate="0.6"))
    assert not same_export(tmp_path, manifest)


@pytest.mark.usefixtures("in_process")
def test_a_damaged_export_is_not_the_same(tmp_path, tokenizer, tokens):
    model, out = llama(tied=True), tmp_path / "out"
    manifest = prune(model)
    written = export_model(model, tokenizer, out, manifest=manifest, check_tokens=tokens).manifest
    assert written.files.keys() == {path.name for path in out.iterdir()} - {MANIFEST}
    assert check_files(out) == len(written.files)
    (out / "notes.txt").write_text("a file of somebody's own")
    assert same_export(out, manifest) == written
    weights = (out / "model.safetensors").read_bytes()
    changed = weights[:-1] + bytes([weights[-1] ^ 1])
    for content in (weights[:-1], changed, b""):
        (out / "model.safetensors").write_bytes(content)
        with pytest.raises(
            ValueError, match=r"got model.safetensors missing or damaged. Remove the directory"
        ):
            same_export(out, manifest)
    assert not same_export(out, replace(manifest, candidate="0.6")), "another export is not checked"
    (out / "config.json").unlink()
    with pytest.raises(ValueError, match=r"got config.json, model.safetensors missing or damaged"):
        check_files(out)


@pytest.mark.usefixtures("in_process")
def test_an_export_without_checksums_is_checked_by_the_size_of_its_weights(tmp_path, tokenizer, tokens):
    model, out = llama(tied=True), tmp_path / "out"
    manifest = prune(model)
    export_model(model, tokenizer, out, manifest=manifest, check_tokens=tokens)
    old = json.loads((out / MANIFEST).read_text())
    del old["files"]
    (out / MANIFEST).write_text(json.dumps(old))
    (out / "config.json").write_text("{}")
    assert check_files(out) == 0
    assert same_export(out, manifest)
    (out / "model.safetensors").write_bytes((out / "model.safetensors").read_bytes()[:-1])
    with pytest.raises(ValueError, match="got weights missing or damaged"):
        same_export(out, manifest)
    with pytest.raises(ValueError, match=f"Expected an export with its {MANIFEST}"):
        check_files(tmp_path)


def test_a_card_names_the_licence_that_the_parents_card_names(tmp_path):
    def data(readme: str) -> dict[str, object]:
        (tmp_path / "README.md").write_text(readme)
        manifest = Manifest(str(tmp_path), "f", {}, "c", {}, {}, {}, {}, "label")
        return ModelCard(card(manifest)).data.to_dict()

    plain = {"library_name": "transformers", "tags": ["pruned", "secateur"]}
    named = {"license": "other", "license_name": "mine", "license_link": "LICENSE"}
    front = "".join(f"{name}: {value}\n" for name, value in named.items())
    assert data(f"---\n{front}language: en\n---\n# Parent\n") == plain | named
    for readme in ("no front matter", "---\n- a list\n---\n", "---\na: [\n---\n"):
        assert data(readme) == plain


def test_manifests_of_later_versions_stay_readable():
    manifest = Manifest("p", "f", {}, "c", {}, {}, {}, {}, "label")
    later = json.dumps(json.loads(manifest.to_json()) | {"unheard_of": 1})
    assert Manifest.from_json(later) == manifest


@pytest.mark.usefixtures("in_process")
def test_weights_that_are_views_are_saved_as_they_look(tmp_path, tokenizer, tokens):
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
    report = export_model(model, tokenizer, tmp_path / "out", manifest=manifest, check_tokens=tokens)
    assert report.comparison.logit_error <= 1e-5
    assert first.gate_proj.weight.data_ptr() == stack.data_ptr()


@pytest.mark.usefixtures("in_process")
def test_a_lossless_dtype_is_checked_as_strictly_and_a_lossy_one_by_its_rounding(tmp_path, tokenizer, tokens):
    model = llama(tied=True)
    manifest = prune(model)
    lossy = export_model(
        model, tokenizer, tmp_path / "a", manifest=manifest, check_tokens=tokens, dtype=torch.bfloat16
    )
    assert 1e-4 < lossy.comparison.logit_error <= lossy.comparison.logit_tolerance == 5e-2
    model.to(torch.bfloat16).to(torch.float32)
    exact = export_model(
        model, tokenizer, tmp_path / "b", manifest=manifest, check_tokens=tokens, dtype=torch.bfloat16
    )
    assert exact.comparison.logit_error <= 1e-5 < exact.comparison.logit_tolerance == 1e-4
    assert model.dtype == torch.float32
    saved = load_file(tmp_path / "b" / "model.safetensors")
    assert {weight.dtype for weight in saved.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "b" / "config.json").read_text())["dtype"] == "bfloat16"


def test_destinations_in_use_are_refused(tmp_path, tokenizer, tokens):
    model = llama(tied=True)
    manifest = prune(model)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="Expected a new or empty directory"):
        export_model(model, tokenizer, tmp_path / "used", manifest=manifest, check_tokens=tokens)
    with pytest.raises(ValueError, match="a file"):
        export_model(
            model, tokenizer, tmp_path / "used" / "thesis.tex", manifest=manifest, check_tokens=tokens
        )
    assert leftovers(tmp_path) == ["used"]
    assert leftovers(tmp_path / "used") == ["thesis.tex"]


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
def test_a_saved_model_that_differs_fails_and_leaves_nothing(
    tmp_path, tokenizer, tokens, monkeypatch, change, message
):
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
        export_model(model, tokenizer, tmp_path / "out", manifest=manifest, check_tokens=tokens)
    assert "\n" not in str(caught.value)
    assert leftovers(tmp_path) == []


def test_a_model_that_does_not_load_fails_and_leaves_nothing(tmp_path, tokenizer, tokens, monkeypatch):
    model = llama(tied=True)
    manifest = prune(model)
    script = tmp_path / "script.py"
    script.write_text("raise OSError('line one\\nno weights here')")
    monkeypatch.setattr(export_check, "_SCRIPT", script)
    with pytest.raises(ExportError, match="in a fresh process, got exit status 1: no weights here") as caught:
        export_model(model, tokenizer, tmp_path / "out", manifest=manifest, check_tokens=tokens)
    assert "\n" not in str(caught.value)
    assert leftovers(tmp_path) == ["script.py"]


def test_a_model_that_is_not_pruned_as_asked_is_refused(tmp_path, tokenizer, tokens):
    model = llama(tied=True)
    manifest = prune(model)
    name = next(iter(manifest.asked))
    with pytest.raises(ExportError, match=f"sparsity of 0.9000, got 0.5000 at {name}"):
        export_model(
            model,
            tokenizer,
            tmp_path / "out",
            manifest=replace(manifest, asked={name: 0.9}),
            check_tokens=tokens,
        )
    with pytest.raises(ValueError, match="linears of the model, got 'nowhere'"):
        export_model(
            model,
            tokenizer,
            tmp_path / "out",
            manifest=replace(manifest, asked={"nowhere": 0.5}),
            check_tokens=tokens,
        )
    assert leftovers(tmp_path) == []


def test_a_write_that_fails_leaves_nothing(tmp_path, tokenizer, tokens):
    model = llama(tied=True)
    manifest = prune(model)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (20_000, limits[1])
    )  # a real error from the system, as of a full disk
    try:
        with pytest.raises(ExportError, match=r"Expected to write the model to .*Free some space") as caught:
            export_model(model, tokenizer, tmp_path / "out", manifest=manifest, check_tokens=tokens)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)
    assert leftovers(tmp_path) == []


def test_too_little_space_is_seen_before_writing(tmp_path, tokenizer, tokens, monkeypatch):
    model = llama(tied=True)
    monkeypatch.setattr(saving, "SPARE_BYTES", 1 << 62)
    with pytest.raises(ExportError, match="MB of free space"):
        export_model(model, tokenizer, tmp_path / "out", manifest=prune(model), check_tokens=tokens)
    assert leftovers(tmp_path) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from secateur.pruners.export.saving import new_directory

with new_directory(Path(sys.argv[1]), 1) as (made, scratch):
    (made / "model.safetensors").write_bytes(b"x" * 1000)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_killed_exports_left_is_removed_and_nothing_else(tmp_path):
    out = tmp_path / "out[1]"
    assert saving.remove_leftovers(out) == []
    killed = subprocess.run([sys.executable, "-c", KILLED, out], check=False)
    assert killed.returncode == -signal.SIGKILL
    [left] = leftovers(tmp_path)
    kept = {}
    for name, host in {
        ".out[1]-of_other": "another-host",
        ".out[1]-starting": "",
        ".out[1]-other-abcdefgh": socket.gethostname(),
        "out[1]-12345678": socket.gethostname(),
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / saving.LOCK).write_text(host)
        kept[name] = host
    (tmp_path / ".out[1]-unmarked").mkdir()
    with saving.new_directory(out, 1) as (made, scratch):
        assert saving.remove_leftovers(out) == [str(tmp_path / left)]
        assert {*leftovers(tmp_path)} == {*kept, ".out[1]-unmarked", scratch.name}, "of a living process"
        (made / "weights").write_text("x")
    assert leftovers(out) == ["weights"]
    assert saving.remove_leftovers(out) == []


def test_the_second_of_two_exports_at_once_is_told_so(tmp_path):
    out = tmp_path / "out"

    def both():
        with saving.new_directory(out, 1):
            out.mkdir()
            (out / "weights").write_text("of the first")

    with pytest.raises(ExportError, match=r"another process that exported there meanwhile. Repeat") as caught:
        both()
    assert "\n" not in str(caught.value)
    assert "space" not in str(caught.value)
    assert leftovers(tmp_path) == ["out"]
    assert leftovers(out) == ["weights"]


def test_the_reloading_script_imports_stock_packages_alone():
    tree = ast.parse(export_check._SCRIPT.read_text())
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
