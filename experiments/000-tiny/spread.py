"""Spread the scales of a Llama's channels without changing what it computes.

    python spread.py MODEL_DIR OUT_DIR SIGMA SEED

writes the spread model in float32 and prints the largest difference of its logits on random tokens.
"""

import sys

import torch
from torch import Generator, Tensor
from transformers import AutoTokenizer, LlamaForCausalLM


def log_normal(n: int, sigma: float, generator: Generator) -> Tensor:
    """`n` factors with median 1 whose logarithms have the standard deviation `sigma`, at most 3 of them off."""
    return (sigma * torch.randn(n, generator=generator).clamp(-3, 3)).exp()


@torch.no_grad()
def spread_scales(model: LlamaForCausalLM, sigma: float, generator: Generator) -> None:
    """Multiply each channel between two linear maps of a block by a log-normal factor, and divide it out again.

    Four kinds of channels: a norm's gain and the columns that read it (q, k, v; gate, up), the rows of v and the
    columns of o (every query head of a group reads the same v), the rows of up and the columns of down. In exact
    arithmetic the model's function stays the same. So do Wanda's masks, which compare |weight| x input norm within
    one output (Sun et al. 2023, https://arxiv.org/abs/2306.11695, eq. 1): a column's factor cancels against its
    input's norm, and a row's factor is common to all that is compared. Masks by magnitude alone change.
    """
    config = model.config
    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        for norm, readers in (
            (block.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (block.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            factors = log_normal(config.hidden_size, sigma, generator)
            norm.weight *= factors
            for reader in readers:
                reader.weight /= factors
        n_kv, width = config.num_key_value_heads, config.head_dim
        factors = log_normal(n_kv * width, sigma, generator)
        attention.v_proj.weight *= factors[:, None]
        heads = factors.view(n_kv, width).repeat_interleave(config.num_attention_heads // n_kv, dim=0)
        attention.o_proj.weight /= heads.flatten()
        factors = log_normal(config.intermediate_size, sigma, generator)
        mlp.up_proj.weight *= factors[:, None]
        mlp.down_proj.weight /= factors


@torch.no_grad()
def main(model_dir: str, out_dir: str, sigma: str, seed: str) -> None:
    model = LlamaForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    ids = torch.randint(model.config.vocab_size, (8, 256), generator=torch.Generator().manual_seed(0))
    before = model(input_ids=ids, use_cache=False).logits
    spread_scales(model, float(sigma), torch.Generator().manual_seed(int(seed)))
    after = model(input_ids=ids, use_cache=False).logits
    print(f"largest logit {before.abs().max():.3g}, largest difference {(after - before).abs().max():.2g}")
    model.save_pretrained(out_dir)
    AutoTokenizer.from_pretrained(model_dir).save_pretrained(out_dir)


if __name__ == "__main__":
    main(*sys.argv[1:])
