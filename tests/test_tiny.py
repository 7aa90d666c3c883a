"""The embedded model is good enough that pruning can be seen on it."""

from __future__ import annotations

from collections import Counter
from importlib.resources import files
from math import exp, log

import pytest
import torch

from secateur.evaluators.perplexity import cross_entropy
from secateur.evaluators.text import Text, load_text
from secateur.evaluators.tokens import windows
from secateur.pruners.families.discover import dissect
from secateur.pruners.loading import load_model
from secateur.pruners.methods import Method
from secateur.pruners.prune import prune

N_TOKENS = 8192
MARGIN = 1.02  # magnitude over Wanda: about 1.04 is measured


def docs(part: str, n_tokens: int, tokenizer: object) -> torch.Tensor:
    return windows(tokenizer, Text(part, "docs", load_text("docs", part)), 256, n_tokens)


@pytest.fixture(scope="module")
def perplexity() -> dict[str, float]:
    found = {}
    for name in ("dense", "random", "magnitude", "wanda"):
        loaded = load_model("tiny")
        test = docs("test", N_TOKENS, loaded.tokenizer)
        if name == "dense":
            counts = Counter(test.flatten().tolist())
            found["unigram"] = exp(-sum(n * log(n / N_TOKENS) for n in counts.values()) / N_TOKENS)
        else:
            anatomy = dissect(loaded.model)
            sparsity = dict.fromkeys((linear.name for linear in anatomy.linears), 0.5)
            calibration = docs("calibration", N_TOKENS, loaded.tokenizer)
            prune(anatomy, sparsity, Method(name), calibration, sequential=True)
        found[name] = exp(cross_entropy(loaded.model, test))
    return found


def test_it_is_much_better_than_counting_words(perplexity):
    """Against the unigram distribution of the very text that it is tested on, which no unigram model can beat."""
    assert perplexity["dense"] <= perplexity["unigram"] / 8


def test_half_of_the_weights_at_random_by_magnitude_and_by_wanda(perplexity):
    assert perplexity["random"] > 2 * perplexity["magnitude"]
    assert perplexity["magnitude"] > MARGIN * perplexity["wanda"]
    assert perplexity["wanda"] > perplexity["dense"]


def test_it_fits():
    size = sum(file.stat().st_size for file in files("secateur.pruners").joinpath("data", "tiny").iterdir())
    assert size <= 8e6
