"""Published methods as recipes: starting points and baselines of a search."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from secateur.spaces.method import MethodRow, Unit
from secateur.spaces.method_table import TABLE
from secateur.spaces.methods import REPAIRS, RULES, metrics_of
from secateur.spaces.recipe.form import completed
from secateur.spaces.recipe.schedule import trained_tokens


@dataclass(frozen=True)
class KnownRecipe:
    """A published method, calibrated on the user's data; training is a part of it where the method has a schedule.

    Args:
        unit: what it removes.
        form: the sections metric, allocation, schedule and repair of its plain form; omitted ones are at their
            defaults.
        paper: address.
        summary: one line, with differences from the paper.
        calibration: published windows and tokens of a window; None: not found in its text or code.
    """

    unit: Unit
    form: Mapping[str, Any]
    paper: str
    summary: str
    calibration: tuple[int, int] | None = None

    @property
    def inferred(self) -> bool:
        """True if something that the paper leaves open is inferred, which the summary says."""
        return "inferred" in self.summary

    @property
    def uses_data(self) -> bool:
        """False if calibration data, and so the seed that draws them, decide nothing."""
        form = completed({"unit": self.unit, "sparsity": 0.5, **self.form})
        if trained_tokens(form):
            return True
        rows = [metrics_of(self.unit).get(form["metric"]["name"]), REPAIRS[self.unit][form["repair"]]]
        rows += [RULES[form["allocation"]["rule"]]] if "allocation" in form else []
        return any(row is None or _takes_data(row) for row in rows)


_PAPERS = {(row.unit, row.name): row.paper for row in TABLE if row.stage not in ("allocation", "repair")}
_ENDS = {"rule": "uniform", "skip_first": 0.125, "skip_last": 0.0625}  # 4 and 2 of 32 blocks stay dense


def _takes_data(row: MethodRow) -> bool:
    """True if a method looks at calibration data, or draws."""
    looks = {"influence", "flap", "outliers"}.intersection(row.evidence)
    return row.needs != "nothing" or bool(row.gradients) or bool(looks) or row.name == "random"


def _of(
    unit: Unit,
    metric: str | dict[str, Any],
    summary: str,
    paper: str = "",
    calibration: tuple[int, int] | None = None,
    **further: Any,
) -> KnownRecipe:
    """A row; its paper is that of the metric unless its address or arXiv number is given."""
    name = metric if isinstance(metric, str) else metric["name"]
    given = paper if paper.startswith("https") else f"https://arxiv.org/abs/{paper}"
    address = given if paper else _PAPERS[unit, name]
    return KnownRecipe(unit, {"metric": metric, **further}, address, summary, calibration)


# fmt: off
KNOWN: dict[str, KnownRecipe] = {
    "magnitude": _of("weights", {"name": "magnitude", "comparison": "layer"}, "smallest weights of each layer"),
    "wanda": _of("weights", "wanda", "weight times input norm, by output", calibration=(128, 2048)),
    "moe_pruner": _of("weights", "moe_pruner",
        "Wanda with an expert's inputs weighted by the router; without its distillation"),
    "ria": _of("weights", "ria", "relative importance and activations, without channel permutation",
        calibration=(128, 2048)),
    "gblm": _of("weights", "gblm", "input norms and gradients together", calibration=(128, 2048)),
    "pruner-zero": _of("weights", "formula: abs(W * W) * minmax(G)", "the best formula published", "2406.02924",
        calibration=(128, 2048)),
    "sparsegpt": _of("weights", "sparsegpt", "optimal brain surgery; statistics of the dense model throughout",
        calibration=(128, 2048)),
    "sparsellm": _of("weights", "sparsellm", "SparseGPT, with gate, up and down fitted to each other by turns",
        calibration=(32, 2048)),
    "llm_surgeon": _of("weights", "llm_surgeon",
        "The LLM Surgeon, 40 shots under one threshold for all layers, single weights", allocation="global"),
    "smp": _of("weights", "smp",
        "Static Model Pruning, SMP-S: scores learned by the loss, weights frozen; few steps", allocation="global"),
    "smp_local": _of("weights", "smp", "Static Model Pruning, SMP-L: the same share of each layer; few steps"),
    "admm": _of("weights", "wanda",
        "Wanda's mask, weights fitted by alternating directions", "2401.02938", repair="admm",
        calibration=(128, 2048)),
    "admm_gradual": _of("weights", "admm_gradual",
        "mask chosen between the steps of alternating directions; statistics of the dense model throughout",
        calibration=(128, 2048)),
    "dsnot": _of("weights", "dsnot", "Wanda's mask after swaps of weights", calibration=(128, 2048)),
    "gradual": _of("weights", {"name": "magnitude", "comparison": "layer"},
        "gradual magnitude: eight rounds on a cubic schedule, each with training; projections alone, few tokens",
        "1710.01878", schedule={"steps": 8, "shape": "cubic", "retrain": 8192}),
    "journey_matters": _of("weights", {"name": "magnitude", "comparison": "layer"},
        "magnitude in rounds from 25 to 75 % of the training; their number and even sizes are inferred, and few tokens",
        "2501.12486", schedule={"steps": 9, "before": 16384, "retrain": 4096, "after": 12288}),
    "owl": _of("weights", "wanda",
        "Wanda, blocks with more outliers less sparse",
        "2310.05175", allocation={"rule": "owl", "spread": 0.08, "factor": 5}, calibration=(128, 2048)),
    "owl_released": _of("weights", "wanda",
        "Wanda, OWL as its released code maps outliers", "2310.05175", allocation="owl_released",
        calibration=(128, 2048)),
    "dlp": _of("weights", "wanda", "Wanda, blocks with a larger median score sparser", "2505.23807", allocation="dlp"),
    "atp": _of("weights", "wanda",
        "Wanda, sparser by the same amount from block to block; its slope is not searched", "2502.14770",
        allocation="atp"),
    "alphapruning": _of("weights", "wanda",
        "Wanda, blocks with heavier-tailed spectra less sparse", "2410.10912", allocation="alphapruning",
        calibration=(128, 2048)),
    "sap": _of("weights", {"name": "magnitude", "comparison": "layer"},
        "magnitude, layers sparser by their PQ index; at once, without training between", "2302.05601",
        allocation="sap"),
    "dsa": _of("weights", "wanda",
        "Wanda, blocks whose scores vary more sparser, by the released function",
        "https://nips.cc/virtual/2024/poster/93422", allocation="dsa"),
    "besa": _of("weights", "wanda",
        "Wanda, shares of a block's projections learned by its reconstruction error", "2402.16880", allocation="besa",
        calibration=(128, 2048)),
    "d_pruner": _of("weights", {"name": "d_pruner", "comparison": "layer"},
        "D-Pruner: domain and general text, each layer alike; gradients of the dense model, its learning rate inferred",
        calibration=(1000, 1024)),
    "mathneuro": _of("weights", "mathneuro",
        "removes a skill: weights for the calibration text that the contrast text does not need"),
    "damage_wanda": _of("weights", "damage_wanda", "Wanda, tokens weighted by the damage to their predictions; ours"),
    "wanda_sp": _of("structure", "wanda_sp", "Wanda summed over columns, the same share everywhere",
        calibration=(128, 128)),
    "magnitude_sp": _of("structure", "magnitude", "norm of the output columns alone"),
    "flap": _of("structure", "flap",
        "fluctuation, one threshold for standardised scores, means into biases", allocation="flap", repair="bias",
        calibration=(1024, 128)),
    "llm_pruner_first": _of("structure", "llm_pruner_first",
        "LLM-Pruner, first order, element-wise; first and last blocks stay dense", allocation=_ENDS,
        calibration=(10, 64)),
    "llm_pruner_vector": _of("structure", "llm_pruner_vector",
        "LLM-Pruner, first order, vector-wise; first and last blocks stay dense", allocation=_ENDS,
        calibration=(10, 64)),
    "llm_pruner_second": _of("structure", "llm_pruner_second",
        "LLM-Pruner, Fisher diagonal; first and last blocks stay dense", allocation=_ENDS, calibration=(10, 64)),
    "llm_pruner_mixed": _of("structure", "llm_pruner_mixed",
        "LLM-Pruner, first and second order; first and last blocks stay dense", allocation=_ENDS,
        calibration=(10, 64)),
    "llm_pruner_l1": _of("structure", "llm_pruner_l1",
        "LLM-Pruner, sums of |w|; first and last blocks stay dense", allocation=_ENDS),
    "llm_pruner_l2": _of("structure", "llm_pruner_l2",
        "LLM-Pruner, sums of w^2; first and last blocks stay dense", allocation=_ENDS),
    "taylor": _of("structure", "taylor", "first-order effect, root mean square over windows"),
    "nirvana": _of("structure", "nirvana",
        "peaks of logits; MLPs lose 3.36 times the share of attentions; its choice of data is examples/nirvana.yaml",
        allocation={"rule": "nirvana", "gamma": 3.36}, calibration=(32, 128)),
    "saap": _of("structure", "saap",
        "coarse and fine first-order scores, one threshold; inferred from the abstract",
        allocation={"rule": "global", "normalise": "zscore"}),
    "blockpruner": _of("structure", "wanda_sp",
        "whole sub-layers, one after the other, without which the loss is lowest; the last one in part, by wanda_sp",
        "2406.10594", allocation="blockpruner", calibration=(256, 2048)),
    "finercut": _of("structure", "wanda_sp",
        "whole sub-layers, one after the other, without which outputs change least; the last one in part, by wanda_sp",
        "2405.18218", allocation="finercut", calibration=(10, 256)),
    "cfsp": _of("structure", "cfsp",
        "channels alone, more of them where blocks turn their input less; row-wise shares as the text means them",
        allocation={"rule": "cfsp", "a": 1, "sublayers": "mlp"}, calibration=(128, 1024)),
    "llm_bip": _of("structure", "llm_bip",
        "what a unit adds to the output; inferred from the abstract, without training"),
    "numerical": _of("structure", "numerical",
        "relaxed mask by Newton's method, one threshold, closed-form compensation",
        allocation={"rule": "global", "normalise": "mask", "cost": 1}, repair="obs"),
    "kprune": _of("structure", "kprune",
        "sub-layers chosen by predictive and representational knowledge and fitted anew, from the first up",
        allocation="global"),
    "sheared": _of("structure", "sheared",
        "Sheared LLaMA: units for equal shapes, learned with their weights; few steps, no training after",
        allocation="global"),
    "sheared_2_7b": _of("structure", {"name": "sheared", "hidden": 0.5},
        "Sheared LLaMA, its shape for 2.7B: hidden width and units alike; few steps, no training after",
        allocation="global"),
    "sheared_1_3b": _of("structure", {"name": "sheared", "blocks": 0.17, "hidden": 0.41},
        "Sheared LLaMA, its shape for 1.3B: fewer blocks, hidden width, units; few steps, no training after",
        allocation="global"),
    "loraprune": _of("structure", "loraprune",
        "LoRAPrune: units go while updates are tuned; first tenth of the blocks and last one stay whole; few steps",
        allocation="global"),
    "compresso": _of("structure", "compresso",
        "Compresso: units and low-rank updates learned under one budget; without its prompt; few steps",
        allocation="global"),
    "lorashear": _of("structure", "lorashear",
        "LoRAShear: redundant units fade while updates are tuned; numbers inferred; few steps, without its recovery",
        allocation="global"),
    "apt": _of("structure", "apt",
        "APT: units go by salience and outliers while updates grow, self-distilled; few steps, without hidden channels",
        allocation="global"),
    "pat": _of("structure", "pat",
        "PAT: one hidden width by a learned mask, with modules and updates tuned meanwhile; few steps",
        allocation="global"),
    "learned_threshold": _of("structure", "wanda_sp",
        "Wanda summed over columns, a threshold a sub-layer learned by the loss, after LAPP; formulas inferred",
        "2309.14157", allocation="learned_threshold"),
    "kprune_tuning": _of("structure",
        {"name": "blend", "order": "none", "activation": 1.0, "norm": 2, "reduce": "output"},
        "its reconstruction alone, over the representational part of its score; shares are alike",
        "2308.03449", repair="kprune"),
    "greedy_output": _of("structure", "greedy_output",
        "error of the output after a re-fit; inferred from the abstract", repair="refit"),
    "minitron": _of("structure", "activation", "size of activations, width alone"),
    "mini_llm": _of("structure", "mini_llm",
        "weight, activation and gradients estimated by forward passes; inferred from the abstract"),
    "mini_gpts": _of("structure", "mini_gpts",
        "Mini-GPTs: mean activations on the domain under one threshold; units of attention and MLP alone",
        allocation={"rule": "global", "normalise": "none"}),
    "fairness": _of("structure", "fairness",
        "Fairness-aware pruning of KV groups; bias by the likelihood of the contrast text",
        allocation={"rule": "global", "normalise": "none"}),
    "pruning_by_explaining": _of("structure", "relevance",
        "least layer-wise relevance for the next tokens, under one threshold; rules of language models",
        allocation={"rule": "global", "normalise": "none"}),
    "bonsai": _of("structure", "bonsai_round",
        "rounds of 5 %, in each a regression over 200 random masks of what is left; without training",
        allocation={"rule": "global", "normalise": "none"}, schedule={"step": 0.05}),
    "bonsai_at_once": _of("structure", "bonsai",
        "its regression once, over masks of half of the units", allocation={"rule": "global", "normalise": "none"}),
    "adapt_pruner": _of("structure", "llm_pruner_first",
        "blocks that turn their input less lose more; influence of the dense model throughout",
        "2502.03460", allocation={"rule": "adapt", "rate": 0.02}, calibration=(512, 64)),
    "adapt_pruner_rounds": _of("structure", "llm_pruner_first",
        "Adapt-Pruner in rounds of 2 %: influence and gradients of what is left, shares of what is left",
        "2502.03460", allocation={"rule": "adapt", "rate": 0.02}, schedule={"step": 0.02}, calibration=(512, 64)),
    "adapt_accel": _of("structure", "llm_pruner_first",
        "Adapt-Accel: Adapt-Pruner in twenty rounds, each with training; projections alone, few tokens",
        "2502.03460", allocation={"rule": "adapt", "rate": 0.02},
        schedule={"steps": 20, "retrain": 4096, "lr": 2e-5}, calibration=(512, 64)),
    "transact": _of("structure", "transact",
        "TransAct: eight rounds by norms of transitional activations, each with training; whole KV groups, few tokens",
        schedule={"steps": 8, "retrain": 8192, "lr": 5e-5}, calibration=(128, 4096)),
    "dress": _of("structure", "wanda_sp",
        "DReSS: what will go is regularised on data, then cut; choice and penalty are inferred from the abstract",
        "2501.17905", schedule={"retrain": 65536, "penalty": 0.01}),
    "efficientllm": _of("structure", "llm_pruner_first",
        "EfficientLLM: saliency under one threshold, second-order updates and training in twenty rounds; inferred from "
        "the abstract, without the stream's width, few tokens",
        "2502.06663", allocation={"rule": "global", "normalise": "none", "cost": 1}, repair="obs",
        schedule={"steps": 20, "retrain": 4096}),
    "minitron_distilled": _of("structure", "activation",
        "Minitron: width by the size of activations, then distillation of the logits; projections alone, few tokens",
        schedule={"after": 65536, "loss": "kl"}),
    "ziplm": _of("structure", "obs",
        "greedy optimal brain surgery, the same share everywhere in place of its search by latency", repair="obs"),
    "reap": _of("experts", "reap", "experts with small outputs times router weights, the same number of each block"),
    "frequency": _of("experts", "frequency", "experts that few tokens are routed to, the same number of each block"),
    "mean_gate": _of("experts", "mean_gate",
        "experts of little mean router weight; the soft counting of SEER-MoE, inferred from its abstract"),
    "easy_ep": _of("experts", "easy_ep", "router weight times output norm, over tokens that the experts turn"),
    "nae": _of("experts", "nae", "Not All Experts: the set without which the block's output changes least"),
    "ream": _of("experts", "reap",
        "REAP's experts stay, the others are merged into them by gated outputs", "2604.04356", repair="ream"),
    "mc_smoe": _of("experts", "frequency",
        "M-SMoE: experts of the highest frequencies in all blocks stay, others are merged into them by logits; not its "
        "low ranks",
        "2310.01334", allocation={"rule": "global", "normalise": "none", "cost": 0}, repair="mc_smoe"),
    "hc_smoe": _of("experts", "frequency",
        "clusters of experts with alike mean outputs are merged", "2410.08589", repair="hc_smoe"),
    "shortgpt": _of("blocks", "shortgpt", "blocks that turn their input least"),
    "last": _of("blocks", "last", "the last blocks"),
    "shortened_ppl": _of("blocks", "shortened_ppl", "blocks without which the loss is lowest", calibration=(10, 128)),
    "sleb": _of("blocks", "sleb",
        "the block without which the loss is lowest, one after the other", schedule={"step": 0.001},
        calibration=(128, 2048)),
    "shortened_taylor": _of("blocks", "shortened_taylor", "blocks of least first-order effect",
        calibration=(10, 128)),
    "minitron_depth": _of("blocks", "shortened_ppl",
        "Minitron: depth by the loss without each block, then distillation of logits; projections alone, few tokens",
        "2407.14679", schedule={"after": 65536, "loss": "kl"}),
    "laco": _of("blocks", "laco", "blocks merged into an earlier one by their differences from it", repair="laco"),
    "mka": _of("blocks", "mka", "similar blocks merged, weighted by their similarity", repair="mka"),
    "angular": _of("blocks", "angular", "the window of blocks that turns the last token least, without healing"),
    "streamline": _of("blocks", "streamline",
        "a run of blocks replaced by one that is trained on hidden states", repair="streamline"),
}
# fmt: on
