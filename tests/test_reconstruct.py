"""Recovery block after block: its loss against a slow reference, its places, and what it trains."""

from __future__ import annotations

import pytest
import torch

from secateur.evaluators.data.windows import losses_on, teacher_batches
from secateur.evaluators.training.reconstruct import Place, block_loss
from secateur.evaluators.training.settings import Training
from secateur.evaluators.training.trainer import Trainer
from secateur.pruners.weights.method import Method
from secateur.pruners.weights.pruner import prune
from tests.models import count_zeros, random_tokens, small_anatomy

TRAIN = random_tokens(12, 16, seed=1)


def pruned():
    anatomy = small_anatomy()
    prune(anatomy, {x.name: 0.6 for x in anatomy.linears}, Method("magnitude"), TRAIN, sequential=False)
    return anatomy


def training(**changes):
    return Training(
        **{
            "method": "perp",
            "loss": "reconstruct",
            "tokens": 24 * 32,
            "batch": 2,
            "rank": 4,
            "lr": 1e-2,
            **changes,
        }
    )


def test_the_loss_equals_a_slow_reference():
    anatomy, dense = pruned(), small_anatomy()
    for index in range(2):
        hidden = anatomy.model(TRAIN[:3], output_hidden_states=True).hidden_states
        kwargs = {"position_embeddings": anatomy.model.model.rotary_emb(hidden[0], torch.arange(16)[None])}
        mask = torch.full((16, 16), -torch.inf).triu(1)[None, None]
        one, other = (
            x.blocks[index].module(hidden[index], attention_mask=mask, **kwargs) for x in (anatomy, dense)
        )
        found = block_loss(anatomy, TRAIN[:3], dense, index)
        assert torch.allclose(found, (one - other).square().mean(), rtol=1e-4), index


@pytest.mark.parametrize(("n_steps", "n_blocks"), [(12, 4), (10, 4), (7, 3), (5, 5)])
def test_blocks_are_trained_in_order_and_each_has_a_schedule_of_its_own(n_steps, n_blocks):
    places = [Place.of(step, n_steps, n_blocks) for step in range(n_steps)]
    assert [place.block for place in places] == sorted(place.block for place in places)
    for block in range(n_blocks):
        own = [place for place in places if place.block == block]
        assert [place.step for place in own] == [*range(len(own))]
        assert {place.n_steps for place in own} == {len(own)}
        assert len(own) in (n_steps // n_blocks, -(-n_steps // n_blocks))


@pytest.mark.parametrize("method", ["perp", "full", "spp", "norms"])
def test_it_brings_the_outputs_of_blocks_back_and_keeps_zeros(method):
    anatomy, dense = pruned(), small_anatomy()
    zeros, before = count_zeros(anatomy), [float(block_loss(anatomy, TRAIN, dense, i)) for i in range(2)]
    validation = teacher_batches(dense, TRAIN)
    start = losses_on(anatomy, validation)["kl"]
    rate = {"spp": 0.1}.get(method, 1e-2)
    trainer = Trainer(anatomy, training(method=method, lr=rate), TRAIN, dense)
    half = trainer.n_steps // 2
    last = {name: x.clone() for name, x in anatomy.model.named_parameters() if "layers.1" in name}
    assert trainer.train(half) is not None
    assert all(
        torch.equal(x, last[name]) for name, x in anatomy.model.named_parameters() if "layers.1" in name
    )
    trainer.train(half)
    assert (trainer.failure, trainer.step) == (None, 24)
    trainer.finish()
    assert all(float(block_loss(anatomy, TRAIN, dense, i)) < 0.98 * before[i] for i in range(2))
    assert losses_on(anatomy, validation)["kl"] < start
    assert count_zeros(anatomy) == zeros


def test_it_continues_where_it_stopped(tmp_path):
    unbroken, first = (Trainer(pruned(), training(), TRAIN, small_anatomy()) for _ in range(2))
    unbroken.train(24)
    first.train(17)
    torch.save(first.state_dict(), tmp_path / "state")
    second = Trainer(pruned(), training(), TRAIN, small_anatomy())
    second.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    second.train(24)
    found = second.state_dict()["parameters"]
    assert all(torch.equal(x, found[name]) for name, x in unbroken.state_dict()["parameters"].items())


def test_what_it_cannot_do_is_refused():
    with pytest.raises(
        ValueError, match=r"a step for each of the 2 blocks for the loss reconstruct, got 1\. Raise"
    ):
        Trainer(pruned(), training(tokens=32), TRAIN, small_anatomy())
    with pytest.raises(ValueError, match="`teacher` for the loss reconstruct, got none"):
        Trainer(pruned(), training(), TRAIN)
