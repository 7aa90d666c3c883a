"""Settings files to begin with, their schema, and dry runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from secateur.search.settings.presets import PRESETS, preset_text
from secateur.search.settings.schema import field_docs, settings_schema
from secateur.search.settings.settings import load_settings
from secateur.spaces.architecture.settings import ArchitectureSettings
from secateur.spaces.registry import SPACES

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize("name", PRESETS)
def test_each_preset_is_written_and_fits_tiny(name, tmp_path, monkeypatch, cache, secateur):
    monkeypatch.chdir(tmp_path)
    status, out, err = secateur("init", "--preset", name)
    assert status == 0, err
    assert f"secateur search {name}.yaml --dry-run" in out
    text = (tmp_path / f"{name}.yaml").read_text()
    assert text.startswith("# ")
    assert load_settings(tmp_path / f"{name}.yaml").model == "tiny"
    if name == "faster-cpu":
        assert secateur("latency", "tiny", "--rounds", "10", "--prompt", "64")[0] == 0
        arguments = ["-o", "evaluator.latency.prompt=64"]
    else:
        arguments = []
    command = ["search", f"{name}.yaml", "--dry-run", "--json", *arguments]
    status, out, err = secateur(*command, "--anyway")  # whatever memory is free here
    assert status == 0, err
    assert json.loads(out)["model"]["parameters"] == 1_705_600
    assert not (tmp_path / "runs").exists()
    assert secateur("init", "--preset", name)[0] == 2  # the file is there


def test_presets_are_listed_and_unknown_ones_named(secateur):
    out = secateur("init")[1]
    assert all(name in out for name in PRESETS)
    status, _, err = secateur("init", "--preset", "smaller-stok")
    assert (status, "Did you mean 'smaller-stock'" in err) == (2, True)


def test_a_preset_names_the_model():
    assert yaml.safe_load(preset_text("recipe", "owner/name"))["model"] == "owner/name"


def test_the_schema_takes_what_the_settings_take(secateur):
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads(secateur("schema")[1])
    assert schema == settings_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    check = jsonschema.Draft202012Validator(schema)
    for name in PRESETS:
        assert check.is_valid(yaml.safe_load(preset_text(name, "tiny")))
    for wrong in (
        {"space": {"kind": "architecture", "targt": 1}},
        {"space": {"kind": "nothing"}},
        {"controller": {"kind": "evolution", "offspring": "many"}},
        {"sed": 0},
    ):
        assert not check.is_valid(wrong)


def test_the_schema_has_every_kind_and_the_words_of_the_docstrings():
    schema = settings_schema()
    kinds = [
        branch["allOf"][1]["properties"]["kind"]["const"] for branch in schema["properties"]["space"]["anyOf"]
    ]
    assert kinds == list(SPACES)
    found = schema["$defs"]["ArchitectureSettings"]["properties"]["share_of"]["description"]
    assert found == "what `target` is a share of: the `blocks`, or the whole `model`."
    missing = [
        name for name in ArchitectureSettings.model_fields if name not in field_docs(ArchitectureSettings)
    ]
    assert missing == ["kind"]


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(tmp_path, secateur):
    arguments = ["-o", "space.kind=architecture", "--max-params", "0.8x", "--run", tmp_path / "run"]
    status, out, err = secateur("search", *arguments, "--dry-run", "--json", "-o", "budget.evaluations=10")
    assert status == 0, err
    found = json.loads(out)
    assert found["targets"] == ["28.9% of the blocks' params, 20.0% of the whole model's"]
    assert found["tokens"] == 10 * 32768
    assert found["space"]["slots"] == 12  # two sub-layers of six blocks
    assert found["run"].endswith("new: 0 measurements")
    assert not (tmp_path / "run").exists()
    status, out, _ = secateur("search", *arguments, "--dry-run")
    assert "blocks 6; parameters 1,705,600" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-params", "0.8x"], "a space that makes models smaller with `--max-params`, got allocation"),
        (
            ["-o", "space.kind=recipe", "--max-latency", "0.8x"],
            "`--max-params` or `--max-size` with the space recipe",
        ),
        (["-o", "space.kind=masks", "--max-params", "900k"], "one limit as a share of the dense model"),
    ],
)
def test_limits_that_are_no_targets_are_refused(arguments, message, secateur):
    status, _, err = secateur("search", *arguments, "--dry-run")
    assert (status, message in err) == (2, True), err


@pytest.mark.parametrize("name", ["quickstart", "quickstart-unstructured"])
def test_the_examples_of_the_quickstart_fit(name, secateur, tmp_path):
    status, out, err = secateur(
        "search", EXAMPLES / f"{name}.yaml", "--dry-run", "--json", "--run", tmp_path / "run"
    )
    assert status == 0, err
    found = json.loads(out)
    smaller = [
        f"{x}% of the blocks' params, {y}% of the whole model's" for x, y in ((28.9, "20.0"), (43.3, "30.0"))
    ]
    assert found["targets"] == (smaller if name == "quickstart" else [0.3, 0.4, 0.5, 0.6, 0.7])


def test_links_of_the_readme_lead_somewhere():
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", (EXAMPLES.parent / "README.md").read_text())
    assert len(links) > 15
    assert [
        link for link in links if not link.startswith("http") and not (EXAMPLES.parent / link).exists()
    ] == []
