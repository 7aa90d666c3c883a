"""A small model of each family, built into a structure store."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import transformers as tf

from secateur.pruners.calibration.pass_kinds import PASS_KINDS
from secateur.pruners.calibration.zeroth_order import estimate_gradients
from secateur.pruners.depth.merge_targets import Fitting, runs_of
from secateur.pruners.models.anatomy import Anatomy
from secateur.pruners.models.discover import dissect
from secateur.pruners.structure.bonsai import perturbation_scores, round_scores
from secateur.pruners.structure.method import StructureMethod
from secateur.pruners.structure.store import StructureKey, StructureStore, build_structure
from secateur.spaces.architecture.candidate import Kept
from secateur.spaces.methods import CUT_REPAIRS, DEPTH_REPAIRS

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = SIZES | {"num_key_value_heads": 2}
ENDS = {"vocab_size": 97, "bos_token_id": 1, "eos_token_id": 2}
OPT = ENDS | {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS = {
    "llama": tf.LlamaConfig(**GROUPED, tie_word_embeddings=True),
    "llama-biased": tf.LlamaConfig(**GROUPED, attention_bias=True, mlp_bias=True),
    "mistral": tf.MistralConfig(**GROUPED, sliding_window=3),
    "qwen2": tf.Qwen2Config(**GROUPED),
    "qwen3": tf.Qwen3Config(**GROUPED, head_dim=16),
    "gemma2": tf.Gemma2Config(**GROUPED, head_dim=12, sliding_window=3),
    "phi3": tf.Phi3Config(**GROUPED),
    "opt": tf.OPTConfig(**OPT, word_embed_proj_dim=32),
    "opt-post-norm": tf.OPTConfig(**OPT, word_embed_proj_dim=16, do_layer_norm_before=False),
    "gpt2": tf.GPT2Config(**ENDS, n_embd=32, n_layer=2, n_head=4, n_inner=48),
    "gpt_neox": tf.GPTNeoXConfig(**SIZES),
    "gpt_neox-serial": tf.GPTNeoXConfig(**SIZES, use_parallel_residual=False),
}
GROUPS, CHANNELS = (1,), (10, 20)
KEPT = Kept(1, 20)
REPAIR_NAMES = tuple(CUT_REPAIRS)


def build(config):
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(deepcopy(config)).eval().requires_grad_(False)
    for parameter in model.parameters():  # also norms and biases, which start as ones and zeros
        parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def random_tokens(n_windows=6, length=12, seed=3):
    return torch.randint(97, (n_windows, length), generator=torch.Generator().manual_seed(seed))


TOKENS = random_tokens()


def key(importance="wanda_sp", repairs=REPAIR_NAMES, dampening=0.01, **changes):
    return StructureKey(
        **{
            "model": "m",
            "dtype": "float32",
            "calibration": "c",
            "method": StructureMethod(importance, repairs, dampening),
            "kv_groups": GROUPS,
            "ffn": CHANNELS,
            **changes,
        }
    )


def take_few_passes(monkeypatch):
    """Kinds that are collected by forward passes: fewer of them, for tests that only need some numbers."""
    few = {
        "forward": partial(estimate_gradients, n_draws=2),
        "perturbed": partial(perturbation_scores, n_pairs=2),
        "perturbed_round": partial(round_scores, n_pairs=2),
    }
    for kind, collect in few.items():
        monkeypatch.setitem(PASS_KINDS, kind, replace(PASS_KINDS[kind], collect=collect))


def repaired_blocks(anatomy, dropped, repair, tokens, fitting=None):
    """New parameters of the merge targets of dropped blocks, by the index of the block."""
    runs = runs_of(dropped, len(anatomy.blocks))
    return DEPTH_REPAIRS[repair].function(anatomy, runs, tokens, fitting or Fitting())


def logits(model, tokens=TOKENS):
    with torch.no_grad():
        return model(tokens, use_cache=False).logits


def close(one, other):
    return torch.allclose(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()) + 1e-6)


@dataclass(frozen=True)
class Case:
    """A model, dense between tests, with its store, which cuts it."""

    anatomy: Anatomy
    store: StructureStore
    surgeon: StructureStore
    dense: torch.Tensor
    directory: Path

    @property
    def model(self):
        return self.anatomy.model


def make_case(name, directory):
    anatomy = dissect(build(CONFIGS[name]))
    build_structure(directory, anatomy, TOKENS, key())
    store = StructureStore(directory, anatomy)
    return Case(anatomy, store, store, logits(anatomy.model), directory)
