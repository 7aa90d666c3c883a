"""Healing of merged layers: only the blocks beside dropped ones are trained, and nothing else changes."""

import pytest

from secateur.evaluators.data.windows import losses_on, teacher_batches
from secateur.evaluators.recovery import (
    RecoveryJob,
    check_dropped,
    first_windows,
    make_trainer,
    open_pruned,
)
from secateur.evaluators.training.settings import Training
from secateur.evaluators.training.trainer import Trainer
from secateur.pruners.depth.merge_targets import blocks_beside_dropped
from secateur.pruners.models.find_layout import find_layouts
from secateur.pruners.recipes.plan import LiveBlock
from secateur.search import app
from secateur.search.settings.settings import settings_from
from tests.models import random_tokens, small_anatomy

TRAIN = random_tokens(12, 16, seed=1)
EVALUATOR = {
    "window": 128,
    "fidelities": [512],
    "test_tokens": 1024,
    "calibration_tokens": 4096,
}


def without(*dropped, n_layers=6):
    """A model from which these blocks were removed."""
    anatomy = small_anatomy(n_layers=n_layers)
    for layout in find_layouts(anatomy):
        if layout.block.index in dropped:
            live = LiveBlock(layout.block, layout)
            live.drop()
            live.finish()
    return anatomy


@pytest.mark.parametrize(
    ("dropped", "merged", "wanted"),
    [
        ((), False, ()),
        ((2, 3), True, (1,)),
        ((2, 3), False, (1, 4)),
        ((1, 3), False, (0, 2, 4)),
        ((1, 3), True, (0, 2)),
        ((5,), False, (4,)),
        ((0, 5), False, (1, 4)),
        ((1, 2, 3, 4, 5), True, (0,)),
    ],
)
def test_the_kept_blocks_beside_dropped_ones(dropped, merged, wanted):
    assert blocks_beside_dropped(without(*dropped), merged=merged) == wanted


def tiny_session_plan(space):
    settings = settings_from({"model": "tiny", "space": space, "evaluator": EVALUATOR})
    session = app.open_session(settings)
    return session, session.plan


def candidate_of(repair):
    return (
        "recipe: blocks 0.4 | calibration calibration:1; samples=8; length=128; choose=random; subset=0 | "
        f"metric last | repair {repair}"
    )


@pytest.mark.parametrize("repair", ["none", "laco"])
def test_only_merged_blocks_or_those_at_the_cut_are_healed(repair):
    training = Training("merged", tokens=16 * 512, batch=4)
    space = {"kind": "recipe", "unit": "blocks", "target": 0.4, "samples": [8], "length": [128]}
    session, plan = tiny_session_plan(space)
    job = RecoveryJob(plan, candidate_of(repair), sequential=False, training=training)
    check_dropped(training, session, job.candidate)
    pruned, dense = open_pruned(job, lambda line: None)
    anatomy = pruned.anatomy
    (target,) = blocks_beside_dropped(
        anatomy, merged=True
    )  # the last blocks are dropped: there is none behind them
    before = {name: value.clone() for name, value in anatomy.model.named_parameters()}
    trainer = make_trainer(pruned, dense, job)
    validation = teacher_batches(dense, first_windows(pruned, plan.fidelities[0]))
    start = losses_on(anatomy, validation)["kl"]
    trainer.train(trainer.n_steps)
    trainer.finish()
    changed = {name for name, value in anatomy.model.named_parameters() if not value.equal(before[name])}
    assert changed == {
        f"{anatomy.blocks[target].name}.{x}" for x, _ in anatomy.blocks[target].module.named_parameters()
    }
    assert losses_on(anatomy, validation)["kl"] < 0.95 * start


def test_a_repair_of_blocks_says_that_only_what_they_were_merged_into_is_healed():
    session, _ = tiny_session_plan({"kind": "recipe", "unit": "blocks", "target": 0.4})
    for repair, merges in (("none", False), ("laco", True), ("streamline", True)):
        assert session.pruner.merges(session.config(candidate_of(repair))) == merges


def test_what_has_no_dropped_blocks_is_refused():
    training = Training("merged", loss="ce", tokens=32, batch=2)
    with pytest.raises(
        ValueError, match=r"without some of its blocks for the method merged, got one with all"
    ):
        Trainer(small_anatomy(), training, TRAIN)
    for space in ({"target": 0.6}, {"kind": "architecture", "target": 0.3}):
        session, _ = tiny_session_plan(space)
        (name, *_) = [x for x in session.space.baselines() if x != "dense"]
        candidate = session.space.baselines()[name].text
        with pytest.raises(
            ValueError, match="Expected a candidate that drops whole blocks for the method merged"
        ):
            check_dropped(training, session, candidate)
        check_dropped(Training("full", tokens=32), session, candidate)
    with pytest.raises(ValueError, match="the loss kl or ce with the method merged, got reconstruct"):
        Training("merged", loss="reconstruct")


def test_the_rate_is_that_of_llm_streamline():
    assert Training("merged").learning_rate == 2e-4
