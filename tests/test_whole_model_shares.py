"""Shares of the whole model: bounds of `prune` and of structured searches, and stock shapes in one command."""

from __future__ import annotations

import json
import re

import pytest

from secateur.search.app.recipe_file import file_for, known_recipe
from secateur.search.app.stock import stock_file
from secateur.search.app.within import least_share
from secateur.search.errors import UsageError
from secateur.search.results.pick import parse_bounds
from secateur.search.results.shares import removed_shares, shares_words
from secateur.search.settings.settings import identity, settings_from
from secateur.spaces.architecture.cost import block_shares, cost, dense_of
from secateur.spaces.registry import SPACES
from tests.architectures import shape_of

FEW = ["--tokens", "128", "--window", "64"]
SHAPE = shape_of(12, None)


def test_a_share_of_the_model_is_a_larger_one_of_its_blocks():
    blocks = sum(block.params(*dense_of(block)) for block in SHAPE.blocks)
    held = blocks / SHAPE.n_params
    (share,) = block_shares(SHAPE, [0.2], "model")
    assert share == pytest.approx(0.2 / held, abs=1e-4)
    assert share >= 0.2 / held  # rounded up
    assert block_shares(SHAPE, [0.2], "blocks") == (0.2,)
    with pytest.raises(ValueError, match=f"at most {held:.2%} of the model"):
        block_shares(SHAPE, [0.999], "model")


@pytest.mark.parametrize("kind", ["architecture", "masks"])
def test_a_space_of_shares_of_the_model_removes_them(kind):
    settings = settings_from({"space": {"kind": kind, "target": 0.2, "share_of": "model"}}).space
    space = SPACES[kind].build(settings, [], SHAPE)
    costs = space.cost(space.uniform(0) if kind == "architecture" else next(_masks(space)))
    assert 1 - costs["params"] / SHAPE.n_params == pytest.approx(0.2, abs=0.01)


@pytest.mark.parametrize(
    ("kind", "more", "first"),
    [
        ("architecture", {}, "uniform"),
        ("architecture", {"tied": True}, "uniform"),
        ("masks", {}, "uniform"),
        ("recipe", {"unit": "structure"}, None),
    ],
)
def test_baselines_are_named_after_the_share_that_was_asked_for(kind, more, first):
    def names(share_of):
        raw = {"kind": kind, "target": [0.2, 0.25], "share_of": share_of, **more}
        space = SPACES[kind].build(settings_from({"space": raw}).space, [], SHAPE)
        return space.targets, [name for name in space.baselines() if "@" in name]

    (of_blocks, asked), (of_model, found) = names("blocks"), names("model")
    assert found == asked  # the names of the same wish ...
    assert of_blocks[0] == 0.2 < of_model[0]  # ... of another size
    assert {name.rpartition("@")[2] for name in found} == {"0.2", "0.25"}
    if first is not None:
        assert found[0] == f"{first}@0.2"


def _masks(space):
    return (c for name, c in space.baselines().items() if name != "dense")


def test_the_share_is_no_part_of_a_searchs_identity():
    raw = {"space": {"kind": "architecture", "target": 0.2}}
    changed = {"space": {"kind": "architecture", "target": 0.2, "share_of": "model"}}
    assert identity(settings_from(raw)) == identity(settings_from(changed))


def test_single_weights_have_no_share_of_the_model():
    with pytest.raises(UsageError, match="`share_of: blocks` with the unit weights"):
        settings_from({"space": {"kind": "recipe", "unit": "weights", "share_of": "model"}})


def test_removed_shares_name_both():
    shares = removed_shares({"sparsity": 0.301, "params": 75.0}, 100)
    assert shares == {"blocks": 0.301, "model": 0.25}
    assert shares_words(shares) == "30.1% of the blocks' parameters, 25.0% of the whole model's"


# --- the least share within bounds ---


def test_the_least_share_within_bounds():
    dense = {"params": 1000.0, "size_bytes": 4000.0}

    def attempt(share):
        return f"{share:.3f}", {"params": 1000 - 800 * share, "size_bytes": 4000 - 3200 * share}

    assert least_share(parse_bounds({"max-params": "0.8x"}), dense, attempt)[0] == 0.25
    assert least_share(parse_bounds({"max-params": "800"}), dense, attempt)[1] == "0.250"
    assert least_share(parse_bounds({"max-size": "2KB"}), dense, attempt)[0] == 0.625
    both = parse_bounds({"max-size": "0.9x", "max-params": "0.7x"})
    assert least_share(both, dense, attempt)[0] == 0.375
    with pytest.raises(UsageError, match=r"bounds that pruned blocks can meet, got --max-params 0.1x"):
        least_share(parse_bounds({"max-params": "0.1x"}), dense, attempt)
    with pytest.raises(UsageError, match=r"latency table .* for `--max-latency`.*secateur latency MODEL"):
        least_share(parse_bounds({"max-latency": "0.5x"}), dense, attempt)
    with pytest.raises(UsageError, match=r"Measure one: secateur latency MODEL --batch 3\.$"):
        least_share(parse_bounds({"max-latency": "0.5x@3"}), dense, attempt)


