"""Published methods that prune in rounds with training: their schedules, formulas, and that each can be carried out."""

from __future__ import annotations

import pytest
import torch

from secateur.pruners.calibration.stream import stream_blocks
from secateur.pruners.models.discover import dissect
from secateur.pruners.models.find_layout import find_layouts
from secateur.pruners.recipes import units
from secateur.pruners.recipes.blocks import plan_blocks
from secateur.pruners.recipes.retraining import Retraining
from secateur.pruners.recipes.units import plan_units
from secateur.pruners.recipes.weights import plan_weights
from secateur.pruners.structure.evidence import Evidence
from secateur.pruners.structure.transact import transact
from secateur.spaces.recipe.form import completed
from secateur.spaces.recipe.known import KNOWN
from secateur.spaces.recipe.schedule import computed_tokens, shares_of, trained_tokens
from tests.recipe_contexts import CALIBRATION, small_context
from tests.structures import CONFIGS, TOKENS, build

PLAN = {"weights": plan_weights, "structure": plan_units, "blocks": plan_blocks}
TRAINED = {
    name: row
    for name, row in KNOWN.items()
    if trained_tokens(completed({"unit": row.unit, "sparsity": 0.5, **row.form}))
}


def form_of(name, sparsity=0.5, **calibration):
    row = KNOWN[name]
    return completed(
        {"unit": row.unit, "sparsity": sparsity, **row.form, "calibration": calibration or CALIBRATION}
    )


def test_which_methods_train():
    assert set(TRAINED) == {
        "gradual",
        "journey_matters",
        "adapt_accel",
        "transact",
        "dress",
        "efficientllm",
        "minitron_distilled",
        "minitron_depth",
    }
    assert all(row.uses_data for row in TRAINED.values())


def test_their_tokens():
    found = {name: trained_tokens(form_of(name, samples=32, length=128)) for name in TRAINED}
    assert found.pop("adapt_accel") == found.pop("efficientllm") == 20 * 4096
    assert set(found.values()) == {65536}
    assert computed_tokens(form_of("minitron_depth", samples=32, length=128)) == 4 * 65536
    assert computed_tokens(form_of("gradual", samples=32, length=128)) == 3 * 65536


def test_the_journey_prunes_between_a_quarter_and_three_quarters_of_its_training():
    """Jin et al. 2025, arXiv 2501.12486: from 25 % of the training to 75 %."""
    form = form_of("journey_matters", samples=32, length=128)
    of, n_rounds, total = form["schedule"], len(shares_of(form)), trained_tokens(form)
    assert of["before"] / total == 0.25
    assert (of["before"] + (n_rounds - 1) * of["retrain"]) / total == 0.75


def test_adapt_pruner_measures_influence_again_in_each_round(tmp_path, monkeypatch):
    """Steps of 2 % (arXiv 2502.03460), each on the model that the step before left."""
    seen, real = [], units._round

    def record(context, config, sample, row, repair, before):
        seen.append((round(config["sparsity"], 9), sample.statistics.influence))
        return real(context, config, sample, row, repair, before)

    monkeypatch.setattr(units, "_round", record)
    plan = plan_units(small_context(tmp_path, 3), form_of("adapt_pruner_rounds", 0.09))
    assert [share for share, _ in seen] == [0.02, 0.04, 0.06, 0.08, 0.09]
    assert len({influence for _, influence in seen}) == 5
    assert plan.costs["sparsity"] == pytest.approx(0.09, abs=0.01)


def test_transact_by_hand():
    """Norms over all tokens; of a head the mean over its channels, and ten over their number times the largest."""
    anatomy = dissect(build(CONFIGS["qwen2"]))
    layout = find_layouts(anatomy)[1]
    seen = {}
    hooks = [
        part.output.module.register_forward_pre_hook(
            lambda _, args, kind=part.kind: seen.__setitem__(kind, args[0].detach().flatten(0, -2))
        )
        for part in layout.sublayers
    ]
    with torch.no_grad():
        anatomy.model(TOKENS, use_cache=False)
    for hook in hooks:
        hook.remove()
    *_, last = stream_blocks(anatomy, TOKENS, outputs="moments")
    for part in layout.sublayers:
        norms = [sum(x * x for x in column) ** 0.5 for column in seen[part.kind].T.tolist()]
        found = transact(Evidence(part, last.outputs[part.output.name], {}, 0.01)).tolist()
        if part.kind == "mlp":
            assert found == pytest.approx(norms, rel=1e-4)
            continue
        d, by_head = part.head_dim, []
        for start in range(0, len(norms), d):
            head = norms[start : start + d]
            by_head.append(sum(head) / d + 10 / d * max(head))
        n = part.heads_per_group
        groups = [sum(by_head[g * n : (g + 1) * n]) / n for g in range(part.n_units)]
        assert found == pytest.approx(groups, rel=1e-4)


@pytest.mark.parametrize("name", [*TRAINED])
def test_each_is_carried_out_with_few_steps(tmp_path, monkeypatch, name):
    """One step in each phase; the sparsity is met, all blocks are trained, and the live model is left dense."""
    real = Retraining.__init__

    def few(self, context, sample, config):
        real(self, context, sample, config)
        self._steps = {phase: min(n, 1) for phase, n in self._steps.items()}

    monkeypatch.setattr(Retraining, "__init__", few)
    context = small_context(tmp_path, 4)
    before = {n: (p.data_ptr(), p.shape) for n, p in context.anatomy.model.named_parameters()}
    form = form_of(name)
    plan = PLAN[form["unit"]](context, form)
    assert plan.costs["sparsity"] == pytest.approx(0.5, abs=0.02)
    assert all(plan.keys)
    assert {n: (p.data_ptr(), p.shape) for n, p in context.anatomy.model.named_parameters()} == before


def test_what_dress_chose_is_small_when_it_goes(tmp_path, monkeypatch):
    """The penalty makes the columns small that go, and leaves the others alone."""
    norms, real = {}, Retraining.train

    def record(self, linears, masks, going=None):
        before = {name: (x * stays).norm() for x, name, stays in outputs(self, going)}
        gone = {name: (x * ~stays).norm() for x, name, stays in outputs(self, going)}
        real(self, linears, masks, going)
        for name, stays in going.items():
            after = self.weights[name]
            norms[name] = (
                float((after * ~stays).norm() / gone[name]),
                float((after * stays).norm() / before[name]),
            )

    def outputs(rounds, going):
        of = {x.name: x.weight for x in rounds.context.anatomy.linears}
        return [(of[name], name, stays) for name, stays in going.items()]

    monkeypatch.setattr(Retraining, "train", record)
    form = {**form_of("dress"), "schedule": {"retrain": 100 * 128, "penalty": 1.0, "lr": 1e-2}}
    plan_units(small_context(tmp_path, 2), completed(form))
    assert len(norms) == 4
    assert all(gone < 0.6 and stays > 0.9 for gone, stays in norms.values()), norms


@pytest.mark.parametrize(
    ("n_blocks", "sparsity", "said"),
    [
        (1, 0.5, "a model with blocks that may go, got one of 1"),
        (3, 0.05, "whole blocks come near to, .* got 0.05"),
    ],
)
def test_blocks_that_can_t_go_are_refused_before_anything_is_trained(
    tmp_path, monkeypatch, n_blocks, sparsity, said
):
    monkeypatch.setattr("secateur.pruners.recipes.blocks.Retraining", None)
    with pytest.raises(ValueError, match=rf"Expected .*{said}"):
        plan_blocks(small_context(tmp_path, n_blocks), form_of("minitron_depth", sparsity))
