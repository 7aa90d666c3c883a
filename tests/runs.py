"""A run as a search leaves it, without a model: two blocks, losses from a formula."""

from pathlib import Path

import numpy as np

from secateur.search.results.run import Run
from secateur.search.settings.settings import Settings, resolved, settings_from
from secateur.search.study.about import About
from secateur.search.study.study import Study
from secateur.spaces.measurement import Fidelity, Measurement
from secateur.spaces.registry import SPACES
from secateur.spaces.shape import ModelShape, Prunable

SEARCH, SMALL, TEST = Fidelity("search", 2048), Fidelity("search", 1024), Fidelity("test", 1024)
N_WINDOWS = 5
REASON = "Expected finite losses, got <nan>."
LINEARS = [
    Prunable(f"model.layers.{block}.{name}", block, name.partition(".")[0], n_weights)
    for block in range(2)
    for name, n_weights in (("self_attn.q_proj", 64), ("self_attn.o_proj", 64), ("mlp.down_proj", 128))
]
SHAPE = ModelShape(n_params=1000, bytes_per_param=4.0, macs_per_token=512, kv_bytes_per_token=64)


def make_settings(**changes) -> Settings:
    raw = {
        "model": "tiny",
        "space": {"target": [0.3, 0.6]},
        "objectives": ["loss", "params"],
        "evaluator": {"fidelities": [1024, 2048], "test_tokens": 1024},
        "budget": {"evaluations": 30},
    }
    return settings_from({**raw, **changes})


def make_space(settings: Settings):
    return SPACES[settings.space.kind].build(settings.space, LINEARS, SHAPE)


def measure(space, candidate, fidelity: Fidelity) -> Measurement:
    """The later a linear, the more it hurts to prune it, in each window of the test to another degree."""
    sparsity = np.array(list(space.config(candidate)["sparsity"].values()))
    kl = float((np.arange(1, 1 + len(sparsity)) * sparsity**3).sum()) * (
        1.5 if fidelity.part == "test" else 1
    )
    values = {"loss": kl, "kl": kl, "ce": 3.0 + kl, **space.cost(candidate)}
    windows = ()
    if fidelity.part == "test":
        weights = 1 + 0.3 * np.sin(np.arange(N_WINDOWS)[:, None] + np.arange(len(sparsity)))
        losses = (weights * np.arange(1, 1 + len(sparsity)) * sparsity**3).sum(1)
        windows = tuple((losses * (kl / losses.mean() if kl else 1)).tolist())
    return Measurement(
        candidate.text,
        fidelity,
        values,
        n_tokens=fidelity.n_tokens,
        seconds=0.5,
        blocks=3,
        blocks_saved=1,
        windows=windows,
    )


def make_run(directory: Path, n_trials: int = 12, *, draws: int = 0, **changes) -> Run:
    """A run with baselines, random trials, one failure, and the front on the test part."""
    settings = make_settings(**changes)
    space = make_space(settings)
    shape = {"linears": [vars(linear) for linear in LINEARS], **vars(SHAPE)}
    about = About(
        identity={"content": {"model": "4dd0", "test_text": "7e57"}},
        baselines={name: candidate.text for name, candidate in space.baselines().items()},
        facts={"shape": shape, "versions": {"torch": "2.13.0"}},
    )
    rng = np.random.default_rng(draws)
    with Study.open_or_create(directory, resolved(settings), about) as study:
        sampled = [space.sample(rng, i % len(space.targets)) for i in range(n_trials)]
        wanted = {c.text: c for c in [*space.baselines().values(), *sampled]}
        study.append([measure(space, candidate, SEARCH) for candidate in wanted.values()])
        study.append([Measurement(sampled[0].text, SMALL, infeasible=REASON, n_tokens=1024)])
        view = Run(study)
        shown = dict.fromkeys(t.measurement.candidate for t in [*view.front(), *view.baselines.values()])
        study.append([measure(space, space.parse(text), TEST) for text in shown])
    return Run(Study.open(directory))
