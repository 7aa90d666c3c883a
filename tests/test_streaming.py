"""Streamed pruning: equal to that of the whole model bit for bit, continued after a kill, refused by name."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from secateur.pruners.calibration.collected import walk_dense
from secateur.pruners.export import streamed
from secateur.pruners.export.export_check import ExportError
from secateur.pruners.export.manifest import MANIFEST, check_files
from secateur.pruners.export.saving import leftovers, unfinished
from secateur.pruners.models import mapped
from secateur.pruners.models.checkpoints.checkpoint import ModelError
from secateur.pruners.models.loading import load_model
from secateur.pruners.models.mapped import NotStreamedError, load_mapped
from secateur.pruners.recipes.weights import weights_by_block
from secateur.search import app
from secateur.search.app.candidate_file import CandidateFile
from secateur.search.app.forecasting import foretold, stream_by
from secateur.search.app.recipe_file import RecipeFile
from secateur.search.app.stock import stock_file
from secateur.search.cli.doctor_directory import examine_export
from secateur.search.errors import UsageError
from secateur.search.show.forecast import refusal
from secateur.spaces.forecast import Forecast, Holding
from secateur.spaces.recipe.form import completed
from tests.mixtures import MIXTURES, make_mixture
from tests.recipe_contexts import CALIBRATION, small_context

COMMON = {
    "vocab_size": 4096,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
SLIDING = {"sliding_window": 8, "query_pre_attn_scalar": 8}
GPT2 = {"vocab_size": 4096, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128}
FEW = {"tokens": 128, "window": 32, "loading": {"dtype": "float32"}}


def saved(directory: Path, kind: str, dtype: torch.dtype = torch.float32, **changes: object) -> Path:
    """A random model with the tokenizer of tiny."""
    if kind in MIXTURES:
        model = make_mixture(kind, dtype, vocab_size=4096)
        for name, buffer in model.named_buffers():
            if name.endswith("correction_bias"):  # as they are published
                buffer.data = buffer.data.float()
    else:
        torch.manual_seed(0)
        common = GPT2 if kind == "gpt2" else COMMON
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**common | changes)).to(dtype)
    model.save_pretrained(directory)
    load_model("tiny").tokenizer.save_pretrained(directory)
    return directory


def recipe(metric: object = "wanda", **further: object) -> RecipeFile:
    """Half of the weights, on two short windows."""
    plain = {"unit": "weights", "sparsity": 0.5, "metric": metric, **further}
    plain.setdefault("calibration", {"samples": 2, "length": 32, "choose": "random"})
    return RecipeFile.model_validate(
        {"recipe": plain, "sources": {"calibration": "docs"}, "pool_tokens": 2048}
    )


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    files = [load_file(path) for path in sorted(directory.glob("*.safetensors"))]
    return {name: tensor for file in files for name, tensor in file.items()}


def check_equal(one: Path, other: Path, share: float = 0.5) -> None:
    """The same weights, config, measurements and counts of zeros."""
    before, after = tensors(one), tensors(other)
    assert before.keys() == after.keys()
    assert [x.dtype for x in before.values()] == [after[name].dtype for name in before]
    assert all(torch.equal(before[name], after[name]) for name in before)
    for name in ("config.json", "generation_config.json"):
        assert json.loads((one / name).read_text()) == json.loads((other / name).read_text())
    whole, by_block = (json.loads((x / MANIFEST).read_text()) for x in (one, other))
    differs = {name for name in whole if whole[name] != by_block[name]}
    assert differs <= {"checks", "files", "size_bytes"}
    assert sum(by_block["zeros"].values()) == pytest.approx(
        share * sum(by_block["weights"].values()), rel=0.01
    )


@pytest.mark.usefixtures("forked_reload")
@pytest.mark.parametrize(
    ("kind", "changes", "stored", "dtype", "metric", "repair"),
    [
        ("llama", {"tie_word_embeddings": True}, torch.bfloat16, "float32", "wanda", "none"),
        ("llama", {"tie_word_embeddings": False}, torch.float32, "float32", "sparsegpt", "none"),
        ("gemma2", SLIDING, torch.bfloat16, "bfloat16", "wanda", "none"),
        ("gemma2", SLIDING, torch.bfloat16, "float32", "sparsegpt", "none"),
        ("gpt2", {}, torch.float32, "bfloat16", "magnitude", "none"),
        ("gpt2", {}, torch.float32, "float32", "wanda", "obs"),
        ("gpt_oss", {}, torch.bfloat16, "bfloat16", "wanda", "none"),
        ("mixtral", {}, torch.bfloat16, "bfloat16", "wanda", "none"),
        ("mixtral", {}, torch.float32, "float32", "wanda", "none"),
        ("qwen3_moe", {}, torch.float32, "float32", "wanda", "none"),
        ("granitemoe", {}, torch.bfloat16, "bfloat16", "magnitude", "none"),
        ("phimoe", {}, torch.bfloat16, "bfloat16", "wanda", "none"),
        ("deepseek_v3", {}, torch.bfloat16, "bfloat16", "wanda", "none"),
        ("llama4_text", {}, torch.bfloat16, "bfloat16", "wanda", "none"),
    ],
)
def test_the_result_is_that_of_the_whole_model(tmp_path, kind, changes, stored, dtype, metric, repair):
    model = saved(tmp_path / "model", kind, stored, **changes)
    for stream in ("never", "always"):
        few = FEW | {"loading": {"dtype": dtype}}
        app.prune(recipe(metric, repair=repair), str(model), tmp_path / stream, **few, stream=stream)
    check_equal(tmp_path / "never", tmp_path / "always")
    assert check_files(tmp_path / "always") > len(list((tmp_path / "always").glob("*.safetensors")))
    assert not unfinished(tmp_path / "always").exists()


def candidate(metric: str, statistics: str) -> CandidateFile:
    """Half of the weights of attention and a quarter of those of MLPs, as a search finds them."""
    row = {"attention": {"q_proj": 0.5}, "mlp": {"up_proj": 0.25}}
    space = {"kind": "allocation", "metric": metric, "statistics": statistics, "target": 0.4}
    data = {"text": "docs", "tokens": 64, "window": 32}
    return CandidateFile.model_validate(
        {"space": space, "candidate": {"blocks": [row, row]}, "calibration": data}
    )


@pytest.mark.usefixtures("forked_reload")
@pytest.mark.parametrize(
    ("metric", "statistics"), [("wanda", "sequential"), ("sparsegpt", "sequential"), ("wanda", "dense")]
)
def test_so_is_that_of_a_found_allocation(tmp_path, metric, statistics):
    model = saved(tmp_path / "model", "llama")
    for stream in ("never", "always"):
        file = candidate(metric, statistics)
        assert file.sequential == (statistics == "sequential")
        app.prune(file, str(model), tmp_path / stream, **FEW, stream=stream)
    check_equal(tmp_path / "never", tmp_path / "always", share=0.35)


KILLED = """
import os, signal, sys
from pathlib import Path
from secateur.pruners.calibration.collected import walk_dense
from secateur.pruners.export import streamed
from secateur.search import app
from tests.test_streaming import FEW, recipe

