"""Published methods as recipes: starting points and baselines of a search."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from secateur.spaces.methods import Unit


@dataclass(frozen=True)
class Known:
    """A published method.

    Its calibration data are whoever runs it's: published ones differ in text and amount, and what is compared should
    not. Training afterwards, which many of the papers have, is no part of a recipe.

    Args:
        unit: what it removes.
        form: the sections metric, allocation and repair of its plain form; what is left out is at its default.
        paper: address.
        summary: one line, with what differs from the paper.
    """

    unit: Unit
    form: Mapping[str, Any]
    paper: str
    summary: str


_FLAP = "https://arxiv.org/abs/2312.11983"
_LLM_PRUNER = "https://arxiv.org/abs/2305.11627"
_SHORTENED = "https://arxiv.org/abs/2402.02834"
_ENDS = {"rule": "uniform", "skip_first": 0.125, "skip_last": 0.0625}  # 4 and 2 of 32 blocks stay dense


def _llm_pruner(variant: str, summary: str) -> Known:
    form = {"metric": f"llm_pruner_{variant}", "allocation": _ENDS}
    return Known("structure", form, _LLM_PRUNER, f"LLM-Pruner, {summary}; first and last blocks stay dense")


_WEIGHTS = {
    "magnitude": Known(
        "weights",
        {"metric": {"name": "magnitude", "comparison": "layer"}},
        "https://arxiv.org/abs/1506.02626",
        "smallest weights of each layer",
    ),
    "wanda": Known(
        "weights",
        {"metric": "wanda"},
        "https://arxiv.org/abs/2306.11695",
        "weight times input norm, by output",
    ),
    "ria": Known(
        "weights",
        {"metric": "ria"},
        "https://openreview.net/forum?id=Tr0lPx9woF",
        "relative importance and activations, without channel permutation",
    ),
    "gblm": Known(
        "weights",
        {"metric": "gblm"},
        "https://arxiv.org/abs/2311.04902",
        "input norms and gradients together",
    ),
    "pruner-zero": Known(
        "weights",
        {"metric": "formula: abs(W * W) * minmax(G)"},
        "https://arxiv.org/abs/2406.02924",
        "the best formula published",
    ),
    "sparsegpt": Known(
        "weights",
        {"metric": "sparsegpt"},
        "https://arxiv.org/abs/2301.00774",
        "optimal brain surgery; statistics of the dense model throughout",
    ),
    "sparsellm": Known(
        "weights",
        {"metric": "sparsellm"},
        "https://arxiv.org/abs/2402.17946",
        "SparseGPT, with gate, up and down fitted to each other by turns",
    ),
    "admm": Known(
        "weights",
        {"metric": "wanda", "repair": "admm"},
        "https://arxiv.org/abs/2401.02938",
        "Wanda's mask, weights fitted by alternating directions",
    ),
    "dsnot": Known(
        "weights",
        {"metric": "dsnot"},
        "https://arxiv.org/abs/2310.08915",
        "Wanda's mask after swaps of weights",
    ),
    "owl": Known(
        "weights",
        {"metric": "wanda", "allocation": {"rule": "owl", "spread": 0.08, "factor": 5}},
        "https://arxiv.org/abs/2310.05175",
        "Wanda, blocks with more outliers less sparse",
    ),
}

_STRUCTURE = {
    "wanda_sp": Known(
        "structure", {"metric": "wanda_sp"}, _FLAP, "Wanda summed over columns, the same share everywhere"
    ),
    "magnitude_sp": Known(
        "structure",
        {"metric": "magnitude"},
        "https://arxiv.org/abs/1608.08710",
        "norm of the output columns alone",
    ),
    "flap": Known(
        "structure",
        {"metric": "flap", "allocation": "flap", "repair": "bias"},
        _FLAP,
        "fluctuation, one threshold for standardised scores, means into biases",
    ),
    "llm_pruner_first": _llm_pruner("first", "first order, element-wise"),
    "llm_pruner_vector": _llm_pruner("vector", "first order, vector-wise"),
    "llm_pruner_second": _llm_pruner("second", "Fisher diagonal"),
    "llm_pruner_mixed": _llm_pruner("mixed", "first and second order"),
    "llm_pruner_l1": _llm_pruner("l1", "sums of |w|"),
    "llm_pruner_l2": _llm_pruner("l2", "sums of w^2"),
    "taylor": Known(
        "structure", {"metric": "taylor"}, _LLM_PRUNER, "first-order effect, root mean square over windows"
    ),
    "nirvana": Known(
        "structure",
        {"metric": "nirvana", "allocation": {"rule": "nirvana", "gamma": 3.36}},
        "https://arxiv.org/abs/2509.14230",
        "peaks of logits; MLPs lose 3.36 times the share of attentions; subset of calibration data not selected",
    ),
    "saap": Known(
        "structure",
        {"metric": "saap", "allocation": {"rule": "global", "normalise": "zscore"}},
        "https://arxiv.org/abs/2412.15127",
        "coarse and fine first-order scores, one threshold; inferred from the abstract",
    ),
    "cfsp": Known(
        "structure",
        {"metric": "cfsp", "allocation": {"rule": "cfsp", "a": 1, "sublayers": "mlp"}},
        "https://arxiv.org/abs/2409.13199",
        "channels alone, more of them where blocks turn their input less; row-wise shares as the text means them",
    ),
    "llm_bip": Known(
        "structure",
        {"metric": "llm_bip"},
        "https://arxiv.org/abs/2412.06419",
        "what a unit adds to the output; inferred from the abstract, without training",
    ),
    "numerical": Known(
        "structure",
        {
            "metric": "numerical",
            "allocation": {"rule": "global", "normalise": "mask", "cost": 1},
            "repair": "obs",
        },
        "https://arxiv.org/abs/2412.12441",
        "relaxed mask by Newton's method, one threshold, closed-form compensation",
    ),
    "kprune": Known(
        "structure",
        {
            "metric": {"name": "blend", "order": "none", "activation": 1.0, "norm": 2, "reduce": "output"},
            "repair": "kprune",
        },
        "https://arxiv.org/abs/2308.03449",
        "its reconstruction, over the representational part of its score; shares are alike",
    ),
    "greedy_output": Known(
        "structure",
        {"metric": "greedy_output", "repair": "refit"},
        "https://arxiv.org/abs/2407.19126",
        "error of the output after a re-fit; inferred from the abstract",
    ),
    "minitron": Known(
        "structure",
        {"metric": "activation"},
        "https://arxiv.org/abs/2407.14679",
        "size of activations, width alone",
    ),
    "mini_llm": Known(
        "structure",
        {"metric": "mini_llm"},
        "https://arxiv.org/abs/2407.11681",
        "weight, activation and gradients estimated by forward passes; inferred from the abstract",
    ),
    "bonsai": Known(
        "structure",
        {"metric": "bonsai", "allocation": {"rule": "global", "normalise": "none"}},
        "https://arxiv.org/abs/2402.05406",
        "regression over random perturbations, one round",
    ),
    "adapt_pruner": Known(
        "structure",
        {"metric": "llm_pruner_first", "allocation": {"rule": "adapt", "rate": 0.02}},
        "https://arxiv.org/abs/2502.03460",
        "blocks that turn their input less lose more; influence of the dense model throughout",
    ),
    "ziplm": Known(
        "structure",
        {"metric": "obs", "repair": "obs"},
        "https://arxiv.org/abs/2302.04089",
        "greedy optimal brain surgery, the same share everywhere in place of its search by latency",
    ),
}

_BLOCKS = {
    "shortgpt": Known(
        "blocks",
        {"metric": "shortgpt"},
        "https://arxiv.org/abs/2403.03853",
        "blocks that turn their input least",
    ),
    "last": Known("blocks", {"metric": "last"}, "https://arxiv.org/abs/2411.15558", "the last blocks"),
    "shortened_ppl": Known(
        "blocks", {"metric": "shortened_ppl"}, _SHORTENED, "blocks without which the loss is lowest"
    ),
    "shortened_taylor": Known(
        "blocks", {"metric": "shortened_taylor"}, _SHORTENED, "blocks of least first-order effect"
    ),
    "laco": Known(
        "blocks",
        {"metric": "laco", "repair": "laco"},
        "https://arxiv.org/abs/2402.11187",
        "blocks merged into an earlier one by their differences from it",
    ),
    "mka": Known(
        "blocks",
        {"metric": "mka", "repair": "mka"},
        "https://arxiv.org/abs/2406.16330",
        "similar blocks merged, weighted by their similarity",
    ),
    "streamline": Known(
        "blocks",
        {"metric": "streamline", "repair": "streamline"},
        "https://arxiv.org/abs/2403.19135",
        "a run of blocks replaced by one that is trained on hidden states",
    ),
}

KNOWN: dict[str, Known] = {**_WEIGHTS, **_STRUCTURE, **_BLOCKS}
