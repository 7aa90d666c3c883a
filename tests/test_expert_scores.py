"""Importances of experts against slow references, and merging that is exact where experts are copies."""

from __future__ import annotations

from functools import partial
from itertools import combinations
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from secateur.pruners.experts import merging, scores
from secateur.pruners.experts.evidence import ExpertEvidence, MixtureRecorder
from secateur.pruners.experts.not_all_experts import kept_by_output
from secateur.pruners.models.experts import Experts, split_experts
from secateur.pruners.models.mixture import LiveMixture, find_mixture
from tests.mixtures import MIXTURES, VOCABULARY, make_mixture

IDS = torch.randint(VOCABULARY, (3, 24), generator=torch.Generator().manual_seed(0))


def _last_block(model: Any) -> Any:
    return model.model.layers[-1]


def _evidence(model: Any) -> ExpertEvidence:
    split_experts(model)
    block = _last_block(model)
    recorder = MixtureRecorder(find_mixture(block, "block"), block)
    with recorder.watching(), torch.no_grad():
        for ids in IDS.split(2):
            model(input_ids=ids, use_cache=False)
    return recorder.evidence


def _reference(model: Any) -> dict[str, torch.Tensor]:
    """Sums by the fused Mixtral's own weights, token by token."""
    block, seen = _last_block(model), {}
    block.mlp.register_forward_hook(lambda m, args, output: seen.update(x=args[0], y=output))
    block.register_forward_hook(lambda m, args, output: seen.update(after=output))
    with torch.no_grad():
        model(input_ids=IDS, use_cache=False)
        x, after = seen["x"].flatten(0, 1), seen["after"].flatten(0, 1)
        before = after - seen["y"].flatten(0, 1)
        gate, experts = block.mlp.gate, block.mlp.experts
        top = (x @ gate.weight.T).softmax(-1).topk(2)
        sums = torch.zeros(4, 6, dtype=torch.float64)
        for t in range(len(x)):
            turned = 1 - F.cosine_similarity(before[t], after[t], dim=0)
            weights = top.values[t] / top.values[t].sum()
            for weight, e in zip(weights, top.indices[t].tolist(), strict=True):
                g, u = (experts.gate_up_proj[e] @ x[t]).chunk(2)
                norm = (experts.down_proj[e] @ (F.silu(g) * u)).norm()
                sums[:, e] += torch.stack([torch.ones(()), weight, weight * norm, weight * norm * turned])
    return {
        "frequency": sums[0] / len(x),
        "mean_gate": sums[1] / len(x),
        "reap": sums[2] / sums[0].clamp_min(1),
        "easy_ep": sums[3],
    }


@pytest.mark.parametrize("name", ["frequency", "mean_gate", "reap", "easy_ep"])
def test_scores_equal_a_slow_reference(name: str) -> None:
    wanted = _reference(make_mixture("mixtral"))[name]
    got = getattr(scores, name)(_evidence(make_mixture("mixtral")))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", MIXTURES)
def test_each_token_counts_for_as_many_experts_as_it_is_routed_to(name: str) -> None:
    evidence = _evidence(make_mixture(name))
    assert len(evidence.hidden) == IDS.numel()
    assert float(evidence.n_routed.sum()) == evidence.mixture.top_k * IDS.numel()
    for value in (evidence.gates, evidence.gated_norms, evidence.contributions):
        assert torch.isfinite(value).all()
        assert (value[evidence.n_routed == 0] == 0).all()


def test_easy_ep_leaves_shared_experts_out() -> None:
    """A token counts by how far the routed experts alone turn what was there before the mixture."""
    model = make_mixture("deepseek_v3")
    evidence = _evidence(model)
    block, seen = _last_block(model), dict[str, Any]()
    for name, module in (("given", block.mlp), ("shared", block.mlp.shared_experts), ("after", block)):
        module.register_forward_hook(lambda m, args, output, name=name: seen.update({name: output}))
    sums = torch.zeros(6, dtype=torch.float64)

    def add(module: Any, args: Any, output: torch.Tensor, index: int) -> None:
        seen[f"expert{index}"] = (module.tokens, module.routing * output.norm(dim=-1))

    for index in range(6):
        evidence.mixture.experts[index].register_forward_hook(partial(add, index=index))
    with torch.no_grad():
        model(input_ids=IDS, use_cache=False)
    given, shared, after = (seen[name].reshape(-1, 32) for name in ("given", "shared", "after"))
    turned = 1 - F.cosine_similarity(after - given, after - shared, dim=-1)
    for index in range(6):
        if f"expert{index}" in seen:
            tokens, gated = seen[f"expert{index}"]
            sums[index] = (gated * turned[tokens]).sum()
    torch.testing.assert_close(evidence.contributions, sums, rtol=1e-3, atol=1e-5)