write = streamed.StreamedExport._write_block
def killed(self, block):
    if block.index == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, block)
streamed.StreamedExport._write_block = killed
app.prune(recipe(), sys.argv[1], Path(sys.argv[2]), **FEW, stream="always")
"""


@pytest.mark.usefixtures("forked_reload")
def test_a_killed_prune_computes_one_block_again(tmp_path, monkeypatch):
    model, to = saved(tmp_path / "model", "llama"), tmp_path / "pruned"
    done = subprocess.run([sys.executable, "-c", KILLED, str(model), str(to)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not to.exists()
    assert leftovers(tmp_path, "pruned") == [unfinished(to)]
    first = tensors(unfinished(to) / "model")
    assert not any(name.startswith("model.layers.1.") for name in first)
    pruned: list[int] = []
    prune = streamed.StreamedExport._prune
    monkeypatch.setattr(
        streamed.StreamedExport,
        "_prune",
        lambda self, block: (pruned.append(block.index), prune(self, block)),
    )
    said: list[str] = []
    app.prune(recipe(), str(model), to, **FEW, stream="always", say=said.append)
    assert pruned == [1, 2]
    assert "going on after block 1/3 of an earlier start" in said
    app.prune(recipe(), str(model), tmp_path / "whole", **FEW, stream="never")
    check_equal(tmp_path / "whole", to)
    assert not leftovers(tmp_path, "pruned")


class Stopped(BaseException):
    """Ends a prune as Ctrl-C does."""


def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A model, and the destination of a streamed prune that was stopped at its last block."""
    model, to = saved(tmp_path / "model", "llama"), tmp_path / "pruned"
    write = streamed.StreamedExport._write_block

    def stopped(self: streamed.StreamedExport, block: object) -> None:
        if block.index == 2:
            raise Stopped
        write(self, block)

    with monkeypatch.context() as patch:
        patch.setattr(streamed.StreamedExport, "_write_block", stopped)
        with pytest.raises(Stopped):
            app.prune(recipe(), str(model), to, **FEW, stream="always")
    return model, to


