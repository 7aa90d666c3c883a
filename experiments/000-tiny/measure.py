"""Measure whether pruning shows on a model: perplexity dense and with 50, 60 and 70 % of the weights gone, on `docs`.

    python measure.py MODEL_DIR WORK_DIR RESULTS.jsonl [--seeds N]

The text is CPython's language reference (`pydoc_data.topics`). Every fifth topic calibrates Wanda, the others
are measured, in windows of 256 tokens without overlap. WORK_DIR holds the training tokens that train.py
saved. One JSON object a line is appended to RESULTS, with the model directory's name. N seeds of random pruning.
"""

import argparse
import hashlib
import json
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

WINDOW = 256
SPARSITIES = (0.5, 0.6, 0.7)


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


def keep_top(scores: Tensor, sparsity: float) -> Tensor:
    """True for the highest 1 - sparsity of the entries of each row."""
    kept = scores.topk(round(scores.shape[1] * (1 - sparsity)), dim=1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, kept, True)


def masks(
    method: str, linears: list[nn.Linear], norms: list[Tensor], sparsity: float, seed: int
) -> Iterator[Tensor]:
    """One keep-mask per layer: `random` and `magnitude` rank the whole matrix, `wanda` each output row."""
    generator = torch.Generator().manual_seed(seed)
    for layer, norm in zip(linears, norms, strict=True):
        weight = layer.weight.detach()
        if method == "wanda":
            yield keep_top(weight.abs() * norm, sparsity)
        else:
            scores = weight.abs() if method == "magnitude" else torch.rand(weight.shape, generator=generator)
            yield keep_top(scores.view(1, -1), sparsity).view_as(weight)


@torch.no_grad()
def pruned_perplexity(
    model: PreTrainedModel,
    method: str,
    norms: list[Tensor],
    windows: Tensor,
    sparsity: float = 0.5,
    seed: int = 0,
) -> float:
    """Perplexity with that share of every block linear's weights set to zero; the weights are put back."""
    linears = block_linears(model)
    dense = [layer.weight.clone() for layer in linears]
    for layer, mask in zip(linears, masks(method, linears, norms, sparsity, seed), strict=True):
        layer.weight.mul_(mask)
    measured = perplexity(model, windows)
    for layer, weight in zip(linears, dense, strict=True):
        layer.weight.copy_(weight)
    return measured


def measure(model_dir: Path, work: Path, n_seeds: int) -> Iterator[dict[str, str | float]]:
    """One row a perplexity."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    calibration, test, test_hash = docs(tokenizer)
    tokens = [np.load(work / f"{name}.npy").astype(np.int64) for name in ("python", "other")]
    vocab_size = model.config.vocab_size
    common = {
        "model": model_dir.resolve().name,
        "window": WINDOW,
        "n_test_tokens": test.numel(),
        "test_sha256": test_hash,
        "n_calibration_tokens": calibration.numel(),
        "sparsity": 0.0,
    }
    for text, counted in (("training", torch.from_numpy(np.concatenate(tokens))), ("test", test)):
        ppl = unigram_perplexity(counted, test, vocab_size)
        yield common | {"what": f"unigram, counted on the {text} text", "ppl": ppl}
    yield common | {"what": "dense", "ppl": perplexity(model, test)}
    norms = input_norms(model, calibration)
    for sparsity in SPARSITIES:
        row = common | {"sparsity": sparsity}
        for method in ("wanda", "magnitude"):
            ppl = pruned_perplexity(model, method, norms, test, sparsity)
            yield row | {"what": method, "ppl": ppl}
        for seed in range(n_seeds):
            ppl = pruned_perplexity(model, "random", norms, test, sparsity, seed)
            yield row | {"what": "random", "seed": seed, "ppl": ppl}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "work", "results"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    with arguments.results.open("a", encoding="utf-8") as file:
        for row in measure(arguments.model, arguments.work, arguments.seeds):
            print(json.dumps(row), file=file, flush=True)
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
