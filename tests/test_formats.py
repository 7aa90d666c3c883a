"""Structured models on the disk: really smaller, loaded again by others, and the same."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from secateur.pruners.export import heterogeneous, hf
from secateur.pruners.export.export import check_structured, export_structured, ranges
from secateur.pruners.export.export_check import ExportError
from secateur.pruners.export.manifest import MANIFEST, Manifest, same_export
from secateur.pruners.export.registry import FORMATS, check_format
from secateur.pruners.models.checkpoints.quiet import quiet
from secateur.pruners.models.discover import dissect
from secateur.pruners.models.families import FAMILIES
from secateur.pruners.models.shape import block_shapes
from secateur.spaces.architecture.candidate import Kept
from secateur.spaces.architecture.cost import cost
from secateur.spaces.shape import ModelShape
from tests.cut_models import DROPPED, MIXED, MODELS, TOKENS, cut, manifest, save, small_tokenizer


@pytest.fixture
def in_process(in_process, monkeypatch, tmp_path):
    """Likewise with code that comes with models."""
    keep_modules_in(tmp_path / "modules", monkeypatch)


def keep_modules_in(directory, monkeypatch):
    """Code that comes with models is copied here, not into the user's cache."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(directory))
    monkeypatch.syspath_prepend(str(directory))


def config_of(report):
    return json.loads((report.directory / "config.json").read_text())


# transformers ---------------------------------------------------------------------------------------------