def test_ream_fills_the_groups_of_the_highest_scores_first() -> None:
    """Groups of two: of four kept experts the two that score highest take one each, the others stay as they are."""
    evidence = _evidence(make_mixture("mixtral"))
    kept, weights = merging.ream(evidence, (0, 2, 3, 5))
    assert kept == (0, 2, 3, 5)
    ranked = sorted(kept, key=lambda expert: -float(scores.reap(evidence)[expert]))
    assert {int(name.partition(".")[0]) for name in weights} == set(ranked[:2])


def test_not_all_experts_finds_the_best_of_all_sets() -> None:
    evidence = _evidence(make_mixture("mixtral"))
    mixture, live = evidence.mixture, LiveMixture(evidence.mixture)
    with torch.no_grad():
        wanted = mixture.module(evidence.hidden[None])
        losses = {}
        for kept in combinations(range(6), 3):
            live.cut(kept)
            losses[kept] = float((mixture.module(evidence.hidden[None]) - wanted).square().sum())
        live.restore()
    assert kept_by_output(evidence, (3,)) == [min(losses, key=losses.__getitem__)]


def test_not_all_experts_is_greedy_where_sets_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    evidence = _evidence(make_mixture("mixtral"))
    best = kept_by_output(evidence, (5,))
    monkeypatch.setattr("secateur.pruners.experts.not_all_experts.EXHAUSTIVE", 0)
    assert kept_by_output(evidence, (5,)) == best  # one step is exhaustive
    three, four = kept_by_output(evidence, (3, 4))
    assert set(three) < set(four) < {0, 1, 2, 3, 4, 5}


def test_not_all_experts_keeps_as_many_of_each_group(monkeypatch: pytest.MonkeyPatch) -> None:
    evidence = _evidence(make_mixture("deepseek_v3"))
    exhaustive = kept_by_output(evidence, (4,))
    monkeypatch.setattr("secateur.pruners.experts.not_all_experts.EXHAUSTIVE", 0)
    for (kept,) in (exhaustive, kept_by_output(evidence, (4,))):
        assert evidence.mixture.groups_of(kept) == [2, 2]


def _with_copies() -> Any:
    """Mixtral whose experts 3 to 5 are 0 to 2 with their channels in another order."""
    model = make_mixture("mixtral")
    experts = _last_block(model).mlp.experts
    order = torch.randperm(48, generator=torch.Generator().manual_seed(5))
    for e in range(3):
        gate, up = experts.gate_up_proj.data[e].chunk(2)
        experts.gate_up_proj.data[e + 3] = torch.cat([gate[order], up[order]])
        experts.down_proj.data[e + 3] = experts.down_proj.data[e][:, order]
    return model


@pytest.mark.parametrize("name", ["ream", "mc_smoe"])
def test_merging_of_copies_changes_no_weight(name: str) -> None:
    """Aligned, a copy is its original whatever the order of its channels."""
    model = _with_copies()
    gate = _last_block(model).mlp.gate.weight.data
    gate[3:] = gate[:3] * 0.9  # the router takes copies for copies, too
    evidence = _evidence(model)
    kept, weights = getattr(merging, name)(evidence, (0, 1, 2))
    assert kept == (0, 1, 2)
    assert {key.partition(".")[0] for key in weights} == {"0", "1", "2"}
    dense = dict(evidence.mixture.experts.named_parameters())
    for key, value in weights.items():
        torch.testing.assert_close(value, dense[key].data)


def test_clusters_of_hc_smoe_are_the_copies() -> None:
    evidence = _evidence(_with_copies())
    kept, weights = merging.hc_smoe(evidence, (0, 1, 2))
    often = evidence.n_routed.tolist()
    assert kept == tuple(sorted(max((e, e + 3), key=often.__getitem__) for e in range(3)))
    share = evidence.n_routed[[0, 3]] / evidence.n_routed[[0, 3]].sum()
    experts = evidence.mixture.experts
    ups: list[Any] = [experts[e].up_proj for e in (0, 3)]
    wanted = sum(float(s) * up.weight.data for s, up in zip(share, ups, strict=True))
    torch.testing.assert_close(weights[f"{kept[0] if kept[0] in (0, 3) else 3}.up_proj.weight"], wanted)


@pytest.mark.parametrize("name", ["nothing", "ream", "mc_smoe", "hc_smoe"])
@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3"])
def test_merged_mixtures_run(name: str, family: str) -> None:
    evidence = _evidence(make_mixture(family))
    mixture = evidence.mixture
    kept, weights = getattr(merging, name)(evidence, mixture.best(range(6), 4))
    assert len(set(kept)) == 4
    assert len(set(mixture.groups_of(kept))) == 1
    live = LiveMixture(mixture)
    live.cut(kept, weights)
    with torch.no_grad():
        output = mixture.module(evidence.hidden[None])
    assert torch.isfinite(output[0] if isinstance(output, tuple) else output).all()


def test_only_blocks_with_experts_are_split() -> None:
    model = make_mixture("qwen2_moe")
    split_experts(model)
    found = [any(isinstance(m, Experts) for m in block.modules()) for block in model.model.layers]
    assert found == [False, True]