def test_shares_without_a_shape_are_passed_over():
    def attempt(share):
        if 0.2 < share < 0.28:
            raise ValueError("no shape")
        return share, {"params": 1000 - 800 * share}

    assert least_share(parse_bounds({"max-params": "0.8x"}), {"params": 1000.0}, attempt)[0] == 0.28


# --- the command ---


@pytest.mark.usefixtures("forked_reload")
def test_prune_without_a_recipe_makes_a_stock_model_within_the_bound(tmp_path, secateur):
    status, out, err = secateur(
        "prune", "tiny", "--max-params", "0.8x", "--to", tmp_path / "m", *FEW, "--json"
    )
    assert status == 0, err
    assert "the default recipe: equal blocks for hf-stock" in err
    found = json.loads(out)
    assert 0.2 <= found["shares"]["model"] < 0.25
    assert found["shares"]["blocks"] > found["shares"]["model"]
    assert found["checks"]["loaded_as"] == "LlamaForCausalLM"
    assert found["checks"]["trust_remote_code"] is False
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    again = secateur("prune", "tiny", "--max-params", "0.8x", "--to", tmp_path / "m", *FEW)
    assert "was exported before" in again[1]
    assert "of the blocks' parameters" in again[1]


@pytest.mark.usefixtures("forked_reload")
def test_a_published_recipe_keeps_within_a_bound(tmp_path, secateur):
    arguments = ["--recipe", "wanda_sp", "--max-size", "0.85x", "--to", tmp_path / "m", *FEW, "--json"]
    status, out, err = secateur("prune", "tiny", *arguments)
    assert status == 0, err
    found = json.loads(out)
    assert 0.15 <= found["shares"]["model"] < 0.2
    assert found["recipe"]["metric"]["name"] == "wanda_sp"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-params", "0.8x", "--sparsity", "0.3"], "`--sparsity` or limits"),
        (
            ["--recipe", "wanda", "--max-params", "0.8x"],
            "a recipe that removes structure for a bound on max-params",
        ),
        (
            ["--recipe", "flap", "--sparsity", "0.2", "--format", "hf-stock"],
            "all blocks alike .*ziplm.*got flap",
        ),
        (["--recipe", "wanda", "--sparsity", "0.2", "--format", "gguf"], "a format out of hf, got 'gguf'"),
        (["--max-latency", "0.8x"], "latency"),
        (["--max-params", "0.05x"], "bounds that pruned blocks can meet"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, secateur, cache, arguments, message):

    status, _, err = secateur("prune", "tiny", *arguments, "--to", tmp_path / "m", *FEW)
    assert status == 2
    assert re.search(message, err), err
    assert not (tmp_path / "m").exists()


def test_a_format_that_the_family_lacks_is_refused_by_its_config_alone(tmp_path, secateur):
    config = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_layer": 2,
        "n_embd": 16,
        "n_head": 2,
    }
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"\x02\x00\x00\x00\x00\x00\x00\x00{}")
    status, _, err = secateur("prune", tmp_path / "model", "--format", "gguf", "--to", tmp_path / "m")
    assert status == 2
    assert "a family that the format gguf can carry" in err


def test_a_published_recipe_in_stock_shapes_keeps_its_importance_and_repair():
    file, said = file_for("ziplm", 0.3, None, "hf-stock")
    assert (file.settings.importance, file.settings.repair, file.settings.target_format) == (
        "obs",
        "obs",
        "hf-stock",
    )
    assert file.form == {"uniform": 0.3}
    assert said.startswith("ziplm: equal blocks for hf-stock")
    assert file_for("wanda", 0.3) == (known_recipe("wanda", 0.3), "")
    assert stock_file().with_sparsity(0.4).form == {"uniform": 0.4}


def test_costs_of_the_dense_shape_are_those_of_the_model():
    dense = cost(SHAPE, [dense_of(block) for block in SHAPE.blocks])
    assert dense["params"] == SHAPE.n_params
    assert dense["sparsity"] == 0
