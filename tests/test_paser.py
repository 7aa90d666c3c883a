"""Choice of recovery windows by PASER, step by step against slow or hand-made references."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from secateur.evaluators.training import paser
from secateur.evaluators.training.concepts import ConceptGraph, concepts_of
from secateur.evaluators.training.paser import choose_windows, clusters_of, picked
from secateur.evaluators.training.settings import Training
from secateur.pruners.weights.method import Method
from secateur.pruners.weights.pruner import prune
from tests.models import random_tokens, small_anatomy

TOKENS = random_tokens(10, 12)


def pruned(sparsity=0.6):
    anatomy = small_anatomy()
    prune(anatomy, {x.name: sparsity for x in anatomy.linears}, Method("magnitude"), TOKENS, sequential=False)
    return anatomy


def test_divergences_equal_a_slow_reference():
    dense, other = small_anatomy(), pruned()
    for window in TOKENS[:3]:
        state, found = paser._look(dense, other, window[None])
        p, q = (x.model(window[None]).logits[0].double().softmax(-1) for x in (dense, other))
        middle = (p + q) / 2
        slow = 0.5 * ((p * (p / middle).log()).sum(-1) + (q * (q / middle).log()).sum(-1))
        assert found == pytest.approx(float(slow.mean()), rel=1e-4)
        assert 0 < found < math.log(2)
        wanted = dense.model.model(window[None]).last_hidden_state[0].mean(0)
        assert torch.allclose(state, wanted, atol=1e-5)


def test_groups_that_lie_apart_are_clusters():
    rng = np.random.default_rng(0)
    centres = np.array([[0.0, 0], [10, 0], [0, 10]])
    groups = np.repeat([0, 1, 2], 12)
    labels = clusters_of(centres[groups] + rng.normal(size=(36, 2)), 3, seed=0)
    assert len({*labels.tolist()}) == 3
    assert all(len({*labels[groups == group].tolist()}) == 1 for group in range(3))
    assert np.array_equal(
        labels, clusters_of(centres[groups] + np.random.default_rng(0).normal(size=(36, 2)), 3, 0)
    )


def test_budgets_follow_damage_and_the_most_damaged_windows_are_chosen():
    labels, damage = np.array([0] * 4 + [1] * 4), np.array([0.1, 0.4, 0.2, 0.3, 0.5, 0.9, 0.7, 0.9])
    texts = [f"word{chr(97 + i)}" for i in range(8)]
    # means 0.25 and 0.75: of 4 windows one and three
    assert picked(labels, damage, 4, texts) == [1, 5, 7, 6]
    assert picked(labels, damage, 1, texts) == [5]  # no budget is whole


def test_windows_whose_concepts_contradict_the_chosen_ones_are_passed_over():
    labels, damage = np.zeros(4, dtype=int), np.array([0.9, 0.8, 0.7, 0.6])
    texts = [
        "red apple, green pear",
        "blue plum, black fig",
        "red apple, blue plum",
        "green pear, grey stone",
    ]
    assert picked(labels, damage, 3, texts) == [0, 1, 3]
    graph = ConceptGraph()
    graph.add(["a", "b"])
    graph.add(["c"])
    assert graph.conflicts(["a", "c"])
    assert not graph.conflicts(["a", "b"])
    assert not graph.conflicts(["a", "new"])


def test_key_phrases_by_hand():
    """Scores are degree over frequency: of ``fast`` 5 / 2, of ``sorting`` 3 / 2, of ``algorithms`` 3, of ``cars`` 2."""
    text = "Fast sorting algorithms and fast cars are for sorting."
    assert concepts_of(text, 1) == {"fast sorting algorithms"}
    assert concepts_of(text, 2) == {"fast sorting algorithms", "fast cars"}
    assert concepts_of("of the and 12, 3!") == frozenset()


def test_chosen_windows_are_some_of_the_given_in_their_order():
    dense, other = small_anatomy(), pruned()
    before = {name: x.clone() for name, x in other.model.named_parameters()}
    texts = [f"word{chr(97 + i)}" for i in range(10)]
    found = choose_windows(dense, other, TOKENS, 0.5, texts, seed=0)
    places = [next(i for i, window in enumerate(TOKENS) if torch.equal(window, row)) for row in found]
    assert places == sorted(set(places))
    assert 1 <= len(places) <= 5
    assert torch.equal(found, choose_windows(dense, other, TOKENS, 0.5, texts, seed=0))
    assert all(torch.equal(x, before[name]) for name, x in other.model.named_parameters())


def test_records_name_the_choice_and_those_of_before_do_not():
    assert "data" not in Training().to_json()
    assert Training(data="paser", share=0.3).to_json()["share"] == 0.3
    with pytest.raises(ValueError, match=r"Expected `share` within \(0, 1\], got 0.0"):
        Training(share=0.0)