@pytest.mark.usefixtures("forked_reload")
@pytest.mark.parametrize("damage", ["shard", "states", "another recipe"])
def test_what_is_left_is_used_only_if_it_is_whole_and_of_this_prune(tmp_path, monkeypatch, damage):
    model, to = begun(tmp_path, monkeypatch)
    sparsity = 0.25 if damage == "another recipe" else 0.5
    paths = {"shard": unfinished(to) / "model", "states": unfinished(to)}
    if damage in paths:
        path = max(paths[damage].glob("*.safetensors"))
        content = bytearray(path.read_bytes())
        content[-1] ^= 255
        path.write_bytes(bytes(content))
    said: list[str] = []
    app.prune(recipe(sparsity=sparsity), str(model), to, **FEW, stream="always", say=said.append)
    assert "pruning block 1/3" in said
    manifest = json.loads((to / MANIFEST).read_text())
    assert sum(manifest["zeros"].values()) == pytest.approx(
        sparsity * sum(manifest["weights"].values()), rel=0.01
    )


@pytest.mark.usefixtures("forked_reload")
def test_an_unfinished_export_is_named_and_another_kind_removes_it(tmp_path, monkeypatch):
    model, to = begun(tmp_path, monkeypatch)
    beside = tmp_path / "other"
    app.prune(recipe(), str(model), beside, **FEW, stream="never")
    unfinished(to).rename(unfinished(beside))
    assert any(".other-streamed" in x.found and "goes on from it" in x.found for x in examine_export(beside))
    summary = app.prune(recipe(), str(model), beside, **FEW, stream="never")
    assert summary.already
    assert summary.removed == [str(unfinished(beside))]


@pytest.mark.usefixtures("forked_reload")
def test_a_large_model_is_streamed_by_itself_and_a_small_one_is_not(tmp_path, monkeypatch):
    model = saved(tmp_path / "model", "llama")
    app.prune(recipe(), str(model), tmp_path / "small", **FEW)
    assert (tmp_path / "small" / "model.safetensors").is_file()
    monkeypatch.setattr(mapped, "available_bytes", lambda device: 1 << 18)
    app.prune(recipe(), str(model), tmp_path / "large", **FEW)
    assert (tmp_path / "large" / "model-00004-of-00004.safetensors").is_file()
    said: list[str] = []
    app.prune(recipe(allocation="owl"), str(model), tmp_path / "owl", **FEW, say=said.append)
    assert (tmp_path / "owl" / "model.safetensors").is_file()
    assert any(
        "loaded whole, and not streamed: Expected shares that follow from no weights" in x for x in said
    )


def forecast(n_bytes: int, stream: str = "", streamed: Forecast | None = None) -> Forecast:
    """A forecast of so many bytes of memory, of which 100 are free."""
    held = (Holding("weights", "host", n_bytes, ("load",)),)
    subject = {"parameters": 1} | ({"stream": stream} if stream else {})
    return Forecast(subject, "cpu", held, (), {"host": 100}, streamed=streamed)


def test_what_does_not_fit_as_a_whole_is_streamed():
    small, large, streamed = forecast(90), forecast(900), forecast(50, "always")
    said: list[str] = []
    found = foretold(lambda timing: replace(large, streamed=streamed), said.append)
    assert found == streamed
    assert "the model does not fit as a whole, and is streamed" in said
    assert stream_by(found, "auto") == "always"
    found = foretold(lambda timing: replace(small, streamed=streamed), said.append)
    assert found.peak("host")[0] == 90
    assert stream_by(found, "auto") == "auto"
    assert stream_by(found, "always") == stream_by(None, "always") == "always"
    with pytest.raises(UsageError, match="Expected room for 900 B in the memory, got 100 B free"):
        foretold(lambda timing: large, said.append)
    with pytest.raises(UsageError, match="Expected room for 900 B"):
        foretold(lambda timing: replace(large, streamed=forecast(500, "always")), said.append)
    with pytest.raises(UsageError, match="Expected `--stream` out of auto, always, never, got 'sometimes'"):
        stream_by(None, "sometimes")
    assert refusal(replace(large, streamed=streamed)).endswith("It would fit with `stream: always` (50 B).")


@pytest.mark.parametrize(
    ("further", "message"),
    [
        ({"allocation": "owl"}, "Expected shares that follow from no weights, got the rule owl"),
        ({"metric": "gblm"}, "Expected a metric or a reconstruction of single layers, got gblm"),
        ({"metric": "sparsellm"}, "Expected a metric or a reconstruction of single layers, got sparsellm"),
        ({"repair": "bias"}, "Expected a repair that adds no biases, got bias"),
        (
            {"calibration": {"samples": 1, "length": 64, "choose": "loss"}},
            "Expected calibration windows chosen at random",
        ),
    ],
)
def test_recipes_that_need_more_than_a_block_are_refused(tmp_path, further, message):
    with pytest.raises(UsageError, match=message):
        app.prune(recipe(**further), "tiny", tmp_path / "to", **FEW, stream="always")
    assert not list(tmp_path.iterdir())


