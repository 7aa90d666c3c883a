"""The manifest and the card of an export: what they say, and what they show of damage."""

import json
from dataclasses import replace

import pytest
import torch
from huggingface_hub import ModelCard

from secateur.pruners.export.card import card
from secateur.pruners.export.manifest import MANIFEST, UNSTRUCTURED, Manifest, check_files, same_export
from tests.exports import TOKENS, export, llama, prune


@pytest.mark.usefixtures("in_process")
def test_manifest_and_card_say_what_it_is(tmp_path):
    model = llama(tied=True)
    manifest = prune(model)
    report = export(model, tmp_path / "out", manifest)
    text = (tmp_path / "out" / MANIFEST).read_text()
    assert Manifest.from_json(text) == report.manifest
    read = json.loads(text)
    assert read["dtype"] == "float32"
    assert read["asked"].keys() == read["zeros"].keys() == read["weights"].keys()
    assert read["versions"]["torch"] == torch.__version__
    assert read["checks"]["tokens_compared"] == TOKENS.numel()
    card = (tmp_path / "out" / "README.md").read_text()
    for part in (UNSTRUCTURED, "50.00% of the weights", "base_model: someone/small-model", "0.25", "random"):
        assert part in card

    assert same_export(tmp_path / "out", manifest)
    assert same_export(tmp_path / "out", manifest, "float32")
    assert not same_export(tmp_path / "out", manifest, "bfloat16")
    assert not same_export(tmp_path / "out", replace(manifest, candidate="0.6"))
    assert not same_export(tmp_path, manifest)


def test_manifests_of_later_versions_stay_readable():
    manifest = Manifest("p", "f", {}, "c", {}, {}, {}, {}, "label")
    later = json.dumps(json.loads(manifest.to_json()) | {"unheard_of": 1})
    assert Manifest.from_json(later) == manifest


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


@pytest.mark.usefixtures("in_process")
def test_a_damaged_export_is_not_the_same(tmp_path):
    model, out = llama(tied=True), tmp_path / "out"
    manifest = prune(model)
    written = export(model, out, manifest).manifest
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
def test_an_export_without_checksums_is_checked_by_the_size_of_its_weights(tmp_path):
    model, out = llama(tied=True), tmp_path / "out"
    manifest = prune(model)
    export(model, out, manifest)
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
