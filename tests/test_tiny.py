"""The embedded model is good enough that pruning can be seen on it.

That magnitude loses to Wanda is no finding: see experiments/000-tiny, "The spread".
"""

from __future__ import annotations

from collections import Counter
from importlib.resources import files
from math import exp, log

import pytest
import torch

from secateur.evaluators.data.text import Text, load_text
from secateur.evaluators.data.tokens import windows
from secateur.evaluators.perplexity import cross_entropy
from secateur.pruners.calibration.stream import stream_blocks
from secateur.pruners.experts.scores import frequency
from secateur.pruners.models.discover import dissect
from secateur.pruners.models.loading import load_model
from secateur.pruners.weights.method import Method
from secateur.pruners.weights.pruner import prune

N_TOKENS = 8192
MARGIN = 1.2  # magnitude over Wanda: 1.36 is measured at 50 %, 2.1 at 70 %


def docs(part: str, n_tokens: int, tokenizer: object) -> torch.Tensor:
    return windows(tokenizer, Text(part, "docs", load_text("docs", part)), 256, n_tokens)


def perplexity(method: str, sparsity: float) -> float:
    loaded = load_model("tiny")
    anatomy = dissect(loaded.model)
    calibration = docs("calibration", N_TOKENS, loaded.tokenizer)
    allocation = dict.fromkeys((linear.name for linear in anatomy.linears), sparsity)
    prune(anatomy, allocation, Method(method), calibration, sequential=True)
    return exp(cross_entropy(loaded.model, docs("test", N_TOKENS, loaded.tokenizer)))


@pytest.fixture(scope="module")
def dense() -> float:
    loaded = load_model("tiny")
    return exp(cross_entropy(loaded.model, docs("test", N_TOKENS, loaded.tokenizer)))


def test_it_is_much_better_than_counting_words(dense):
    """Against the unigram distribution of the very text that it is tested on, which no unigram model can beat."""
    counts = Counter(docs("test", N_TOKENS, load_model("tiny").tokenizer).flatten().tolist())
    assert dense <= exp(-sum(n * log(n / N_TOKENS) for n in counts.values()) / N_TOKENS) / 8


@pytest.mark.parametrize("sparsity", [0.5, 0.7])
def test_weights_gone_at_random_by_magnitude_and_by_wanda(dense, sparsity):
    found = {name: perplexity(name, sparsity) for name in ("random", "magnitude", "wanda")}
    assert found["random"] > 2 * found["magnitude"]
    assert found["magnitude"] > MARGIN * found["wanda"]
    assert found["wanda"] > dense


def test_experts_of_the_mixture_differ_in_use(dense):
    loaded = load_model("tiny-moe")
    anatomy = dissect(loaded.model)
    tokens = docs("test", N_TOKENS, loaded.tokenizer)
    assert exp(cross_entropy(loaded.model, tokens)) < 1.1 * dense
    for part in stream_blocks(anatomy, tokens[:16], experts=True):
        assert part.experts is not None
        used = frequency(part.experts)
        assert len(used) == 8
        assert used.max() > 1.5 * used.mean()


@pytest.mark.parametrize("name", ["tiny", "tiny-moe"])
def test_it_fits(name):
    size = sum(file.stat().st_size for file in files("secateur.pruners").joinpath("data", name).iterdir())
    assert size <= 8e6
