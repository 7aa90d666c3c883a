"""Sizes of trainings: memory against what autograd keeps, steps against those that are taken, and their forecasts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from weakref import finalize

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from secateur.evaluators.forecast import speed
from secateur.evaluators.forecast.prospect import outline
from secateur.evaluators.forecast.speed import Speed
from secateur.evaluators.forecast.training import of_training, of_trainings
from secateur.evaluators.training.settings import Training
from secateur.pruners.learned.besa import learned_shares
from secateur.pruners.learned.maskllm import learned_masks
from secateur.pruners.learned.smp import smp
from secateur.pruners.learned.training import MaskTrainer
from secateur.pruners.learned.training_size import TrainingSize, activation_bytes
from secateur.pruners.models.find_layout import find_layouts
from secateur.pruners.models.losses import CHUNK_TOKENS, ce_loss, head_inputs, kl_loss, logits_bytes
from secateur.pruners.recipes.trainings import trainings_of
from secateur.search.app import forecast_prune as forecast_prune_module
from secateur.search.app.forecast_prune import forecast_prune
from secateur.search.app.recipe_file import file_for
from secateur.spaces.method_table import TABLE
from secateur.spaces.methods import RULES, UNIT_RECONSTRUCTIONS
from tests.models import random_tokens, small_anatomy
from tests.recipe_contexts import CALIBRATION, small_context

TOKENS = random_tokens(5, 24)
WINDOWS = (5, 24)
TRAINING = [row for row in TABLE if row.trains]


def kept_bytes(anatomy, tokens) -> int:
    """Bytes of the tensors that a forward pass keeps for its backward pass, but for the model's own."""
    own = {x.untyped_storage().data_ptr() for x in (*anatomy.model.parameters(), *anatomy.model.buffers())}
    kept: dict[int, int] = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        states = head_inputs(anatomy, tokens)
    del states
    return sum(kept.values())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_activations_are_what_a_backward_pass_needs(attention):
    anatomy = small_anatomy(
        hidden_size=64, intermediate_size=192, max_position_embeddings=256, attn_implementation=attention
    )
    anatomy.model.requires_grad_(True)
    for length in (32, 256):
        truth = kept_bytes(anatomy, random_tokens(2, length))
        found = activation_bytes(anatomy, anatomy.blocks, 2 * length, length)
        assert found == pytest.approx(truth, rel=0.15)


