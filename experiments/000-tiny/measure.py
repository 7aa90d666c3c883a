"""Measure whether pruning shows on a model: perplexity dense and with half of the weights gone, on `docs`.

    python measure.py MODEL_DIR WORK_DIR RESULTS.jsonl

The text is CPython's language reference (`pydoc_data.topics`). Every fifth topic calibrates Wanda, the others
are measured, in windows of 256 tokens without overlap. WORK_DIR holds the training tokens that train.py
saved. RESULTS gets one JSON object a line.
"""

import hashlib
import json
import math
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

WINDOW = 256
SPARSITY = 0.5
SEEDS = (0, 1, 2)


def docs(tokenizer: PreTrainedTokenizerFast) -> tuple[Tensor, Tensor, str]:
    """Calibration windows, test windows, each (n, WINDOW) token ids, and the hash of the test tokens."""
    sets: tuple[list[int], list[int]] = ([], [])
    for i, name in enumerate(sorted(topics)):
        sets[i % 5 != 0].extend([*tokenizer(topics[name])["input_ids"], tokenizer.eos_token_id])
    calibration, test = (torch.tensor(ids[: len(ids) // WINDOW * WINDOW]).view(-1, WINDOW) for ids in sets)
    return calibration, test, hashlib.sha256(test.numpy().tobytes()).hexdigest()[:12]


@torch.no_grad()
def perplexity(model: PreTrainedModel, windows: Tensor) -> float:
    """Exponential of the mean negative log-likelihood of every token but each window's first."""
    total = 0.0
    for ids in windows.split(16):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        total += nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum"
        ).item()
    return math.exp(total / (windows.shape[0] * (WINDOW - 1)))


def unigram_perplexity(counted: Tensor, windows: Tensor, vocab_size: int) -> float:
    """Perplexity of the same predicted tokens under frequencies counted in `counted`, add-one smoothed."""
    counts = torch.bincount(counted.flatten(), minlength=vocab_size).double() + 1
    nll_nats = -(counts / counts.sum()).log()
    return math.exp(nll_nats[windows[:, 1:].flatten()].mean().item())


def block_linears(model: PreTrainedModel) -> list[nn.Linear]:
    """Every linear layer of the blocks; neither embedding nor head."""
    return [m for m in model.model.layers.modules() if isinstance(m, nn.Linear)]


@torch.no_grad()
def input_norms(model: PreTrainedModel, windows: Tensor) -> list[Tensor]:
    """l2 norm of each input feature of each linear layer over the calibration tokens of the dense model."""
    linears = block_linears(model)
    squares = [torch.zeros(layer.in_features) for layer in linears]

    def add_squares(total: Tensor, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        total += inputs[0].flatten(0, 1).square().sum(0)

    hooks = [
        layer.register_forward_pre_hook(partial(add_squares, total))
        for layer, total in zip(linears, squares, strict=True)
    ]
    for ids in windows.split(16):
        model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return [total.sqrt() for total in squares]


def keep_top(scores: Tensor) -> Tensor:
    """True for the highest 1 - SPARSITY of the entries of each row."""
    kept = scores.topk(round(scores.shape[1] * (1 - SPARSITY)), dim=1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, kept, True)


def masks(method: str, linears: list[nn.Linear], norms: list[Tensor], seed: int) -> Iterator[Tensor]:
    """One keep-mask per layer: `random` and `magnitude` rank the whole matrix, `wanda` each output row."""
    generator = torch.Generator().manual_seed(seed)
    for layer, norm in zip(linears, norms, strict=True):
        weight = layer.weight.detach()
        if method == "wanda":
            yield keep_top(weight.abs() * norm)
        else:
            scores = weight.abs() if method == "magnitude" else torch.rand(weight.shape, generator=generator)
            yield keep_top(scores.view(1, -1)).view_as(weight)


@torch.no_grad()
def pruned_perplexity(
    model: PreTrainedModel, method: str, norms: list[Tensor], windows: Tensor, seed: int = 0
) -> float:
    """Perplexity with SPARSITY of every block linear's weights set to zero; the weights are put back."""
    linears = block_linears(model)
    dense = [layer.weight.clone() for layer in linears]
    for layer, mask in zip(linears, masks(method, linears, norms, seed), strict=True):
        layer.weight.mul_(mask)
    measured = perplexity(model, windows)
    for layer, weight in zip(linears, dense, strict=True):
        layer.weight.copy_(weight)
    return measured


def main(model_dir: str, work: str, results: str) -> None:
    """Measure and write."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    calibration, test, test_hash = docs(tokenizer)
    counted = torch.cat(
        [
            torch.from_numpy(np.load(Path(work) / f"{name}.npy").astype(np.int64))
            for name in ("python", "other")
        ]
    )
    norms = input_norms(model, calibration)
    common = {
        "window": WINDOW,
        "n_test_tokens": test.numel(),
        "test_sha256": test_hash,
        "n_calibration_tokens": calibration.numel(),
        "sparsity": SPARSITY,
    }
    rows = [
        {
            "what": "unigram, counted on the training text",
            "sparsity": 0.0,
            "ppl": unigram_perplexity(counted, test, model.config.vocab_size),
        },
        {
            "what": "unigram, counted on the test text",
            "sparsity": 0.0,
            "ppl": unigram_perplexity(test, test, model.config.vocab_size),
        },
        {"what": "dense", "sparsity": 0.0, "ppl": perplexity(model, test)},
        *(
            {"what": "random", "seed": s, "ppl": pruned_perplexity(model, "random", norms, test, s)}
            for s in SEEDS
        ),
        *(
            {"what": method, "ppl": pruned_perplexity(model, method, norms, test)}
            for method in ("magnitude", "wanda")
        ),
    ]
    with Path(results).open("w", encoding="utf-8") as file:
        for row in rows:
            line = json.dumps(common | row)
            file.write(line + "\n")
            print(line)


if __name__ == "__main__":
    main(*sys.argv[1:])
