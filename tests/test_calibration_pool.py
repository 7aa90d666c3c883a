"""The pool of calibration windows: what the dense model says of them, and which of them a recipe takes."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.evaluators.data.sources import TextError
from secateur.evaluators.data.text import load_parts, load_sources
from secateur.pruners.calibration.choose import CLUSTERS, choose
from secateur.pruners.calibration.pool import (
    Pool,
    build_pools,
    load_pools,
    pool_identity,
    save_pools,
)
from secateur.pruners.calibration.tokens import tokenize
from secateur.spaces.recipe.keys import CHUNK
from tests.cut_models import small_tokenizer
from tests.models import random_tokens, small_anatomy

N_CHUNKS = 64


def numbered(n_tokens, first=0):
    """Tokens that say where they stand."""
    return torch.arange(first, first + n_tokens)


def plain(**changes):
    return {"sources": {"a": 1}, "samples": 4, "length": CHUNK, "choose": "random", "subset": 0, **changes}


@pytest.fixture(scope="module")
def pools():
    """Losses that fall with the number of the chunk; states in eight groups of different sizes around corners."""
    sizes = [20, 14, 10, 8, 5, 4, 2, 1]
    groups = np.random.default_rng(1).permutation(np.repeat(np.arange(8), sizes))
    noise = 0.01 * torch.randn(N_CHUNKS, 8, generator=torch.Generator().manual_seed(0))
    known = Pool(
        numbered(N_CHUNKS * CHUNK),
        torch.linspace(5, 1, N_CHUNKS),
        torch.eye(8)[groups] + noise,
    )
    return {"a": known, "b": Pool(numbered(1000, 100_000)), "c": Pool(numbered(40, 200_000))}


def starts(windows, length=CHUNK):
    """The number in its source of each window, which must be whole and consecutive."""
    assert windows.shape[1] == length
    assert torch.equal(windows, windows[:, :1] + torch.arange(length))
    first = windows[:, 0] % 100_000
    assert (first % length == 0).all()
    return (first // length).tolist()


# --- what the dense model says ---


def test_chunks_are_judged_by_the_dense_model_alone_and_each_for_itself():
    anatomy, tokens = small_anatomy(), random_tokens(1, 40 * CHUNK + 7)[0]
    pool = build_pools(anatomy, {"a": tokens}, look=True)["a"]
    assert torch.equal(pool.tokens, tokens)
    assert pool.nll.shape == (40,)
    for index in (0, 31, 32, 39):
        chunk = tokens[index * CHUNK : (index + 1) * CHUNK]
        found = anatomy.model(chunk[None], output_hidden_states=True)
        wanted = F.cross_entropy(found.logits[0, :-1], chunk[1:])
        assert torch.allclose(pool.nll[index], wanted, atol=1e-5)
        assert torch.allclose(pool.states[index], found.hidden_states[-1][0].mean(0), atol=1e-5)


def test_pools_are_looked_at_only_where_it_is_asked_for():
    short, nothing = random_tokens(1, CHUNK - 1)[0], torch.empty(0, dtype=torch.int64)
    assert build_pools(small_anatomy(), {"a": short}, look=False)["a"] == Pool(short)
    for tokens in (short, nothing):
        pool = build_pools(small_anatomy(), {"a": tokens}, look=True)["a"]
        assert (pool.nll.shape, pool.states.shape) == ((0,), (0, 32))


def test_looking_at_pools_says_how_far_it_is():
    shares = []
    texts = {
        "a": random_tokens(1, 3000, seed=1)[0],
        "b": random_tokens(1, 1100, seed=2)[0],
        "c": torch.arange(5),
    }
    build_pools(small_anatomy(), texts, look=True, on_share=shares.append)
    whole = 2976 + 1088  # in chunks of 32; batches are of 1024 tokens
    assert shares == [n / whole for n in (1024, 2048, 2976, 4000, 4064)]


def test_pools_are_kept_in_a_file_under_what_they_depend_on(tmp_path, pools):
    path = tmp_path / "pool.safetensors"
    texts = {"a": "hash of one", "b.c": "hash of two"}
    identity = pool_identity("m float32", texts, 64, look=True)
    assert load_pools(path, identity) is None
    save_pools(path, {"a": pools["a"], "b.c": pools["b"]}, identity)
    for read in (load_pools(path, identity), load_pools(path)):
        assert read.keys() == {"a", "b.c"}
        assert all(torch.equal(x, getattr(pools["a"], name)) for name, x in vars(read["a"]).items())
        assert read["b.c"].nll is None
    others = [
        pool_identity("n float32", texts, 64, look=True),
        pool_identity("m float32", texts, 65, look=True),
        pool_identity("m float32", texts, 64, look=False),
        pool_identity("m float32", {"a": texts["b.c"], "b.c": texts["a"]}, 64, look=True),
    ]
    assert len({identity, *others}) == 5
    assert [load_pools(path, other) for other in others] == [None] * 4
    path.write_bytes(path.read_bytes()[:100])
    assert load_pools(path) is None


def test_a_pool_is_the_beginning_of_its_text():
    tokenizer, text = small_tokenizer(), "some words of the text"
    every = tokenize(tokenizer, text, 1000)
    assert every.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert torch.equal(tokenize(tokenizer, text, 5), every[:5])


# --- which windows ---


def test_random_subsets_are_frozen_and_differ(pools):
    one, again, other = (
        starts(choose(pools, plain(subset=subset, samples=16), seed=0)) for subset in (3, 3, 4)
    )
    assert one == again
    assert len(set(one)) == 16
    assert one != other
    assert one != starts(choose(pools, plain(subset=3, samples=16), seed=1))
    assert set(starts(choose(pools, plain(samples=N_CHUNKS), seed=0))) == set(range(N_CHUNKS))


@pytest.mark.parametrize("length", [CHUNK, 2 * CHUNK])
def test_quantiles_are_windows_of_these_ranks_of_the_loss(pools, length):
    n = N_CHUNKS * CHUNK // length

    def between(low, high, samples):
        asked = plain(choose="loss", quantiles=[low, high], samples=samples, length=length)
        return set(starts(choose(pools, asked, seed=0), length))

    # Losses fall, so the last windows have the lowest.
    assert between(0, 0.25, n // 4) == set(range(n - n // 4, n))
    assert between(0.75, 1, n // 4) == set(range(n // 4))
    assert between(0.25, 0.75, n // 2) == set(range(n // 4, n - n // 4))


def test_the_loss_of_a_window_is_that_of_its_chunks():
    losses = torch.tensor([9.0, 1, 4, 4, 3, 3.5])  # windows of two: 5, 4, 3.25
    pool = {"a": Pool(numbered(6 * CHUNK), losses, torch.zeros(6, 2))}
    asked = plain(choose="loss", quantiles=[0, 1 / 3], samples=1, length=2 * CHUNK)
    assert starts(choose(pool, asked, seed=0), 2 * CHUNK) == [2]
    assert starts(choose(pool, asked | {"quantiles": [1 / 3, 2 / 3]}, seed=0), 2 * CHUNK) == [1]


def test_clusters_are_groups_of_alike_states_the_largest_first(pools):
    states = pools["a"].states
    seen = []
    for cluster in range(CLUSTERS):
        found = []
        for samples in range(1, N_CHUNKS):
            try:
                found = starts(
                    choose(pools, plain(choose="clusters", clusters=[cluster], samples=samples), 0)
                )
            except ValueError:
                break
        groups = Counter(int(states[index].argmax()) for index in found)
        assert len(groups) == 1  # one corner, all of it
        seen.append((len(found), next(iter(groups))))
    assert [n for n, _ in seen] == [20, 14, 10, 8, 5, 4, 2, 1]
    assert len({group for _, group in seen}) == CLUSTERS
    both = starts(choose(pools, plain(choose="clusters", clusters=[0, 6], samples=22), seed=0))
    assert {int(states[index].argmax()) for index in both} == {seen[0][1], seen[6][1]}


def test_windows_that_are_all_alike_are_one_cluster():
    pool = {"a": Pool(numbered(6 * CHUNK), torch.ones(6), torch.ones(6, 2))}
    assert len(choose(pool, plain(choose="clusters", clusters=[0], samples=6), seed=0)) == 6
    with pytest.raises(ValueError, match="Expected at least 1 windows"):
        choose(pool, plain(choose="clusters", clusters=[1], samples=1), seed=0)


CHOICES = [
    {"choose": "random", "subset": 2},
    {"choose": "loss", "quantiles": [0.25, 0.9]},
    {"choose": "clusters", "clusters": [0, 1, 2]},
]


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: choice["choose"])
def test_fewer_samples_are_the_first_ones_of_more(pools, choice):
    more = choose(pools, plain(**choice, samples=32), seed=5)
    for samples in (1, 7, 31):
        assert torch.equal(choose(pools, plain(**choice, samples=samples), seed=5), more[:samples])


@settings(max_examples=60)
@given(
    weights=st.lists(st.integers(0, 6), min_size=1, max_size=4).filter(any),
    samples=st.integers(1, 40),
)
def test_mixtures_have_their_shares_and_are_nested(weights, samples):
    shares = {f"s{i}": weight for i, weight in enumerate(weights)}
    many = {name: Pool(numbered(40 * CHUNK, i * 100_000)) for i, name in enumerate(shares)}
    windows = choose(many, plain(sources=shares, samples=samples), seed=0)
    counts = Counter((windows[:, 0] // 100_000).tolist())
    for i, weight in enumerate(weights):
        wanted = samples * weight / sum(weights)
        assert counts[i] == wanted if samples % sum(weights) == 0 else abs(counts[i] - wanted) < 1
    assert torch.equal(choose(many, plain(sources=shares, samples=40), seed=0)[:samples], windows)
    backwards = dict(reversed(shares.items()))
    assert torch.equal(choose(many, plain(sources=backwards, samples=samples), seed=0), windows)


def test_windows_of_a_source_do_not_depend_on_the_mixture(pools):
    alone = starts(choose(pools, plain(samples=3), seed=0))
    mixed = choose(pools, plain(sources={"a": 1, "b": 1}, samples=6), seed=0)
    assert starts(mixed[mixed[:, 0] < 100_000]) == alone


def test_too_few_windows_are_named(pools):
    with pytest.raises(
        ValueError, match=r"Expected at least 2 windows of 32 tokens of source 'c', got 1\. Take"
    ):
        choose(pools, plain(sources={"a": 1, "c": 1}), seed=0)
    asked = plain(choose="loss", quantiles=[0.0, 0.1], samples=7)
    with pytest.raises(
        ValueError, match=r"source 'a' between the quantiles 0\.0 and 0\.1 of the loss, got 6"
    ):
        choose(pools, asked, seed=0)
    with pytest.raises(ValueError, match=r"source 'a' in the clusters \[6, 7\], got 3"):
        choose(pools, plain(choose="clusters", clusters=[6, 7]), seed=0)
    with pytest.raises(ValueError, match="of 64 tokens of source 'c', got 0"):
        choose(pools, plain(sources={"c": 1}, length=64), seed=0)


def test_lengths_and_sources_that_do_not_fit_are_named(pools):
    assert choose(pools, plain(length=10), seed=0).shape == (4, 10)
    with pytest.raises(ValueError, match=r"multiple of 32 with `choose: loss`, got 40\. Take 32"):
        choose(pools, plain(choose="loss", quantiles=[0, 1], length=40), seed=0)
    with pytest.raises(ValueError, match=r"among \['a', 'b', 'c'\], got 'code'"):
        choose(pools, plain(sources={"code": 1}), seed=0)


# --- further texts ---

LINES = "".join(f"line {i} of the file\n" for i in range(200))


@pytest.fixture
def files(tmp_path):
    for name, text in (("lines", LINES), ("more", LINES.upper()), ("copy", LINES)):
        (tmp_path / f"{name}.txt").write_text(text)
    return {name: str(tmp_path / f"{name}.txt") for name in ("lines", "more", "copy")}


def test_further_texts_are_read_whole_and_the_calibration_text_as_it_is_cut(files):
    of = files["lines"], files["lines"], files["lines"]
    sources = {
        "same": files["lines"],
        "default": "",
        "more": files["more"],
        "some": f"{files['more']}[0:0.5]",
    }
    found = load_sources(sources, *of)
    assert list(found) == list(sources)
    assert found["same"].text == found["default"].text == load_parts(*of)["calibration"].text
    assert found["default"].source == f"{files['lines']}[0.0:0.3]"
    again = load_sources({"x": found["default"].source}, "docs", *[f"{files['lines']}[0.3:1]"] * 2)
    assert again["x"].text == found["default"].text
    half = load_sources({"x": f"{files['lines']}[0:0.5]"}, *[f"{files['lines']}[0:0.5]"] * 3)
    assert half["x"].source == f"{files['lines']}[0.0:0.15]"
    assert found["more"].text == LINES.upper()
    assert LINES.upper().startswith(found["some"].text)
    assert {text.part for text in found.values()} == {"calibration"}


def test_further_texts_that_overlap_with_what_is_measured_on_are_refused(files):
    lines, more = files["lines"], files["more"]
    overlap = r"Expected disjoint texts, got `sources\.x: .*` and `data\.{}: .*`, which overlap"
    with pytest.raises(TextError, match=overlap.format("search")):
        load_sources({"x": lines}, more, f"{lines}[0.5:0.7]", f"{lines}[0.8:1]")
    with pytest.raises(TextError, match=overlap.format("test")):
        load_sources({"x": f"{lines}[0:0.9]"}, f"{more}[0:0.5]", f"{more}[0.5:1]", f"{lines}[0.8:1]")
    with pytest.raises(TextError, match=overlap.format("search")):  # cut for search and test, not for this
        load_sources({"x": lines}, more, lines, lines)
    with pytest.raises(TextError, match=r"the same content in `sources\.x` .* and `data\.test`"):
        load_sources({"x": files["copy"]}, f"{more}[0:0.5]", f"{more}[0.5:1]", lines)
    found = load_sources({"x": f"{lines}[0:0.8]"}, f"{more}[0:0.5]", f"{more}[0.5:1]", f"{lines}[0.8:1]")
    assert LINES.startswith(found["x"].text)


def test_a_further_text_that_is_missing_is_named(files, tmp_path):
    of = files["more"], f"{files['lines']}[0:0.5]", f"{files['lines']}[0.5:1]"
    with pytest.raises(TextError, match=r"Expected `sources\.x` to be docs, a file.*does not exist"):
        load_sources({"x": str(tmp_path / "none.txt")}, *of)
    with pytest.raises(TextError, match=r"Expected text in `sources\.x`"):
        load_sources({"x": f"{files['more']}[0:0.0001]"}, *of)
