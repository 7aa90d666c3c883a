"""Levels with the statistics of a model that is pruned at the expected share: ``statistics: expected``."""

from __future__ import annotations

import json

import pytest
import torch

from secateur.pruners.calibration.stream import stream_blocks
from secateur.pruners.stores.block_files import is_built
from secateur.pruners.weights.level_store import LevelStore, StoreKey, build_levels
from secateur.pruners.weights.method import Method
from secateur.pruners.weights.pruner import prune
from secateur.search import app
from secateur.search.app.found import best_of
from secateur.search.errors import UsageError
from secateur.search.settings.settings import identity, settings_from
from tests.models import random_tokens, small_anatomy

LEVELS = (0.0, 0.25, 0.5, 0.75)
TOKENS = random_tokens(4, 16)


def half(anatomy):
    """Half of each projection, but for one that stays dense."""
    names = [linear.name for linear in anatomy.linears]
    return dict.fromkeys(names, 0.5) | {names[3]: 0.0}


def make_key(method: str, expected: dict[str, float] | None) -> StoreKey:
    return StoreKey("model", "float32", "tokens", Method(method), LEVELS, expected)


def built(directory, method: str):
    anatomy = small_anatomy(n_layers=3)
    key = make_key(method, half(anatomy))
    build_levels(directory, anatomy, TOKENS, key)
    return anatomy, LevelStore(directory, anatomy, LEVELS)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "admm_gradual"])
def test_levels_are_those_behind_blocks_at_the_expected_levels(tmp_path, method):
    """Block by block, from a copy of the model whose blocks before it are pruned, one after the other."""
    anatomy, store = built(tmp_path, method)
    for index, block in enumerate(anatomy.blocks):
        copy = small_anatomy(n_layers=3)
        before = {x.name: s for x in copy.linears if x.block < index for s in [half(copy)[x.name]]}
        prune(copy, before, Method(method), TOKENS, sequential=True)
        part = list(stream_blocks(copy, TOKENS, inputs=Method(method).needs))[index]
        for linear, live in zip(block.linears, part.block.linears, strict=True):
            wanted = Method(method).weights(live, part.inputs[live.name], LEVELS[1:])
            for level, weight in enumerate(wanted, start=1):
                assert torch.allclose(store.weight(linear, level), weight, atol=1e-6)
                assert torch.equal(store.weight(linear, level) == 0, weight == 0)


def test_later_blocks_differ_from_those_of_dense_statistics_and_the_first_does_not(tmp_path):
    anatomy, store = built(tmp_path / "expected", "sparsegpt")
    build_levels(tmp_path / "dense", anatomy, TOKENS, make_key("sparsegpt", None))
    dense = LevelStore(tmp_path / "dense", anatomy, LEVELS)
    for block in anatomy.blocks:
        same = [torch.equal(store.weight(x, 2), dense.weight(x, 2)) for x in block.linears]
        assert same == [block.index == 0] * len(same)


def test_the_model_is_dense_again(tmp_path):
    anatomy = small_anatomy(n_layers=3)
    before = [linear.weight.data_ptr() for linear in anatomy.linears]
    build_levels(tmp_path, anatomy, TOKENS, make_key("wanda", half(anatomy)))
    assert [linear.weight.data_ptr() for linear in anatomy.linears] == before
    assert all(int((linear.weight == 0).sum()) == 0 for linear in anatomy.linears)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_a_store_that_was_cut_short_goes_on_with_the_same_levels(tmp_path, method):
    class Cut(Exception):  # noqa: N818
        pass

    def cut(index: int) -> None:
        if index == 1:
            raise Cut

    anatomy = small_anatomy(n_layers=3)
    key = make_key(method, half(anatomy))
    with pytest.raises(Cut):
        build_levels(tmp_path / "cut", anatomy, TOKENS, key, on_block=cut)
    assert not is_built(tmp_path / "cut", key)
    build_levels(tmp_path / "cut", small_anatomy(n_layers=3), TOKENS, key)
    built(tmp_path / "whole", method)
    for block in range(3):
        name = f"block-{block:04d}.safetensors"
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_store_of_other_expected_levels_is_another(tmp_path):
    anatomy, _ = built(tmp_path, "wanda")
    assert is_built(tmp_path, make_key("wanda", half(anatomy)))
    assert not is_built(tmp_path, make_key("wanda", None))
    assert not is_built(tmp_path, make_key("wanda", half(anatomy) | {next(anatomy.linears).name: 0.25}))
    assert "expected" not in make_key("wanda", None).record, "digests of old stores stay"


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_pruning_for_good_gives_the_weights_of_the_store(tmp_path, method):
    anatomy, store = built(tmp_path, method)
    names = [linear.name for linear in anatomy.linears]
    levels = {name: index % 4 for index, name in enumerate(names)}
    pruned = small_anatomy(n_layers=3)
    sparsity = {name: LEVELS[level] for name, level in levels.items()}
    prune(pruned, sparsity, Method(method), TOKENS, sequential=False, expected=half(anatomy))
    for live, linear in zip(pruned.linears, anatomy.linears, strict=True):
        assert torch.allclose(live.weight, store.weight(linear, levels[linear.name]), atol=1e-6)