def test_models_that_are_not_stored_one_to_one_are_refused(tmp_path):
    model = saved(tmp_path / "model", "llama")
    tensors = load_file(model / "model.safetensors")
    renamed = {name.replace(".mlp.", ".feed_forward."): tensor for name, tensor in tensors.items()}
    save_file(renamed, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        UsageError, match=r"Expected weights stored one by one under the names of LlamaForCausalLM"
    ):
        app.prune(recipe(), str(model), tmp_path / "to", **FEW, stream="always")
    few = FEW | {"loading": {"dtype": "float32"}}
    mixture = saved(tmp_path / "mixture", "gpt_oss", torch.bfloat16)
    with pytest.raises(UsageError, match="Expected `--dtype` as the weights of a mixture are stored"):
        app.prune(recipe(), str(mixture), tmp_path / "to", **few, stream="always")
    with pytest.raises(UsageError, match="Expected `--stream` out of auto, always, never, got 'allways'"):
        app.prune(recipe(), "tiny", tmp_path / "to", **FEW, stream="allways")
    with pytest.raises(UsageError, match="Expected a recipe that zeros weights, such as wanda"):
        app.prune(stock_file(), "tiny", tmp_path / "to", **FEW, stream="always")
    with pytest.raises(NotStreamedError, match="without code of its own"):
        load_mapped("tiny", trust_remote_code=True)


def test_shapes_that_contradict_the_config_are_named(tmp_path):
    model = saved(tmp_path / "model", "llama")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))
    with pytest.raises(ModelError, match=r"of shape \(40, 32\), as the config has it, got \(48, 32\)"):
        load_mapped(str(model))


def test_a_full_disk_leaves_what_is_done_for_the_next_start(tmp_path, monkeypatch):
    model, to = saved(tmp_path / "model", "llama"), tmp_path / "pruned"
    save = streamed.save_file

    def full(tensors: dict[str, torch.Tensor], path: Path, **further: object) -> None:
        if any(name.startswith("model.layers.1.") for name in tensors):
            raise OSError(28, "No space left on device")
        save(tensors, path, **further)

    monkeypatch.setattr(streamed, "save_file", full)
    with pytest.raises(ExportError, match="No space left on device"):
        app.prune(recipe(), str(model), to, **FEW, stream="always")
    assert not to.exists()
    assert json.loads((unfinished(to) / streamed.PROGRESS).read_text())["n_blocks"] == 1


def test_the_next_block_is_read_beside_the_work_and_given_back(tmp_path):
    loaded = load_mapped(str(saved(tmp_path / "model", "llama", torch.bfloat16)))
    anatomy = loaded.dissect()
    stored = [linear.weight.data_ptr() for linear in anatomy.linears]
    for block in anatomy.blocks:
        with anatomy.hold(block):
            assert {linear.weight.dtype for linear in block.linears} == {torch.float32}
            others = [x for other in anatomy.blocks if other is not block for x in other.linears]
            assert {linear.weight.dtype for linear in others} == {torch.bfloat16}
            ahead = anatomy.hold._ahead
            assert (ahead is None) == (block is anatomy.blocks[-1])
            if ahead is not None:
                read = ahead.result()
                weights = list(anatomy.blocks[block.index + 1].module.parameters())
                assert all(torch.equal(x, p.data.float()) for x, p in zip(read, weights, strict=True))
            block.linears[0].point_to(torch.zeros_like(block.linears[0].weight))
    assert [linear.weight.data_ptr() for linear in anatomy.linears] == stored
    with anatomy.hold(anatomy.blocks[2]), pytest.raises(ZeroDivisionError), anatomy.hold(anatomy.blocks[0]):
        raise ZeroDivisionError
    assert [linear.weight.data_ptr() for linear in anatomy.linears] == stored


# --- memory ---


@pytest.mark.parametrize("metric", ["wanda", "sparsegpt"])
def test_nothing_of_a_pruned_block_is_kept(tmp_path, metric):
    context = small_context(tmp_path, n_layers=2)
    form = {"unit": "weights", "sparsity": 0.5, "metric": {"name": metric}, "calibration": CALIBRATION}
    pruning = weights_by_block(context, completed(form))
    [_, statistics] = walk_dense(context.anatomy, pruning.tokens, gram=pruning.detail == "gram")
    block = context.anatomy.blocks[1]
    pruning.prune(block, statistics)
    of_block = [*statistics.values(), *(linear.module.weight.data for linear in block.linears)]
    alive = [weakref.ref(x.untyped_storage()) for x in of_block]
    assert float((of_block[-1] == 0).float().mean()) == 0.5
    del statistics, of_block
    for linear in block.linears:
        linear.module.weight.data = torch.empty(0)
    assert [x() for x in alive] == [None] * len(alive)