def test_blocks_of_different_shapes_load_in_a_fresh_process(tmp_path):
    anatomy, units = cut("llama", MIXED)
    before = {name: (p.data_ptr(), p.clone()) for name, p in anatomy.model.named_parameters()}
    to, asked = tmp_path / "new" / "out", manifest(MIXED)
    report = export_structured(anatomy, small_tokenizer(), MIXED, asked, to, check_tokens=TOKENS, units=units)
    for name, parameter in anatomy.model.named_parameters():  # the live model is what it was
        assert parameter.data_ptr() == before[name][0]
        assert torch.equal(parameter, before[name][1])

    assert report.comparison.loaded_as == "SecateurLlamaForCausalLM"
    assert report.comparison.trust_remote_code
    assert report.comparison.logit_error <= 1e-5
    assert report.comparison.greedy_gap <= 1e-5
    files = {path.name for path in to.iterdir()}
    assert files >= {
        "config.json",
        "model.safetensors",
        "modeling_secateur_llama.py",
        "tokenizer.json",
        MANIFEST,
    }
    assert [path.name for path in to.parent.iterdir()] == ["out"]
    assert {path.stat().st_mode & 0o666 for path in to.iterdir()} == {to.stat().st_mode & 0o666}
    config = config_of(report)
    assert config["model_type"] == "secateur_llama"  # under `llama` it would load, with random layers
    assert config["per_layer_config"]["1"]["skip"] == ["attention"]
    assert config["per_layer_config"]["2"]["skip"] == ["mlp"]

    written = Manifest.from_json((to / MANIFEST).read_text())
    assert written == report.manifest
    assert same_export(to, asked)
    assert not same_export(to, manifest(DROPPED))
    n_saved = sum(weight.numel() for weight in load_file(to / "model.safetensors").values())
    assert written.parameters["saved"] == n_saved < written.parameters["parent"]
    assert n_saved * 4 < written.size_bytes < n_saved * 4 + 10_000
    assert written.indices["model.layers.3"] == {
        "kv_groups": ranges(units[3].kv_groups),
        "ffn": ranges(units[3].channels),
    }
    assert written.shapes["model.layers.3"] == {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 17,
    }
    share = f"{n_saved / written.parameters['parent']:.1%}"
    assert written.label.startswith(f"structured: {share}")
    card = (to / "README.md").read_text()
    for part in (share, "trust_remote_code=True", "1 lose their attention and 1 their MLP", "0.25"):
        assert part in card


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("family", [name for name in MODELS if name != "llama"])
def test_families_with_blocks_of_different_shapes(family, tmp_path):
    anatomy = dissect(MODELS[family]())
    kept = [Kept(x.kv_groups * anatomy.blocks[0].n_kv_heads // 4, x.ffn) for x in MIXED]
    _, report = save(family, kept, tmp_path / "out")
    assert report.comparison.loaded_as.startswith("Secateur")
    assert report.comparison.logit_error <= 1e-5
    assert report.comparison.greedy_gap <= 1e-5


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("family", ["qwen3", "gemma2", "opt", "gpt2", "gpt_neox"])
def test_whole_blocks_dropped_leave_a_stock_model(family, tmp_path):
    # Half of the channels everywhere, and half of the heads where the class takes their width from the config.
    groups = {"gpt2": 4, "opt": 8, "gpt_neox": 8}.get(family, 2)
    kept = tuple(Kept(groups, block.ffn) if block.ffn else block for block in DROPPED)
    anatomy, report = save(family, kept, tmp_path / "out")
    assert report.comparison.loaded_as == type(anatomy.model).__name__
    assert not report.comparison.trust_remote_code
    assert config_of(report)["model_type"] == family
    assert not list(report.directory.glob("*.py"))
    assert report.comparison.logit_error <= 1e-5
    with quiet():
        loaded = AutoModelForCausalLM.from_pretrained(report.directory)
    assert loaded.config.num_hidden_layers == 3
    assert sum(p.numel() for p in loaded.parameters()) == report.manifest.parameters["saved"]


@pytest.mark.usefixtures("in_process")
def test_a_shape_that_the_stock_config_refuses_gets_code(tmp_path):
    kept = (Kept(3, 24),) * 4  # 6 heads: no divisor of the width 32
    _, report = save("llama", kept, tmp_path / "out")
    assert report.comparison.loaded_as == "SecateurLlamaForCausalLM"
    with pytest.raises(
        ValueError, match=r"a stock class of llama can hold.*not a multiple.*Use the format hf"
    ):
        save("llama", kept, tmp_path / "stock", form="hf-stock")
    assert not (tmp_path / "stock").exists()


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(
    ("family", "loaded_as"), [("llama", "LlamaForCausalLM"), ("mistral", "SecateurMistralForCausalLM")]
)
def test_biases_that_a_repair_added_are_saved(family, loaded_as, tmp_path):
    _, report = save(family, (Kept(2, 24),) * 4, tmp_path / "out", repair="bias")
    assert report.comparison.loaded_as == loaded_as
    assert report.comparison.logit_error <= 1e-5


@pytest.mark.usefixtures("in_process")
def test_a_search_counts_the_biases_that_are_saved(tmp_path):
    shapes = block_shapes(dissect(MODELS["llama"]()), 20, 4)
    _, report = save("llama", MIXED, tmp_path / "out", repair="liar")
    parent, saved = report.manifest.parameters["parent"], report.manifest.parameters["saved"]
    shape = ModelShape(parent, 4, macs_per_token=1, kv_bytes_per_token=1, blocks=shapes)
    costs = cost(shape, MIXED, "liar")
    assert (costs["params"], costs["size_bytes"]) == (saved, 4 * saved)
    added = saved - cost(shape, MIXED)["params"]
    assert added == 4 * 32  # four projections of width 32 lost a part of their inputs


@pytest.mark.usefixtures("in_process")
def test_a_lossy_dtype_is_checked_by_its_rounding(tmp_path):
    _, report = save("llama", MIXED, tmp_path / "out", dtype=torch.bfloat16)
    assert 1e-4 < report.comparison.logit_error <= report.comparison.logit_tolerance == 5e-2
    assert config_of(report)["dtype"] == report.manifest.dtype == "bfloat16"
    saved = load_file(report.directory / "model.safetensors")
    assert {weight.dtype for weight in saved.values()} == {torch.bfloat16}


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("family", ["phi3", "gpt_neox"])  # their projections are fused differently
def test_padded_models_have_the_parents_shapes(family, tmp_path):
    kept = MIXED if family != "gpt_neox" else tuple(Kept(2 * x.kv_groups, x.ffn) for x in MIXED)
    anatomy, report = save(family, kept, tmp_path / "out", form="hf-padded")
    assert report.comparison.loaded_as == type(anatomy.model).__name__
    assert report.comparison.logit_error <= 1e-5
    assert report.manifest.parameters["saved"] == report.manifest.parameters["parent"]
    assert "no size or speed gain" in report.manifest.label


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize("family", ["phi3", "gemma2"])
def test_saved_models_generate_train_and_save_again(family, tmp_path):
    anatomy, report = save(family, MIXED, tmp_path / "out")
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(report.directory, trust_remote_code=True)
        mask = torch.ones_like(TOKENS)
        mask[1, :5] = 0
        settings = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "eos_token_id": -1}
        plain = model.generate(TOKENS, **settings, use_cache=False)
        assert torch.equal(model.generate(TOKENS, **settings), plain)
        static = {"cache_implementation": "static", "disable_compile": True}
        assert torch.equal(model.generate(TOKENS, **settings, **static), plain)
        wanted = anatomy.model(TOKENS).logits
        model.set_attn_implementation("eager")
        assert {x.config._attn_implementation for x in model.modules() if hasattr(x, "config")} == {"eager"}
        torch.testing.assert_close(model(TOKENS).logits, wanted, rtol=1e-4, atol=1e-4)

        model.save_pretrained(tmp_path / "again")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    torch.testing.assert_close(again(TOKENS).logits, wanted, rtol=1e-4, atol=1e-4)
    anatomy = dissect(again)  # a smaller model is one that can be measured and pruned further
    assert [(block.n_kv_heads, block.ffn_width) for block in anatomy.blocks] == [
        (block.kv_groups, block.ffn) for block in MIXED
    ]
    again.train()
    again(TOKENS, labels=TOKENS).loss.backward()
    assert all(parameter.grad is not None for parameter in again.parameters())


@pytest.mark.usefixtures("in_process")
@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ("torch.zeros_like(tensors[0])", "tensors[0]"),  # then a removed attention gives its inputs
        ("resize(blocks[index].get_submodule(name), *shape)", "pass"),
    ],
    ids=["attention", "shapes"],
)
def test_code_that_builds_another_model_is_caught(good, bad, tmp_path, monkeypatch):
    make = heterogeneous.heterogeneous_model

    def wrong(model, parent):
        content, weights, code = make(model, parent)
        assert all(good in text for text in code.values())
        return content, weights, {name: text.replace(good, bad) for name, text in code.items()}

    monkeypatch.setattr(hf.heterogeneous, "heterogeneous_model", wrong)
    with pytest.raises(ExportError, match="Expected"):
        save("llama", MIXED, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["modules"]


# which ----------------------------------------------------------------------------------------------------


def test_formats_name_what_they_can_carry():
    for family in FAMILIES:
        for name in ("hf-stock", "hf-padded", "any"):
            check_format(family, name)
    for family in ("llama", "mistral"):
        for name in FORMATS:
            check_format(family, name)
    with pytest.raises(
        ValueError, match=r"gguf can carry \(llama, mistral\), got 'gemma2'.*among hf, hf-stock"
    ):
        check_format("gemma2", "gguf")
    check_format("gpt2", "hf")
    with pytest.raises(ValueError, match="got 'onnx'"):
        check_format("llama", "onnx")


@pytest.mark.parametrize(
    ("family", "kept", "form", "message"),
    [
        ("llama", MIXED, "hf", None),
        ("llama", DROPPED, "hf-stock", None),
        ("llama", (Kept(3, 48),) * 4, "hf-stock", "not a multiple"),
        ("gemma2", MIXED, "hf-stock", "don't have one shape"),
        ("gpt2", (Kept(4, 20), Kept(0, 0), Kept(4, 20), Kept(4, 20)), "hf", None),
        ("gpt2", (Kept(2, 48),) * 4, "hf", None),
        ("gpt2", (Kept(2, 48),) * 4, "hf-stock", "another shape of .*c_attn"),
        ("gpt_neox", tuple(Kept(2 * x.kv_groups, x.ffn) for x in MIXED), "hf-padded", None),
        ("mistral", MIXED, "gguf", None),
        ("qwen3", MIXED, "gguf", "a family for gguf"),
    ],
)
def test_what_a_format_cannot_carry_is_seen_before_the_model_is_cut(family, kept, form, message):
    anatomy = dissect(MODELS[family]())
    before = {name: p.shape for name, p in anatomy.model.named_parameters()}
    if message is None:
        check_structured(anatomy, small_tokenizer(), kept, form)
    else:
        with pytest.raises(ValueError, match=message):
            check_structured(anatomy, small_tokenizer(), kept, form)
    assert {name: p.shape for name, p in anatomy.model.named_parameters()} == before


@pytest.mark.parametrize(
    ("numbers", "text"), [((), ""), ((3,), "3"), ((0, 1, 2, 7, 5, 6), "0-2,7,5-6"), ((2, 1, 0), "2,1,0")]
)
def test_ranges(numbers, text):
    assert ranges(numbers) == text
