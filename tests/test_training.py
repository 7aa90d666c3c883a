"""Light training on small random models: zeros stay, runs continue bit by bit, and it learns."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from secateur.evaluators.data.windows import EvaluationData, losses_on, teacher_batches
from secateur.evaluators.training.settings import Training, cosine
from secateur.evaluators.training.trainer import Trainer, step_windows
from secateur.pruners.models.discover import dissect
from secateur.pruners.models.losses import ce_loss, head_inputs, kl_loss
from secateur.pruners.weights.method import Method
from secateur.pruners.weights.pruner import prune
from secateur.spaces.measurement import Fidelity
from tests.models import count_zeros, random_tokens, small_anatomy

TRAIN, VALIDATE = random_tokens(12, 16, seed=1), random_tokens(6, 16, seed=2)
METHODS = (
    "full",
    "norms",
    "lora",
    "spp",
    "scale_lora",
    "perp",
    "slope",
    "last",
)


def needs(method):
    return pytest.importorskip("peft") if method == "lora" else None


def pruned(sparsity=0.6, seed=0):
    anatomy = small_anatomy(seed)
    asked = {linear.name: sparsity for linear in anatomy.linears}
    prune(anatomy, asked, Method("magnitude"), TRAIN, sequential=False)
    return anatomy


def training(**changes):
    return Training(**{"method": "full", "tokens": 12 * 32, "batch": 2, "rank": 4, "lr": 1e-2, **changes})


def trained(n_steps, **changes):
    trainer = Trainer(pruned(), training(**changes), TRAIN, small_anatomy())
    trainer.train(n_steps)
    return trainer


@pytest.mark.parametrize("loss", ["kl", "ce"])
@pytest.mark.parametrize("method", METHODS)
def test_training_lowers_the_loss_and_keeps_every_zero(method, loss):
    needs(method)
    anatomy, dense = pruned(), small_anatomy()
    before = {linear.name: linear.weight.clone() for linear in anatomy.linears}
    validation = teacher_batches(dense, TRAIN)  # what it is trained on: random tokens generalise to nothing
    start = losses_on(anatomy, validation)[loss]
    trainer = Trainer(anatomy, training(method=method, loss=loss, tokens=36 * 32), TRAIN, dense)
    assert trainer.train(1000) is not None
    assert trainer.failure is None
    assert trainer.trained_tokens == 36 * 32
    live = losses_on(anatomy, validation)
    trainer.finish()
    assert losses_on(anatomy, validation) == live  # what was trained is what is left, exactly
    assert live[loss] < 0.97 * start
    changed = 0
    for linear in anatomy.linears:
        old = before[linear.name]
        assert (linear.weight[old == 0] == 0).all()
        changed += int((linear.weight != old).sum())
    assert count_zeros(anatomy) == {name: int((w == 0).sum()) for name, w in before.items()}
    assert (changed == 0) == (method == "norms")
    assert not any(parameter.requires_grad for parameter in anatomy.model.parameters())
    assert all("lora" not in name for name, _ in anatomy.model.named_modules())


def test_zeros_stay_whatever_the_optimizer_does():
    anatomy = pruned()
    trainer = Trainer(anatomy, training(weight_decay=0.5, lr=1.0), TRAIN, small_anatomy())
    zeros = count_zeros(anatomy)
    for group in trainer._optimizer.param_groups:
        group["eps"] = 0.0  # 0 / 0 for weights without a gradient
    trainer.train(1)
    assert count_zeros(anatomy) == zeros


def test_gradients_of_zeros_do_not_count_in_the_norm_that_is_clipped():
    anatomy = pruned(sparsity=1.0)  # only the rest learns, and only its gradients are clipped
    trainer = Trainer(anatomy, training(), TRAIN, small_anatomy())
    trainer._loss(TRAIN[:2]).backward()
    trainer._drop_gradients()
    assert all((linear.module.weight.grad == 0).all() for linear in anatomy.linears)
    assert any((parameter.grad != 0).any() for parameter in trainer._trained.values())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stop", [1, 7])
def test_a_run_that_was_stopped_and_continued_equals_an_unbroken_one(method, stop, tmp_path):
    needs(method)
    unbroken = trained(12, method=method)
    first = trained(stop, method=method)
    torch.save(first.state_dict(), tmp_path / "state")
    second = Trainer(pruned(), training(method=method), TRAIN, small_anatomy())
    second.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    second.train(1000)
    assert unbroken.step == second.step == 12
    for name, value in unbroken.state_dict()["parameters"].items():
        assert torch.equal(value, second.state_dict()["parameters"][name]), name


def test_a_state_of_another_recipe_is_refused():
    with pytest.raises(ValueError, match="another recipe"):
        trained(0).load_state_dict(trained(0, lr=1e-3).state_dict())


def test_the_seed_decides():
    def weights(**changes):
        return trained(4, **changes).state_dict()["parameters"]["model.layers.0.self_attn.q_proj.weight"]

    state = torch.random.get_rng_state()
    assert torch.equal(weights(), weights())
    assert not torch.equal(weights(), weights(seed=1))
    assert torch.equal(state, torch.random.get_rng_state())


def test_lora_leaves_the_global_generator_alone():
    needs("lora")
    state = torch.random.get_rng_state()
    trained(1, method="lora")
    assert torch.equal(state, torch.random.get_rng_state())


def test_lora_keeps_zeros_of_layers_that_store_their_weight_transposed():
    needs("lora")
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    anatomy = dissect(GPT2LMHeadModel(config).eval())
    asked = {linear.name: 0.5 for linear in anatomy.linears}
    dense = dissect(GPT2LMHeadModel(config).eval())
    dense.model.load_state_dict(anatomy.model.state_dict())
    prune(anatomy, asked, Method("magnitude"), TRAIN, sequential=False)
    zeros = count_zeros(anatomy)
    trainer = Trainer(anatomy, training(method="lora"), TRAIN, dense)
    trainer.train(4)
    live = anatomy.model(input_ids=VALIDATE).logits
    trainer.finish()
    assert torch.equal(anatomy.model(input_ids=VALIDATE).logits, live)
    assert count_zeros(anatomy) == zeros


def test_a_divergence_is_a_reason_and_leaves_finite_weights():
    trainer = Trainer(pruned(), training(lr=1e30, clip=1e30), TRAIN, small_anatomy())
    assert trainer.train(1000) is None
    assert "diverged at step" in trainer.failure
    assert trainer.train(1) is None  # nothing more
    assert 0 < trainer.step < trainer.n_steps


def test_the_weights_learn_in_float32_and_the_dense_model_is_left_alone():
    anatomy, dense = pruned(), small_anatomy()
    anatomy.model.to(torch.bfloat16)
    dense.model.to(torch.bfloat16)
    before = {name: value.clone() for name, value in dense.model.state_dict().items()}
    Trainer(anatomy, training(), TRAIN, dense).train(2)
    assert {parameter.dtype for parameter in anatomy.model.parameters()} == {torch.float32}
    after = dense.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert anatomy.head.weight is anatomy.embedding.weight  # tied as before


def test_the_losses_equal_the_plain_ones_over_all_logits():
    anatomy, dense = pruned(), small_anatomy()
    student = anatomy.model(input_ids=TRAIN).logits.log_softmax(-1)
    teacher = dense.model(input_ids=TRAIN).logits.log_softmax(-1)
    kl = (teacher.exp() * (teacher - student)).sum(-1).mean()
    ce = torch.nn.functional.cross_entropy(student[:, :-1].flatten(0, 1), TRAIN[:, 1:].flatten())
    torch.testing.assert_close(kl_loss(anatomy, TRAIN, dense), kl)
    torch.testing.assert_close(ce_loss(anatomy, TRAIN), ce)
    torch.testing.assert_close(
        anatomy.logits(head_inputs(anatomy, TRAIN)), anatomy.model(input_ids=TRAIN).logits
    )


def test_gradients_in_chunks_equal_those_of_the_plain_loss(monkeypatch):
    monkeypatch.setattr("secateur.pruners.models.losses.CHUNK_TOKENS", 7)
    dense, grads = small_anatomy(), []
    for chunked in (True, False):
        anatomy = pruned()
        anatomy.model.requires_grad_(True)
        if chunked:
            kl_loss(anatomy, TRAIN, dense).backward()
        else:
            student = anatomy.model(input_ids=TRAIN).logits.log_softmax(-1)
            teacher = dense.model(input_ids=TRAIN).logits.log_softmax(-1)
            (teacher.exp() * (teacher - student)).sum(-1).mean().backward()
        grads.append([parameter.grad for parameter in anatomy.model.parameters()])
    for ours, plain in zip(*grads, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-7)


def test_validation_measures_what_the_evaluator_measures():
    dense, anatomy = small_anatomy(), pruned()
    fidelity = Fidelity("search", VALIDATE.numel())
    live = small_anatomy()
    data = EvaluationData(live, {"search": VALIDATE}, [fidelity])
    data.of(fidelity)
    for mine, theirs in zip(live.linears, anatomy.linears, strict=True):
        mine.point_to(theirs.weight)
    batches = teacher_batches(dense, VALIDATE)
    assert losses_on(anatomy, batches) == pytest.approx(data.live_losses(fidelity), rel=2e-3)
    assert losses_on(dense, batches)["kl"] == pytest.approx(0, abs=1e-6)


def test_each_epoch_holds_every_window_once_in_an_order_of_its_own():
    windows = torch.arange(5)[:, None]
    seen = torch.cat([step_windows(windows, 2, seed=0, step=step) for step in range(5)])[:, 0].tolist()
    assert sorted(seen[:5]) == sorted(seen[5:]) == [0, 1, 2, 3, 4]
    assert seen[:5] != seen[5:]
    assert step_windows(windows, 2, seed=0, step=3)[:, 0].tolist() == seen[6:8]


def test_the_rate_rises_and_falls():
    rates = [cosine(step, 100, 0.1) for step in range(100)]
    assert rates[:11] == sorted(rates[:11])
    assert rates[10] == 1 == max(rates)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert min(rates) > 0
    assert cosine(0, 1, 0.5) == cosine(0, 3, 0.0) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 0}, "`tokens` > 0"),
        ({"lr": float("nan")}, "`lr` > 0"),
        ({"warmup": 1.0}, "`warmup` in"),
    ],
)
def test_a_recipe_checks_itself(changes, message):
    with pytest.raises(ValueError, match=message):
        training(**changes)


def test_tokens_come_in_whole_batches():
    with pytest.raises(ValueError, match=r"whole batches of 2 windows of 16 tokens, got 100\. Use 96"):
        Trainer(pruned(), training(tokens=100), TRAIN, small_anatomy())


def test_distillation_needs_a_teacher():
    with pytest.raises(ValueError, match="`teacher`"):
        Trainer(pruned(), training(), TRAIN)
