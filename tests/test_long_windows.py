"""Long windows: no tensor of length times length, and no logits of all positions at once."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from secateur.evaluators.losses import Teacher, loss_sums
from secateur.evaluators.perplexity import cross_entropy
from secateur.pruners.calibration import stream
from secateur.pruners.calibration.stream import mean_loss, stream_blocks, stream_states
from secateur.pruners.models.discover import dissect
from secateur.pruners.models.runner import BlockRunner
from secateur.pruners.weights.method import Method
from secateur.pruners.weights.pruner import prune
from tests.models import random_tokens, small_llama


class Largest(TorchDispatchMode):
    """Mode that keeps the size of the largest tensor that an operation gave, in elements."""

    def __init__(self) -> None:
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for x in tree_leaves(found):
            if isinstance(x, torch.Tensor) and x.untyped_storage().nbytes() >= x.numel():  # no expanded view
                self.n = max(self.n, x.numel())
        return found


@pytest.mark.parametrize("length", [2048, 8192])
def test_no_work_holds_a_square_of_the_window_or_logits_of_all_positions(length):
    anatomy = dissect(small_llama(n_layers=1, max_position_embeddings=length))
    tokens = random_tokens(1, length)
    with torch.no_grad(), Largest() as largest:
        runner = BlockRunner(anatomy)
        inputs = runner.start(tokens)
        hidden = runner.run(inputs)
        teacher = Teacher(anatomy, lambda: hidden, keep=False)
        assert loss_sums(anatomy, hidden, tokens, teacher).means()["kl"] < 1e-5
        for _ in stream_blocks(anatomy, tokens, inputs="gram"):
            pass
        prune(anatomy, {x.name: 0.5 for x in anatomy.linears}, Method("sparsegpt"), tokens, sequential=True)
        *_, last = stream_states(anatomy, tokens)
    widest = length * 48  # between up and down
    assert widest <= largest.n < min(length * 97, length * length)
    with torch.no_grad(), Largest() as of_loss:
        mean_loss(anatomy, last, tokens)
    assert of_loss.n <= max(length * 32, stream.BATCH_TOKENS * 97)


def test_the_mode_sees_a_square():
    q = torch.randn(1, 2, 64, 8)
    with Largest() as largest:
        F.scaled_dot_product_attention(q, q, q, attn_mask=torch.ones(64, 64, dtype=torch.bool).tril())
    assert largest.n >= 64 * 64


def test_losses_of_long_windows_are_those_of_all_positions_at_once(monkeypatch):
    anatomy = dissect(small_llama())
    tokens = random_tokens(3, 40)
    *_, last = stream_states(anatomy, tokens)
    with torch.no_grad():
        logits = anatomy.model(tokens, use_cache=False).logits
    wanted = float(F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()))
    whole = mean_loss(anatomy, last, tokens), cross_entropy(anatomy.model, tokens)
    monkeypatch.setattr(stream, "BATCH_TOKENS", 16)
    monkeypatch.setattr("secateur.evaluators.perplexity.FP32_TOKENS", 16)
    parts = mean_loss(anatomy, last, tokens), cross_entropy(anatomy.model, tokens)
    for found in (*whole, *parts):
        assert math.isclose(found, wanted, rel_tol=1e-5)
