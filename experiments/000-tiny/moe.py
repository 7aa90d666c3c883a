"""Make the mixture `tiny-moe` from `tiny`: its MLPs become experts, and all of it is trained on the same text.

    python moe.py CORPUS.jsonl WORK_DIR MODEL_DIR

Upcycling (Komatsuzaki et al., arXiv 2212.05055) with narrower experts (He et al., arXiv 2410.07524): the channels of
each MLP are dealt out at random to as many experts as their width allows, several times over, so that each channel
begins in as many experts; the router begins at random. The weights of the experts' outputs are scaled such that the
mixture begins as the mean of random halves of the MLP. Then router, experts and the rest are trained with
the load-balancing loss of Mixtral's class. WORK_DIR keeps the tokens; MODEL_DIR gets the model in float16.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from tokenizers import Tokenizer
from torch import Tensor, nn
from train import batches, encode
from transformers import AutoTokenizer, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

TINY = Path(__file__).parents[2] / "pruners" / "data" / "tiny"
SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "max_position_embeddings",
    "rope_parameters",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


@torch.no_grad()
def upcycle(dense: LlamaForCausalLM, mixture: dict[str, Any], seed: int) -> MixtralForCausalLM:
    """The mixture before training."""
    torch.manual_seed(seed)
    model = MixtralForCausalLM(
        MixtralConfig(**{name: getattr(dense.config, name) for name in SIZES}, **mixture, sliding_window=None)
    )
    weights = dict(dense.named_parameters())
    for name, parameter in model.named_parameters():
        if name in weights:
            parameter.copy_(weights[name])
    width, n_experts = mixture["intermediate_size"], mixture["num_local_experts"]
    for block, old in zip(model.model.layers, dense.model.layers, strict=True):
        n_channels = old.mlp.up_proj.out_features
        n_parts = n_channels // width
        for expert in range(n_experts):
            if expert % n_parts == 0:
                order = torch.randperm(n_channels)
            channels = order[expert % n_parts * width :][:width]
            gate, up = old.mlp.gate_proj.weight[channels], old.mlp.up_proj.weight[channels]
            block.mlp.experts.gate_up_proj[expert] = torch.cat([gate, up])
            block.mlp.experts.down_proj[expert] = n_parts * old.mlp.down_proj.weight[:, channels]
    return model


def train(model: MixtralForCausalLM, settings: dict[str, Any], work: Path) -> None:
    """Train all parameters; the windows are drawn as for `tiny`."""
    config, first = settings["training"], 0
    router = [p for n, p in model.named_parameters() if n.endswith("mlp.gate.weight")]
    others = [p for p in model.parameters() if all(p is not q for q in router)]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in others if p.ndim == 1], "lr": config["lr"], "weight_decay": 0.0},
            {"params": [p for p in others if p.ndim > 1], "lr": config["lr"]},
            {"params": router, "lr": config["router_lr"], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
        weight_decay=config["weight_decay"],
    )
    peaks = [group["lr"] for group in optimizer.param_groups]
    start, mean = time.monotonic(), 0.0
    for number, phase in enumerate(config["phases"]):
        for step, ids in enumerate(batches(work, phase, settings["seed"] + number), start=first + 1):
            output = model(input_ids=ids[:, :-1], use_cache=False, output_router_logits=True)
            loss = nn.functional.cross_entropy(output.logits.flatten(0, 1), ids[:, 1:].flatten())
            (loss + model.config.router_aux_loss_coef * output.aux_loss).backward()
            nn.utils.clip_grad_norm_(model.parameters(), config["clip_norm"])
            rate = float(np.interp(step, *zip(*config["rate"], strict=True)))
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * rate
            optimizer.step()
            optimizer.zero_grad()
            mean = 0.95 * mean + 0.05 * loss.item() if mean else loss.item()
            if step % 20 == 0:
                use = usage(output.router_logits, model.config.num_experts_per_tok)
                row = {"step": step, "loss_nats": round(mean, 4), "use": [round(x, 2) for x in use]}
                print(json.dumps(row | {"seconds": round(time.monotonic() - start)}), flush=True)
        first += phase["steps"]
        model.save_pretrained(work / f"step-{first}")


def usage(router_logits: tuple[Tensor, ...], top_k: int) -> list[float]:
    """Most used expert of each block: its share of the tokens over the mean share."""
    found = []
    for logits in router_logits:
        counts = torch.bincount(logits.topk(top_k).indices.flatten(), minlength=logits.shape[-1]).double()
        found.append(float(counts.max() / counts.mean()))
    return found


def main() -> None:
    """Tokens (unless there already), upcycling, training, export."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("corpus", "work", "model"):
        parser.add_argument(name, type=Path)
    arguments = parser.parse_args()
    settings = yaml.safe_load(Path(__file__).with_name("moe.yaml").read_text())
    work: Path = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "other.npy").exists():
        encode(arguments.corpus, work, Tokenizer.from_file(str(TINY / "tokenizer.json")), settings["seed"])
    dense = LlamaForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    model = upcycle(dense, settings["mixture"], settings["seed"])
    train(model, settings, work)
    model.half().save_pretrained(arguments.model)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(arguments.model)


if __name__ == "__main__":
    main()
