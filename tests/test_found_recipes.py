"""Recipe files of every search: the same weights on its own model, relative depth and role on another."""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from secateur.pruners.models.discover import dissect
from secateur.pruners.models.loading import load_model
from secateur.search.app.found import best_of, recipe_of
from secateur.search.app.recipe_file import open_recipe
from secateur.search.errors import UsageError
from secateur.search.results.run import open_run
from secateur.spaces.shape import by_depth

OLD = Path(__file__).parent / "old_runs"
KINDS = ("allocation", "architecture", "formula")
TEXT = ["--window", 128, "--tokens", 512]


@pytest.fixture(scope="module")
def deeper(tmp_path_factory) -> Path:
    """A random Llama of four narrower blocks, with the embedded model's tokenizer."""
    tokenizer = load_model("tiny").tokenizer
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    directory = tmp_path_factory.mktemp("deeper")
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def file_of(kind: str, directory: Path, secateur) -> Path:
    path = directory / f"{kind}.yaml"
    status, out, err = secateur("recipe", OLD / kind, "--to", path)
    assert status == 0, out + err
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_on_its_own_model_it_gives_the_measured_weights(kind, tmp_path, secateur):
    run = open_run(OLD / kind)
    path = file_of(kind, tmp_path, secateur)
    assert open_recipe(str(path)) == recipe_of(run, best_of(run))
    path.write_text(
        path.read_text().replace("space:\n", "space:\n  statistics: dense\n")
    )  # as the search had them
    status, out, err = secateur(
        "prune", "tiny", "--recipe", path, "--to", tmp_path / "model", "--json", *TEXT
    )
    assert status == 0, out + err
    measured = json.loads(out)["measured"]["test:512, as exported"]
    tested = run.test_of(best_of(run))
    assert tested is not None, "the best is measured on the test text"
    assert measured["kl"] == pytest.approx(tested.values["kl"], rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_on_another_model_it_is_mapped_by_relative_depth(kind, tmp_path, deeper, secateur):
    path = file_of(kind, tmp_path, secateur)
    status, out, err = secateur(
        "prune", deeper, "--recipe", path, "--to", tmp_path / "model", "--json", *TEXT
    )
    assert status == 0, out + err
    manifest = json.loads((tmp_path / "model" / "secateur.json").read_text())
    form = open_recipe(str(path)).form
    n_blocks = len(dissect(load_model(str(deeper)).model).blocks)
    if kind == "allocation":
        rows = by_depth(form["blocks"], n_blocks)
        for block, row in enumerate(rows):
            asked = manifest["asked"][f"model.layers.{block}.mlp.up_proj"]
            assert asked == row["mlp"]["up_proj"]
    elif kind == "architecture":
        assert len(manifest["kept"]) == n_blocks
        assert manifest["parameters"]["saved"] < manifest["parameters"]["parent"]
    else:
        assert set(manifest["asked"].values()) == {0.5}


def test_the_mapping_by_depth():
    assert by_depth("abc", 3) == list("abc")
    assert by_depth("ab", 4) == list("aabb")
    assert by_depth("abcd", 2) == ["b", "d"]
    assert by_depth("abcdef", 1) == ["d"]


def test_what_does_not_fit_says_why(tmp_path, secateur):
    path = file_of("allocation", tmp_path, secateur)
    status, _, err = secateur("prune", "tiny", "--recipe", path, "--sparsity", 0.3, "--to", tmp_path / "x")
    assert (status, "whose blocks have their own shares" in " ".join(err.split())) == (2, True)
    path.write_text(path.read_text().replace("mlp:", "experts:"))
    status, _, err = secateur("prune", "tiny", "--recipe", path, "--to", tmp_path / "x", *TEXT)
    assert (status, "Expected sparsities of mlp, got attention, experts" in " ".join(err.split())) == (
        2,
        True,
    )
    formula = file_of("formula", tmp_path, secateur)
    assert open_recipe(str(formula), 0.3).settings.target == 0.3
    dense = open_run(OLD / "allocation").baselines["dense"]
    with pytest.raises(UsageError, match="the dense one"):
        recipe_of(open_run(OLD / "allocation"), dense)