class Alive(TorchDispatchMode):
    """Mode that counts the bytes of tensors without memory that are alive, in backward passes, too; not of a model."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.now = self.most = 0
        self.own = [x.untyped_storage() for x in (*model.parameters(), *model.buffers())]
        self.known = {id(storage) for storage in self.own}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for storage in (x.untyped_storage() for x in tree_leaves(found) if isinstance(x, torch.Tensor)):
            if id(storage) not in self.known:
                self.known.add(id(storage))
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                finalize(storage, self._gone, id(storage), storage.nbytes())
        return found

    def _gone(self, key: int, n_bytes: int) -> None:
        self.known.discard(key)
        self.now -= n_bytes


@pytest.mark.parametrize("teacher", [False, True])
@pytest.mark.parametrize("n_windows", [1, 8])
def test_logits_are_those_of_a_chunk(teacher, n_windows):
    found = outline("tiny")
    tokens = torch.zeros(n_windows, 128, dtype=torch.int64, device="meta")
    states = torch.zeros(n_windows, 128, found.anatomy.width, device="meta", requires_grad=True)
    with found.shapes, Alive(found.anatomy.model) as alive:
        if teacher:
            loss = kl_loss(found.anatomy, tokens, found.anatomy, states.detach(), states)
        else:
            loss = ce_loss(found.anatomy, tokens, states)
        loss.backward()
    n_tokens = n_windows * 128
    foreseen = logits_bytes(found.anatomy, n_tokens, teacher=teacher)
    assert foreseen == 4 * (5 if teacher else 3) * min(CHUNK_TOKENS, n_tokens) * 4096
    assert alive.most == pytest.approx(foreseen, rel=0.1)


# --- rows ---


def test_every_method_of_ours_that_trains_says_how_much():
    assert [row.name for row in TRAINING if not row.training_path] == []
    assert [row.name for row in TABLE if row.training_path and not row.trains] == []


class _StopError(Exception):
    """The number of steps is known."""


@pytest.fixture
def taken(monkeypatch):
    """Steps, and trained values, of a training that is asked for; it is stopped before its first step."""
    found: list[tuple[int, int]] = []

    def run(trainer):
        trained = [x for x in trainer._trained.values() if x.requires_grad]
        found.append((trainer._n_steps, sum(x.numel() for x in trained)))
        raise _StopError

    monkeypatch.setattr(MaskTrainer, "run", run)
    return found


TRAINED = {
    **{name: row for name, row in UNIT_RECONSTRUCTIONS.items() if row.trains},
    **{row.name: row for row in TRAINING if row.name in ("smp", "maskllm")},
}


@pytest.mark.parametrize("name", TRAINED)
def test_the_steps_and_values_are_those_that_are_trained(name, taken):
    anatomy, row = small_anatomy(n_layers=3), TRAINED[name]
    train = {
        "maskllm": lambda: learned_masks(anatomy, TOKENS),
        "smp": lambda: smp(anatomy, TOKENS, 0.5),
    }
    with pytest.raises(_StopError):
        train.get(name, lambda: row.function(anatomy, find_layouts(anatomy), TOKENS, 0.2))()
    [(n_steps, n_values)] = taken
    size = row.training(anatomy, WINDOWS, **row.values({}))
    assert (size.n_steps, size.batch, size.length) == (n_steps, 4, 24)
    assert size.n_values >= 4 * n_values  # with gradients and two moments
    assert size.n_bytes(anatomy) == 4 * size.n_values + size.work_bytes(anatomy)


def test_the_steps_of_besa_are_those_of_each_block(taken, tmp_path):
    context = small_context(tmp_path, 3)
    row = RULES["besa"]
    given = row.values({"besa_passes": 40.0})
    with pytest.raises(_StopError):
        learned_shares(
            context.anatomy, context.sample({**CALIBRATION, "choose": "random"}), sparsity=0.5, **given
        )
    size = row.training(context.anatomy, (4, 32), **given)
    assert taken[0][0] == size.n_steps == 40
    assert (size.batch, size.length, size.n_blocks) == (4, 32, 3)


def test_a_step_of_one_block_takes_its_activations_alone():
    anatomy = small_anatomy(n_layers=3)
    whole, one = (TrainingSize(1, 4, 24, 0, n_blocks=n) for n in (None, 3))
    of_blocks = activation_bytes(anatomy, anatomy.blocks, 96, 24)
    assert whole.work_bytes(anatomy) == of_blocks + logits_bytes(anatomy, 96, teacher=False)
    assert one.work_bytes(anatomy) == of_blocks / 3
    halved = small_anatomy(n_layers=3)
    halved.model.to(torch.bfloat16)
    assert whole.n_bytes(halved) - whole.n_bytes(anatomy) == 4 * sum(
        x.numel() for x in anatomy.model.parameters()
    )


# --- forecasts ---


def foreseen(recipe, **changes):
    file, _ = file_for(recipe, 0.3)
    found = forecast_prune(file, "tiny", timing=False, tokens=512, window=128, **changes)
    trained = [x for x in found.holdings if x.name.startswith("training")]
    return {x.name: x.n_bytes for x in trained}, {x.name: x.tokens for x in found.work}


def test_the_training_of_a_recipe_is_foreseen():
    found = outline("tiny")
    for name, n_tokens in (("apt", 200 * 4 * 128), ("sheared", 200 * 4 * 128), ("besa", 32 * 16 * 128)):
        file, _ = file_for(name, 0.3)
        with found.shapes:
            sizes = trainings_of(file.form, found.anatomy)
        held, work = foreseen(name)
        assert held == {f"training of {name}": sizes[name].n_bytes(found.anatomy)}
        assert work[f"training of {name}"] == n_tokens
    assert foreseen("wanda")[0] == {}


def test_gradual_schedules_and_rules_that_train_are_both_worked_and_the_larger_one_is_held():
    found = outline("tiny")
    sizes = {"a": TrainingSize(1, 4, 128, 10), "b": TrainingSize(1, 4, 128, 1000, teacher=True)}
    [held] = of_trainings(found, sizes, (), ("prune",))
    assert (held.name, held.n_bytes) == ("training of b", sizes["b"].n_bytes(found.anatomy))
    assert "a teacher" in held.why
    [other] = of_trainings(found, sizes, ("b",), ("prune",))  # counted among the gradients
    assert other.name == "training of a"


def test_activations_of_a_recovery_follow_its_loss_and_its_method():
    found = outline("tiny")

    def of(**values):
        held = of_training(found, Training(**values), 128, ("train",))
        return {x.name: x.n_bytes for x in held}["activations in training"]

    ce, kl = of(loss="ce", method="norms"), of(loss="kl", method="norms")
    assert kl - ce == 4 * 2 * 512 * 4096
    assert of(loss="kl", method="spp") - kl == 4 * 3 * sum(x.n_weights for x in found.anatomy.linears)
    assert (
        of(loss="reconstruct", method="norms") == (ce - logits_bytes(found.anatomy, 512, teacher=False)) / 6
    )


# --- times ---

SECONDS = Speed(
    1.0, 10.0, 100.0, watched=None, levels=None, switch=None, read=0.0, device="cpu", both_ways=5.0
)


def test_a_trained_token_is_passed_forward_and_backward_and_by_the_teacher():
    assert SECONDS.training(6.0) == 6 * 5 + 3 * 10
    assert SECONDS.training(6.0, teacher=True) == 6 * 5 + 3 * 10 + 6 * 1 + 10
    assert SECONDS.training(1.0, head=False) == 5
    assert replace(SECONDS, both_ways=None).training(6.0) == 6 * 3 + 3 * 10


def test_the_time_of_trainings_follows_from_their_tokens(monkeypatch):
    asked = []

    def speed_of(found, window, say, *, trains):
        asked.append(trains)
        return SECONDS

    monkeypatch.setattr(forecast_prune_module, "speed_of", speed_of)
    monkeypatch.setattr(speed, "process_seconds", lambda model: 0.0)
    found = {}
    for name in ("apt", "besa", "wanda"):
        file, _ = file_for(name, 0.3)
        work = forecast_prune(file, "tiny", tokens=512, window=128).work
        found[name] = {x.name: x.seconds for x in work}
    assert found["apt"]["training of apt"] == 200 * 4 * 128 * SECONDS.training(6.0, teacher=True)
    assert found["besa"]["training of besa"] == 32 * 16 * 128 * 6 * 5
    pruning = file.calibrated_on[0] * 2 * 6
    assert found["wanda"] == {"loading": 0, "pruning": pruning, "measuring": 512 * 132, "writing": 0}
    assert asked == [True, True, False]


def test_a_block_is_timed_backward_where_it_is_asked_for():
    found = outline("tiny")
    assert speed.measure_speed(found, 64).both_ways is None
    timed = speed.measure_speed(found, 64, trains=True)
    assert timed.both_ways > timed.block
