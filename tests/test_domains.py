"""Dynamic loading of windows by their domain's loss: the algorithm by hand, its draws, its place in Sheared LLaMA."""

from __future__ import annotations

import math

import pytest
import torch

from secateur.pruners.calibration.choose import choose, sources_of
from secateur.pruners.calibration.pool import Pool
from secateur.pruners.learned import sheared as module
from secateur.pruners.learned.domains import DomainLoader
from secateur.pruners.learned.sheared import sheared
from secateur.pruners.learned.training import MaskTrainer
from secateur.pruners.models.find_layout import find_layouts
from secateur.pruners.stores.saved_state import FileState
from tests.models import random_tokens, small_anatomy

NAMES = ["a", "b", "a", "a", "b", "a", "a", "a"]


def test_windows_are_split_by_domain_and_the_last_ones_are_held_out():
    loader = DomainLoader(NAMES, 0)
    assert loader.domains == ("a", "b")
    assert [x.tolist() for x in loader.held_out] == [[7], [4]]
    assert loader.weights.tolist() == pytest.approx([0.75, 0.25])
    drawn = [loader.rows(step, 4).tolist() for step in range(50)]
    found = [n for rows in drawn for n in rows]
    assert set(found) == {0, 1, 2, 3, 5, 6}
    of_a = [n for n in found if NAMES[n] == "a"]
    assert of_a == [[0, 2, 3, 5, 6][i % 5] for i in range(len(of_a))]
    assert len(of_a) / len(found) == pytest.approx(0.75, abs=0.1)


def test_weights_follow_the_excess_over_the_references():
    loader = DomainLoader(NAMES, 0)
    losses, references = torch.tensor([3.0, 2.5]), torch.tensor([3.2, 2.1])
    loader.update(losses, references)
    grown = [0.75, 0.25 * math.exp(0.4)]  # a is below its reference
    wanted = [(1 - 1e-4) * x / sum(grown) + 1e-4 / 2 for x in grown]
    assert loader.weights.tolist() == pytest.approx(wanted, rel=1e-5)
    again = loader.weights.tolist()
    loader.update(losses, references)
    assert loader.weights[1] > again[1]
    assert float(loader.weights.sum()) == pytest.approx(1.0)


def test_a_domain_of_one_window_is_named():
    with pytest.raises(ValueError, match=r"Expected at least 2 windows of each source .* got 1 of b"):
        DomainLoader(["a", "a", "b"], 0)


def test_the_sources_of_windows_are_those_that_choose_took():
    pools = {"x": Pool(torch.arange(100)), "y": Pool(torch.arange(1000, 1200))}
    calibration = {"sources": {"x": 1, "y": 2}, "samples": 9, "length": 10, "choose": "random"}
    windows, names = choose(pools, calibration, 0), sources_of(calibration)
    assert list(names) == ["x" if row[0] < 1000 else "y" for row in windows.tolist()]
    assert names.count("y") == 6


@pytest.fixture
def watched(monkeypatch):
    """Steps of an update, with the losses and references that it was given."""
    monkeypatch.setattr(module, "FEWEST_STEPS", 30)
    monkeypatch.setattr(module, "EVERY", 10)
    monkeypatch.setattr(MaskTrainer, "SAVE_SECONDS", 0.0)
    seen = []
    update = DomainLoader.update

    def watching(self, losses, references):
        update(self, losses, references)
        seen.append((losses.tolist(), references.tolist(), self.weights.tolist()))

    monkeypatch.setattr(DomainLoader, "update", watching)
    return seen


TOKENS = torch.cat([random_tokens(4, 24), torch.full((4, 24), 5)])  # noise, and what is soon learned
DOMAINS = ["noise", "noise", "noise", "noise", "same", "same", "same", "same"]


def run(state=None, domains=DOMAINS):
    anatomy = small_anatomy(n_layers=2)
    return sheared(anatomy, find_layouts(anatomy), TOKENS, 0.4, domains=domains, state=state)


def test_sheared_llama_trains_on_what_is_furthest_from_its_reference(watched):
    units, weights, _ = run()
    assert len(watched) == 2
    references = {tuple(x[1]) for x in watched}
    assert len(references) == 1, "the dense model's, measured once"
    excess = [[a - b for a, b in zip(x[0], x[1], strict=True)] for x in watched]
    last = watched[-1][2]
    first = [max(x, 0) for x in excess[0]]
    assert (last[0] > last[1]) == (sum(max(x[0], 0) for x in excess) > sum(max(x[1], 0) for x in excess))
    assert watched[0][2][0] == pytest.approx(
        (1 - 1e-4) * math.exp(first[0]) / (math.exp(first[0]) + math.exp(first[1])) + 5e-5, rel=1e-4
    )
    others = run(domains=())
    assert len(watched) == 2, "one source: all windows alike"
    assert not all(torch.equal(weights[name], others.weights[name]) for name in weights)
    assert units[0]["mlp"]


def test_weights_and_places_go_on_after_a_kill(watched, tmp_path, monkeypatch):
    whole = run()
    updates = list(watched)
    loss, taken = module.Shearing.loss, []

    def killed(self, step):
        taken.append(step)
        if len(taken) == 16:
            raise KeyboardInterrupt
        return loss(self, step)

    monkeypatch.setattr(module.Shearing, "loss", killed)
    state = FileState(tmp_path / "state.safetensors", "toy")
    with pytest.raises(KeyboardInterrupt):
        run(state)
    again = run(FileState(tmp_path / "state.safetensors", "toy"))
    assert taken == [*range(16), *range(15, 30)]
    assert watched[len(updates) :] == updates
    assert again.numbers == whole.numbers
    assert all(torch.equal(again.weights[name], weight) for name, weight in whole.weights.items())