def test_the_expected_allocation_itself_is_pruned_sequentially():
    expected, sequential = small_anatomy(n_layers=3), small_anatomy(n_layers=3)
    prune(expected, half(expected), Method("sparsegpt"), TOKENS, sequential=False, expected=half(expected))
    prune(sequential, half(sequential), Method("sparsegpt"), TOKENS, sequential=True)
    for one, other in zip(expected.linears, sequential.linears, strict=True):
        assert torch.equal(one.weight, other.weight)


# --- settings ---


def settings_with(**space):
    return settings_from({"model": "tiny", "space": {"kind": "allocation", **space}})


def test_of_several_targets_the_middle_one_is_expected():
    assert settings_with(target=0.6).space.expected_share is None
    assert settings_with(target=0.6, statistics="expected").space.expected_share == 0.6
    assert settings_with(target=[0.7, 0.5, 0.6], statistics="expected").space.expected_share == 0.6
    many = {"low": 0.4, "high": 0.7, "step": 0.1}
    assert settings_with(target=many, statistics="expected").space.expected_share == 0.5


def test_expected_statistics_and_their_share_are_part_of_what_was_measured():
    usual = identity(settings_with(target=0.6))
    assert usual == identity(settings_with(target=0.5, statistics="dense"))
    assert "expected_share" not in usual["space"]
    expected = identity(settings_with(target=0.6, statistics="expected"))
    assert expected["space"] == usual["space"] | {"expected_share": 0.6}
    assert expected != identity(settings_with(target=0.5, statistics="expected"))
    assert expected == identity(settings_with(target=[0.5, 0.6, 0.7], statistics="expected"))


@pytest.mark.usefixtures("forked_reload")
def test_a_search_measures_and_exports_the_same_weights(tmp_path, secateur):
    raw = {
        "model": "tiny",
        "space": {"metric": "sparsegpt", "target": 0.5, "step": 0.25, "statistics": "expected"},
        "evaluator": {"window": 64, "calibration_tokens": 512, "fidelities": [256], "test_tokens": 256},
        "budget": {"evaluations": 4},
        "executor": {"kind": "local", "threads": 1},
    }
    app.search(settings_from(raw), tmp_path / "run")
    run = app.open_run(tmp_path / "run")
    trial = run.trials()[-1]
    assert trial not in run.baselines.values()
    summary = app.export(tmp_path / "run", trial, tmp_path / "model")
    searched, exported = (summary.measured[f"search:256, as {how}"]["kl"] for how in ("searched", "exported"))
    assert exported == pytest.approx(searched, rel=1e-5)
    manifest = json.loads((tmp_path / "model" / "secateur.json").read_text())
    assert manifest["method"]["calibration"] == "expected at 0.5"
    again = app.export(tmp_path / "run", trial, tmp_path / "behind", calibration="sequential")
    assert again.measured["search:256, as exported"]["kl"] != pytest.approx(searched, rel=1e-5)
    with pytest.raises(UsageError, match="sequential, or expected as in the search, got dense"):
        app.export(tmp_path / "run", trial, tmp_path / "other", calibration="dense")
    with pytest.raises(UsageError, match=r"space\.expected_share: 0\.5 -> 0\.75"):
        app.search(settings_from({**raw, "space": {**raw["space"], "target": 0.75}}), tmp_path / "run")
    file = tmp_path / "found.yaml"
    assert secateur("recipe", tmp_path / "run", "--to", file)[0] == 0
    to = ["--to", tmp_path / "recipe", "--window", 64, "--tokens", 256, "--json"]
    status, out, err = secateur("prune", "tiny", "--recipe", file, *to)
    assert status == 0, err
    best = best_of(run)
    assert json.loads(out)["measured"]["test:256, as exported"]["ce"] == pytest.approx(
        run.test_of(best).values["ce"], rel=1e-4
    )
