"""Pruning methods: each once, with what it needs, its parameters, its paper and the path of its function.

A new method is a row here, or, from a package of somebody else's, an entry point of the group ``secateur.methods``.
Functions are imported at first use, so that this table loads no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import Any, Literal, get_args

from secateur.spaces.plugins import Registry, Row, resolve
from secateur.spaces.source import source_sha256

Stage = Literal["metric", "reconstruction", "importance", "repair", "allocation", "depth"]
Unit = Literal["weights", "structure", "blocks", "experts"]
UNITS: tuple[Unit, ...] = ("weights", "structure", "blocks", "experts")
"""Units of recipes."""

Scope = Literal["block", "model"]
Detail = Literal["nothing", "moments", "gram"]
"""Statistics of inputs: each detail includes those before it."""

Needs = Literal["nothing", "data", "moments", "gram"]
Gradients = Literal[
    "rms", "mean", "sums", "logits", "forward", "perturbed", "perturbed_round", "fisher", "fisher_outputs"
]
Evidence = Literal["scores", "influence", "flap", "outliers", "profile", "measured"]
Comparison = Literal["output", "layer"]
Gives = Literal["nothing", "weight", "bias", "both"]


@dataclass(frozen=True)
class Parameter:
    """One parameter of an allocation rule.

    Args:
        name: beside ``rule`` in a recipe.
        default: the published value.
        options: what a search tries: numbers, ascending, or names.
        low: the smallest number that makes sense.
        high: the largest number that makes sense.
    """

    name: str
    default: float | str
    options: tuple[float | str, ...]
    low: float = 0.0
    high: float = 1.0

    def check(self, value: object, rule: str) -> None:
        """Raise a ValueError unless the parameter may have this value."""
        if isinstance(self.default, str):
            allowed, fits = f"one of {', '.join(map(str, self.options))}", value in self.options
        else:
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            allowed = f"a number from {self.low:g} to {self.high:g}"
            fits = is_number and self.low <= value <= self.high  # type: ignore[operator]
        if not fits:
            raise ValueError(f"Expected `{self.name}` to be {allowed}, got {value!r} at the rule {rule}.")


@dataclass(frozen=True)
class MethodRow(Row):
    """One method; its function is as `SIGNATURES` says.

    Args:
        name: in settings and recipes; alone in its stage and unit.
        stage: the step of pruning that it does.
        unit: what it prunes: single weights, KV groups and FFN channels (structure), whole blocks, or routed experts;
            of an allocation rule one or more of these, not blocks.
        path: of its function, ``module:name``; of a metric of weights also of a formula (see `formulas.tree`).
        summary: one line for people.
        paper: address.
        needs: calibration statistics that must be collected first: any data, moments or Gram matrices of inputs.
        gradients: kinds of gradients that must be collected first, of `KINDS` or `PASS_KINDS`.
        evidence: further inputs: of an allocation rule, or ``influence`` of a depth rule.
        parameters: of an allocation rule.
        scope: what it works on at once, where that is not the usual of its stage: a reconstruction of whole blocks or
            of the model, a repair that needs the pruned model below.
        gives: what a repair changes beside what goes.
        comparison: of a metric or a reconstruction of weights, who competes with whom unless the settings say
            otherwise; None: nothing to choose.
        patterns: whether a reconstruction can prune n of m.
        trains: whether a repair of blocks trains by gradients.
        check_path: of a function that raises a ValueError on a model that the method can't be used on.
        measure_path: of an allocation rule with the evidence ``measured``, a function ``(anatomy, sample, *, some of
            its parameters, or the sparsity) -> a number a layer``, computed once for its windows and those parameters.
        searched: whether a search over recipes tries it where the settings name none; the first one of a unit is the
            default. Ours alone: what an installed package adds is tried where it is named.
    """

    name: str
    stage: Stage
    unit: Unit | tuple[Unit, ...]
    path: str
    summary: str
    paper: str = ""
    needs: Needs = "nothing"
    gradients: tuple[Gradients, ...] = ()
    evidence: tuple[Evidence, ...] = ()
    parameters: tuple[Parameter, ...] = ()
    scope: Scope | None = None
    gives: Gives = "nothing"
    comparison: Comparison | None = None
    patterns: bool = False
    trains: bool = False
    check_path: str = ""
    measure_path: str = ""
    searched: bool = False

    @property
    def units(self) -> tuple[Unit, ...]:
        """The units that it prunes."""
        return self.unit if isinstance(self.unit, tuple) else (self.unit,)

    @property
    def kind(self) -> str:
        """Stage, unit and scope in words, a key of `SIGNATURES`."""
        if self.stage == "metric" and self.gradients:
            return "metric of weights with gradients"
        of = "" if self.stage == "allocation" else f" of {self.units[0]}"
        return f"{self.stage}{of}" + (
            f", {'a' if self.scope == 'block' else 'the'} {self.scope} at once" if self.scope else ""
        )

    @property
    def inputs(self) -> Detail:
        """Statistics of inputs that the caller collects; methods of whole blocks and models collect their own."""
        return "nothing" if self.needs == "data" or self.scope else self.needs

    @property
    def function(self) -> Any:
        """Its function, or the formula that it is."""
        return resolve(self.path)

    @property
    def source(self) -> str:
        """Hash of the source of its function, see `source_sha256`."""
        return source_sha256(self.function)

    @property
    def check(self) -> Any:
        """The function at `check_path`."""
        return resolve(self.check_path)

    @property
    def measure(self) -> Any:
        """The function at `measure_path`."""
        return resolve(self.measure_path)

    def keys(self, name: str) -> tuple[str, ...]:
        return tuple(f"{self.stage}/{unit}/{self.name}" for unit in self.units)

    def check_beside(self, others: Mapping[str, Any]) -> None:
        for other in others.values():
            for parameter in {x.name for x in self.parameters} & {x.name for x in other.parameters}:
                raise ValueError(
                    f"Expected a new parameter, got {parameter!r}, which the rule {other.name} has."
                )


SIGNATURES: dict[str, str] = {
    "metric of weights": "(weight, inputs, generator) -> a score a weight, or a formula",
    "metric of weights with gradients": "(weight, inputs, generator, *, gradients, windows, dampening) -> scores",
    "reconstruction of weights": "(layer, sparsities) -> the weight at each sparsity",
    "reconstruction of weights, a block at once": "(anatomy, block, tokens, states, sparsity, *, dampening) -> weights",
    "reconstruction of weights, the model at once": "(anatomy, tokens, sparsity, *, dampening, protected) -> weights",
    "reconstruction of structure, the model at once": (
        "(anatomy, layouts, tokens, sparsity, *, protected) -> units, weights"
    ),
    "importance of structure": "(evidence) -> a score a unit",
    "importance of experts": "(evidence) -> a score an expert",
    "importance of experts, a block at once": "(evidence, counts) -> the kept experts of each count",
    "repair of experts": "(evidence, kept) -> the kept experts, and weights by name",
    "repair of weights": "(masked) -> the weight, or an addition to the bias",
    "repair of structure": "(inputs, counts) -> weights or biases, one a count",
    "repair of structure, the model at once": "(anatomy, layouts, stays, tokens) -> weights by projection",
    "repair of blocks": "(anatomy, runs, tokens, fitting) -> parameters by block",
    "allocation": "(layers, evidence, sparsity, *, its parameters) -> units that each layer loses",
    "depth of blocks": "(anatomy, tokens, whole) -> a score a block",
}
"""Parameters and results of the functions of each kind, see `MethodRow.kind`."""

ALL_BUT_BLOCKS: tuple[Unit, ...] = ("weights", "structure", "experts")

# fmt: off
TABLE: tuple[MethodRow, ...] = (
    # Scores of single weights, higher = keep.
    MethodRow("random", "metric", "weights", "secateur.pruners.weights.random:random",
              "uniform noise, a lower bound", comparison="output"),
    MethodRow("magnitude", "metric", "weights", "secateur.pruners.weights.magnitude:magnitude",
              "|w|", "https://arxiv.org/abs/1506.02626", comparison="layer"),
    MethodRow("wanda", "metric", "weights", "secateur.pruners.weights.wanda:wanda",
              "|w| times input norm", "https://arxiv.org/abs/2306.11695", needs="moments", comparison="output",
              searched=True),
    MethodRow("moe_pruner", "metric", "weights", "secateur.pruners.weights.moe_pruner:moe_pruner",
              "|w| times the norm of inputs weighted by the router, in experts; else Wanda",
              "https://arxiv.org/abs/2410.12013", needs="moments", comparison="output"),
    MethodRow("ria", "metric", "weights", "secateur.pruners.weights.ria:ria",
              "relative importance and activations", "https://openreview.net/forum?id=Tr0lPx9woF", needs="moments",
              comparison="output", searched=True),
    MethodRow("gblm", "metric", "weights", "secateur.pruners.weights.gblm:gblm",
              "|w| times input norm and gradient", "https://arxiv.org/abs/2311.04902", needs="moments",
              gradients=("rms",), comparison="output"),
    MethodRow("kfac", "metric", "weights", "secateur.pruners.weights.kfac:kfac",
              "foretold loss with the best update of the others, by Kronecker-factored curvature",
              "https://arxiv.org/abs/1503.05671", needs="gram", gradients=("fisher",), comparison="layer"),
    # Pruned weights, updated, or with a mask that is none of a ranking.
    MethodRow("sparsegpt", "reconstruction", "weights", "secateur.pruners.weights.sparsegpt:sparsegpt",
              "blocked optimal brain surgery with weight update", "https://arxiv.org/abs/2301.00774", needs="gram",
              patterns=True, searched=True),
    MethodRow("admm", "reconstruction", "weights", "secateur.pruners.weights.admm:admm",
              "Wanda's mask, weights fitted by alternating directions", "https://arxiv.org/abs/2401.02938",
              needs="gram", comparison="output", patterns=True),
    MethodRow("admm_gradual", "reconstruction", "weights", "secateur.pruners.weights.admm_gradual:admm_gradual",
              "alternating directions, the mask chosen between the steps", "https://arxiv.org/abs/2401.02938",
              needs="gram", comparison="layer", patterns=True),
    MethodRow("dsnot", "reconstruction", "weights", "secateur.pruners.weights.dsnot:dsnot",
              "Wanda's mask with weights swapped until mean outputs agree, no update",
              "https://arxiv.org/abs/2310.08915", needs="moments", comparison="output"),
    MethodRow("sparsellm", "reconstruction", "weights", "secateur.pruners.weights.sparsellm:sparsellm",
              "SparseGPT, with gate, up and down fitted to each other by turns", "https://arxiv.org/abs/2402.17946",
              needs="gram", scope="block", check_path="secateur.pruners.weights.sparsellm:check_gated"),
    MethodRow("llm_surgeon", "reconstruction", "weights", "secateur.pruners.weights.llm_surgeon:llm_surgeon",
              "The LLM Surgeon: pruned in 40 shots by Kronecker-factored curvature, with correlated updates",
              "https://arxiv.org/abs/2312.17244", needs="data", scope="model",
              check_path="secateur.pruners.weights.llm_surgeon:check_room"),
    # Scores of KV groups and FFN channels, higher = keep.
    MethodRow("wanda_sp", "importance", "structure", "secateur.pruners.structure.wanda_sp:wanda_sp",
              "|w| times input norm, mean over a column", "https://arxiv.org/abs/2312.11983", needs="moments",
              searched=True),
    MethodRow("flap", "importance", "structure", "secateur.pruners.structure.flap:flap",
              "input variance times squared column norm", "https://arxiv.org/abs/2312.11983", needs="moments",
              searched=True),
    MethodRow("cfsp", "importance", "structure", "secateur.pruners.structure.cfsp:cfsp",
              "share of the weights times input norm", "https://arxiv.org/abs/2409.13199", needs="moments",
              searched=True),
    MethodRow("obs", "importance", "structure", "secateur.pruners.structure.obs:obs",
              "greedy optimal brain surgery on the output columns", "https://arxiv.org/abs/2302.04089", needs="gram",
              searched=True),
    MethodRow("taylor", "importance", "structure", "secateur.pruners.structure.llm_pruner:taylor",
              "first-order effect, root mean square over windows", "https://arxiv.org/abs/2305.11627",
              gradients=("rms",)),
    MethodRow("activation", "importance", "structure", "secateur.pruners.structure.minitron:activation",
              "size of the input alone", "https://arxiv.org/abs/2407.14679", needs="moments"),
    MethodRow("magnitude", "importance", "structure", "secateur.pruners.structure.magnitude:magnitude",
              "norm of the output columns alone", "https://arxiv.org/abs/1608.08710"),
    MethodRow("llm_pruner_first", "importance", "structure", "secateur.pruners.structure.llm_pruner:first_order",
              "LLM-Pruner: |w g|, element-wise", "https://arxiv.org/abs/2305.11627", gradients=("mean",)),
    MethodRow("llm_pruner_vector", "importance", "structure", "secateur.pruners.structure.llm_pruner:vector_order",
              "LLM-Pruner: |sum of w g|, vector-wise", "https://arxiv.org/abs/2305.11627", gradients=("mean",)),
    MethodRow("llm_pruner_second", "importance", "structure", "secateur.pruners.structure.llm_pruner:second_order",
              "LLM-Pruner: w^2 times the Fisher diagonal", "https://arxiv.org/abs/2305.11627", gradients=("rms",)),
    MethodRow("llm_pruner_mixed", "importance", "structure", "secateur.pruners.structure.llm_pruner:mixed_order",
              "LLM-Pruner: first minus half the second order", "https://arxiv.org/abs/2305.11627",
              gradients=("rms", "mean")),
    MethodRow("llm_pruner_l1", "importance", "structure", "secateur.pruners.structure.llm_pruner:l1",
              "LLM-Pruner: sum of |w| of all that is coupled", "https://arxiv.org/abs/2305.11627"),
    MethodRow("llm_pruner_l2", "importance", "structure", "secateur.pruners.structure.llm_pruner:l2",
              "LLM-Pruner: sum of w^2 of all that is coupled", "https://arxiv.org/abs/2305.11627"),
    MethodRow("nirvana", "importance", "structure", "secateur.pruners.structure.nirvana:nirvana",
              "first-order effect on the logits' peaks, no labels", "https://arxiv.org/abs/2509.14230",
              gradients=("logits",)),
    MethodRow("saap", "importance", "structure", "secateur.pruners.structure.saap:saap",
              "coarse and fine first-order scores, weighted by their certainty", "https://arxiv.org/abs/2412.15127",
              gradients=("rms", "mean", "sums")),
    MethodRow("mini_llm", "importance", "structure", "secateur.pruners.structure.mini_llm:mini_llm",
              "|w g| times input norm, g estimated by forward passes alone", "https://arxiv.org/abs/2407.11681",
              needs="moments", gradients=("forward",)),
    MethodRow("bonsai", "importance", "structure", "secateur.pruners.structure.bonsai:bonsai",
              "Bonsai's regression once, over masks of half of the units: effect on the loss of leaving the unit out",
              "https://arxiv.org/abs/2402.05406", gradients=("perturbed",)),
    MethodRow("bonsai_round", "importance", "structure", "secateur.pruners.structure.bonsai:bonsai_round",
              "Bonsai's round: effect on the loss, by regression over masks of the lowest tenth",
              "https://arxiv.org/abs/2402.05406", gradients=("perturbed_round",)),
    MethodRow("llm_bip", "importance", "structure", "secateur.pruners.structure.llm_bip:llm_bip",
              "size of what the unit adds to the output", "https://arxiv.org/abs/2412.06419", needs="gram"),
    MethodRow("numerical", "importance", "structure", "secateur.pruners.structure.numerical:newton",
              "Numerical Pruning: relaxed mask by Newton's method", "https://arxiv.org/abs/2412.12441",
              needs="gram"),
    MethodRow("greedy_output", "importance", "structure", "secateur.pruners.structure.greedy_output:greedy_output",
              "channels by the error after a re-fit, groups by similarity", "https://arxiv.org/abs/2407.19126",
              needs="gram"),
    MethodRow("kfac", "importance", "structure", "secateur.pruners.structure.kfac:kfac",
              "foretold loss of the removal, by Kronecker-factored curvature", "https://arxiv.org/abs/1503.05671",
              needs="gram", gradients=("fisher_outputs",)),
    MethodRow("kfac_obs", "importance", "structure", "secateur.pruners.structure.kfac:kfac_obs",
              "greedy optimal brain surgery, outputs weighed by the curvature", "https://arxiv.org/abs/1503.05671",
              needs="gram", gradients=("fisher_outputs",)),
    # Scores of the routed experts of a mixture, higher = keep.
    MethodRow("reap", "importance", "experts", "secateur.pruners.experts.scores:reap",
              "mean of the router's weight times the norm of the expert's output", "https://arxiv.org/abs/2510.13999",
              needs="data", searched=True),
    MethodRow("frequency", "importance", "experts", "secateur.pruners.experts.scores:frequency",
              "share of the tokens that are routed to the expert", "https://arxiv.org/abs/2310.01334", needs="data",
              searched=True),
    MethodRow("mean_gate", "importance", "experts", "secateur.pruners.experts.scores:mean_gate",
              "mean weight with which tokens are routed to the expert", "https://arxiv.org/abs/2404.05089",
              needs="data", searched=True),
    MethodRow("easy_ep", "importance", "experts", "secateur.pruners.experts.scores:easy_ep",
              "weight times output norm, summed over tokens by how far the experts turn them",
              "https://arxiv.org/abs/2504.06792", needs="data", searched=True),
    MethodRow("nae", "importance", "experts", "secateur.pruners.experts.not_all_experts:kept_by_output",
              "Not All Experts: the set of experts that changes the mixture's output least",
              "https://arxiv.org/abs/2402.14800", needs="data", scope="block", searched=True),
    # Choice of KV groups and channels together with their weights.
    MethodRow("kprune", "reconstruction", "structure", "secateur.pruners.structure.knowledge:kprune",
              "K-prune: sub-layers chosen by their knowledge, cut and fitted to the dense stream, from the first up",
              "https://arxiv.org/abs/2308.03449", needs="data", scope="model",
              check_path="secateur.pruners.structure.knowledge:check"),
    # Repairs of masked projections.
    MethodRow("none", "repair", "weights", "secateur.pruners.weights.mask_repairs:nothing",
              "the kept weights are as they were", searched=True),
    MethodRow("bias", "repair", "weights", "secateur.pruners.weights.mask_repairs:mean_bias",
              "pruned inputs are replaced by their means", "https://arxiv.org/abs/2312.11983", needs="moments",
              gives="bias", searched=True),
    MethodRow("obs", "repair", "weights", "secateur.pruners.weights.mask_repairs:surgery",
              "SparseGPT's sweep over the columns, the mask given", "https://arxiv.org/abs/2301.00774", needs="gram",
              gives="weight", searched=True),
    MethodRow("admm", "repair", "weights", "secateur.pruners.weights.mask_repairs:alternating",
              "the kept weights are fitted by alternating directions", "https://arxiv.org/abs/2401.02938",
              needs="gram", gives="weight", searched=True),
    # Repairs of output projections whose inputs were cut.
    MethodRow("none", "repair", "structure", "secateur.pruners.structure.refit:nothing",
              "the kept weights are as they were", searched=True),
    MethodRow("bias", "repair", "structure", "secateur.pruners.structure.flap:mean_bias",
              "removed inputs are replaced by their means", "https://arxiv.org/abs/2312.11983", needs="moments",
              gives="bias", searched=True),
    MethodRow("refit", "repair", "structure", "secateur.pruners.structure.refit:least_squares",
              "ridge regression of the dense output on the kept inputs", "https://arxiv.org/abs/2308.03449",
              needs="gram", gives="weight", searched=True),
    MethodRow("obs", "repair", "structure", "secateur.pruners.structure.obs:obs_update",
              "optimal brain surgery: least change of the weights too", "https://arxiv.org/abs/2302.04089",
              needs="gram", gives="weight", searched=True),
    MethodRow("liar", "repair", "structure", "secateur.pruners.structure.liar:interpolated",
              "removed inputs are replaced by their prediction from the kept ones, with a bias",
              "https://arxiv.org/abs/2407.13331", needs="gram", gives="both"),
    MethodRow("admm", "repair", "structure", "secateur.pruners.structure.refit:alternating",
              "the kept weights are fitted by alternating directions", "https://arxiv.org/abs/2401.02938",
              needs="gram", gives="weight", searched=True),
    MethodRow("kprune", "repair", "structure", "secateur.pruners.structure.kprune:reconstructed",
              "least squares of what is missing to the dense stream, from the first block up",
              "https://arxiv.org/abs/2308.03449", needs="gram", gives="weight", scope="model",
              check_path="secateur.pruners.structure.kprune:check_stream"),
    # Merging of experts that go into those that stay.
    MethodRow("none", "repair", "experts", "secateur.pruners.experts.merging:nothing",
              "the kept experts are as they were", searched=True),
    MethodRow("ream", "repair", "experts", "secateur.pruners.experts.merging:ream",
              "aligned and averaged into the kept expert with the most similar gated outputs, weighted by REAP",
              "https://arxiv.org/abs/2604.04356", needs="data", gives="weight", searched=True),
    MethodRow("mc_smoe", "repair", "experts", "secateur.pruners.experts.merging:mc_smoe",
              "aligned and averaged into the kept expert that the router chooses alike, weighted by frequency",
              "https://arxiv.org/abs/2310.01334", needs="data", gives="weight", searched=True),
    MethodRow("hc_smoe", "repair", "experts", "secateur.pruners.experts.merging:hc_smoe",
              "clusters of alike mean outputs are averaged, weighted by frequency",
              "https://arxiv.org/abs/2410.08589", needs="data", gives="weight", searched=True),
    # Repairs of the block before dropped ones.
    MethodRow("none", "repair", "blocks", "secateur.pruners.depth.merge_targets:nothing",
              "the kept weights are as they were", searched=True),
    MethodRow("laco", "repair", "blocks", "secateur.pruners.depth.laco:merged",
              "the block before takes over the sum of their differences to it", "https://arxiv.org/abs/2402.11187",
              gives="weight", searched=True),
    MethodRow("mka", "repair", "blocks", "secateur.pruners.depth.mka:fused_by_similarity",
              "the block before is averaged with them by similarity", "https://arxiv.org/abs/2406.16330",
              needs="data", gives="weight", searched=True),
    MethodRow("streamline", "repair", "blocks", "secateur.pruners.depth.streamline:replacements",
              "the block before is trained to give what they gave", "https://arxiv.org/abs/2403.19135", needs="data",
              gives="weight", trains=True),
    # Allocation rules of recipes: how many units each layer loses.
    MethodRow("uniform", "allocation", ALL_BUT_BLOCKS, "secateur.pruners.recipes.allocation.uniform:uniform",
              "the same share everywhere, first and last blocks may be left alone",
              "https://arxiv.org/abs/2305.11627",
              parameters=(Parameter("skip_first", 0.0, (0.0, 0.0625, 0.125, 0.1875, 0.25), high=0.9),
                          Parameter("skip_last", 0.0, (0.0, 0.0625, 0.125, 0.1875, 0.25), high=0.9),),
              searched=True),
    MethodRow("global", "allocation", ALL_BUT_BLOCKS, "secateur.pruners.recipes.allocation.threshold:one_threshold",
              "one threshold for the scores of all layers", "https://arxiv.org/abs/2412.12441", evidence=("scores",),
              parameters=(Parameter("normalise", "none", ("none", "mean", "max", "zscore", "l2", "mask")),
                          Parameter("cost", 0.0, (-1.0, -0.5, 0.0, 0.5, 1.0), low=-2.0, high=2.0),),
              searched=True),
    MethodRow("flap", "allocation", "structure", "secateur.pruners.structure.flap:allocation",
              "one threshold for the standardised fluctuations of all layers", "https://arxiv.org/abs/2312.11983",
              evidence=("flap",), searched=True),
    MethodRow("nirvana", "allocation", "structure", "secateur.pruners.recipes.allocation.nirvana:nirvana",
              "MLPs lose a multiple of what attentions lose, with a threshold for each",
              "https://arxiv.org/abs/2509.14230", evidence=("scores",),
              parameters=(Parameter("gamma", 3.36, (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.36, 4.0, 6.0), 0.01, 100.0),),
              searched=True),
    MethodRow("cfsp", "allocation", ALL_BUT_BLOCKS, "secateur.pruners.recipes.allocation.cfsp:cfsp",
              "the share that blocks keep follows the sigmoid of their influence",
              "https://arxiv.org/abs/2409.13199", evidence=("influence",),
              parameters=(Parameter("a", 1.0, (0.25, 0.5, 1.0, 2.0, 4.0), high=100.0),
                          Parameter("sublayers", "mlp", ("mlp", "both")),), searched=True),
    MethodRow("adapt", "allocation", ALL_BUT_BLOCKS, "secateur.pruners.recipes.allocation.adapt:adapt",
              "shares that grow step by step, faster where blocks matter less", "https://arxiv.org/abs/2502.03460",
              evidence=("influence",),
              parameters=(Parameter("rate", 0.02, (0.005, 0.01, 0.015, 0.02, 0.03, 0.04)),), searched=True),
    MethodRow("owl", "allocation", "weights", "secateur.pruners.recipes.allocation.owl:owl",
              "layers with many outliers lose less", "https://arxiv.org/abs/2310.05175", evidence=("outliers",),
              parameters=(Parameter("spread", 0.08, (0.02, 0.04, 0.08, 0.12, 0.16, 0.2)),
                          Parameter("factor", 5.0, (3.0, 5.0, 7.0, 10.0), low=1.0, high=1000.0),),
              searched=True),
    MethodRow("owl_released", "allocation", "weights", "secateur.pruners.recipes.allocation.owl:owl_released",
              "OWL as its released code maps outliers, onto the whole range", "https://arxiv.org/abs/2310.05175",
              needs="moments", evidence=("measured",),
              measure_path="secateur.pruners.recipes.allocation.owl:released_outliers",
              parameters=(Parameter("owl_lambda", 0.08, (0.02, 0.04, 0.08, 0.12, 0.16, 0.2)),
                          Parameter("owl_m", 5.0, (3.0, 5.0, 7.0, 10.0), low=1.0, high=1000.0),)),
    MethodRow("dlp", "allocation", "weights", "secateur.pruners.recipes.allocation.dlp:dlp",
              "blocks with a larger median score lose more", "https://arxiv.org/abs/2505.23807",
              needs="moments", evidence=("measured",),
              measure_path="secateur.pruners.recipes.allocation.dlp:central_scores",
              parameters=(Parameter("alpha", 0.15, (0.02, 0.05, 0.1, 0.15, 0.2, 0.25)),
                          Parameter("centre", "median", ("median", "mean")),)),
    MethodRow("atp", "allocation", ALL_BUT_BLOCKS, "secateur.pruners.recipes.allocation.atp:atp",
              "shares that grow by the same amount from block to block", "https://arxiv.org/abs/2502.14770",
              parameters=(Parameter("slope", 0.5, (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)),)),
    MethodRow("alphapruning", "allocation", "weights",
              "secateur.pruners.recipes.allocation.alphapruning:alphapruning",
              "blocks lose less whose weights' spectra have heavier tails", "https://arxiv.org/abs/2410.10912",
              evidence=("measured",),
              measure_path="secateur.pruners.recipes.allocation.alphapruning:block_exponents",
              parameters=(Parameter("epsilon", 0.3, (0.1, 0.2, 0.3, 0.4, 0.5)),)),
    MethodRow("sap", "allocation", "weights", "secateur.pruners.recipes.allocation.sap:sap",
              "layers lose more whose weights are sparser by themselves, by the PQ index",
              "https://arxiv.org/abs/2302.05601", evidence=("measured",),
              measure_path="secateur.pruners.recipes.allocation.sap:pq_indices",
              parameters=(Parameter("pq_p", 0.5, (0.25, 0.5, 0.75), 0.05, 0.95),
                          Parameter("pq_q", 1.0, (1.0, 1.5, 2.0), 1.0, 2.0),
                          Parameter("eta", 0.0, (0.0, 0.001, 0.01, 0.1, 1.0)),)),
    MethodRow("dsa", "allocation", "weights", "secateur.pruners.recipes.allocation.dsa:dsa",
              "blocks lose more whose scores vary more, by the function that a search found",
              "https://nips.cc/virtual/2024/poster/93422", needs="moments", evidence=("measured",),
              measure_path="secateur.pruners.recipes.allocation.dsa:log_variances",
              parameters=(Parameter("dsa_lambda", 0.08, (0.02, 0.04, 0.08, 0.12, 0.16, 0.2)),)),
    MethodRow("blockpruner", "allocation", "structure", "secateur.pruners.recipes.allocation.sublayers:in_turn",
              "whole sub-layers, one after the other, without which the loss is lowest",
              "https://arxiv.org/abs/2406.10594", needs="data", evidence=("measured",),
              measure_path="secateur.pruners.recipes.allocation.sublayers:by_loss"),
    MethodRow("finercut", "allocation", "structure", "secateur.pruners.recipes.allocation.sublayers:in_turn",
              "whole sub-layers, one after the other, without which the outputs change least",
              "https://arxiv.org/abs/2405.18218", needs="data", evidence=("measured",),
              measure_path="secateur.pruners.recipes.allocation.sublayers:by_divergence"),
    MethodRow("profile", "allocation", ALL_BUT_BLOCKS, "secateur.pruners.recipes.allocation.profile:shares_of_file",
              "shares from a file", "https://arxiv.org/abs/2410.14649", evidence=("profile",)),
    MethodRow("prefix", "allocation", "structure", "secateur.pruners.recipes.allocation.profile:prefix",
              "whole sub-layers in the order of a file", "https://arxiv.org/abs/2406.10594", evidence=("profile",)),
    # Scores of whole blocks, higher = keep.
    MethodRow("shortgpt", "depth", "blocks", "secateur.pruners.depth.shortgpt:shortgpt",
              "blocks go first that turn their input least", "https://arxiv.org/abs/2403.03853", needs="data",
              evidence=("influence",), searched=True),
    MethodRow("last", "depth", "blocks", "secateur.pruners.depth.last:position",
              "the last blocks go first", "https://arxiv.org/abs/2411.15558", searched=True),
    MethodRow("shortened_ppl", "depth", "blocks", "secateur.pruners.depth.shortened:loss_without",
              "blocks go first without which the loss is lowest", "https://arxiv.org/abs/2402.02834", needs="data",
              searched=True),
    MethodRow("sleb", "depth", "blocks", "secateur.pruners.depth.sleb:sleb",
              "the same, with the first and the last block kept; measured again after each one with a schedule",
              "https://arxiv.org/abs/2402.09025", needs="data"),
    MethodRow("shortened_taylor", "depth", "blocks", "secateur.pruners.depth.shortened:taylor_plus",
              "blocks of least first-order effect go first, the ends last", "https://arxiv.org/abs/2402.02834",
              needs="data", gradients=("mean",), searched=True),
    MethodRow("laco", "depth", "blocks", "secateur.pruners.depth.laco:by_acceptance",
              "blocks go first whose merge into the block before keeps the last hidden states",
              "https://arxiv.org/abs/2402.11187", needs="data"),
    MethodRow("mka", "depth", "blocks", "secateur.pruners.depth.mka:by_similarity",
              "blocks go first whose outputs lie as those of the block before", "https://arxiv.org/abs/2406.16330",
              needs="data"),
    MethodRow("angular", "depth", "blocks", "secateur.pruners.depth.angular:by_angle",
              "blocks go first in the window that turns the last token least", "https://arxiv.org/abs/2403.17887",
              needs="data"),
    MethodRow("streamline", "depth", "blocks", "secateur.pruners.depth.streamline:by_window",
              "blocks go first in the window that turns its input least", "https://arxiv.org/abs/2403.19135",
              needs="data"),
)
# fmt: on

METHODS: Registry[MethodRow] = Registry(
    "secateur.methods", MethodRow, {key: row for row in TABLE for key in row.keys(row.name)}
)
"""All methods by ``stage/unit/name``."""


OWN_NEEDS: dict[Stage, Needs] = {"metric": "moments", "importance": "moments"}
"""Stages that a path may name a function of, with what such a function is given."""

REGISTERED: dict[str, MethodRow] = {}
"""Rows that this process has registered, by name and by path, see `register_metric`."""

_PATH = re.compile(r"[^\W\d]\w*(?:\.[^\W\d]\w*)*:[^\W\d]\w*(?:\.[^\W\d]\w*)*")


def is_path(name: str) -> bool:
    """True of the path of a function, ``package.module:function``."""
    return _PATH.fullmatch(name) is not None and not name.startswith("formula:")


def own_row(name: str, stage: Stage, unit: Unit) -> MethodRow | None:
    """Row of a registered name, or of the function or row at a path; None of any other name.

    The path's module is imported, by the rules of Python's own imports. A function that its module does not register
    is given moments of inputs, and its scores are compared per output.

    Raises:
        ValueError: if there is no such module or function.
    """
    if name in REGISTERED or not is_path(name):
        return REGISTERED.get(name)
    try:
        found = resolve(name)
    except (Exception, SystemExit) as error:  # other people's modules may raise anything
        why = " ".join(str(error).split())
        raise ValueError(
            f"Expected `{stage}` to be a function that can be imported, got {name!r}: {type(error).__name__}: {why} "
            "Install its package, or put its directory on PYTHONPATH."
        ) from error
    if isinstance(found, MethodRow):
        return replace(found, name=name)
    if name in REGISTERED:  # by its module
        return REGISTERED[name]
    if not callable(found):
        raise ValueError(
            f"Expected `{stage}` to be a function or a MethodRow, got {found!r:.40} at {name!r}."
        )
    comparison: Comparison | None = "output" if unit == "weights" else None
    return MethodRow(name, stage, unit, name, "of your own", needs=OWN_NEEDS[stage], comparison=comparison)


class Methods(Mapping[str, MethodRow]):
    """The methods of a stage by name, in the table's order, then those registered; a path names one of one's own.

    Args:
        stage: the stage.
        unit: what they prune, one or several; None: any.
        scope: what they work on at once; None: any. The table's rows without one are of the usual scope, ``""``.
    """

    def __init__(
        self,
        stage: Stage,
        unit: Unit | tuple[Unit, ...] | None = None,
        scope: Scope | Literal[""] | None = None,
    ) -> None:
        self._stage, self._scope = stage, scope
        self._units = get_args(Unit) if unit is None else unit if isinstance(unit, tuple) else (unit,)

    def __getitem__(self, name: str) -> MethodRow:
        row = self._rows.get(name) or (own_row(name, self._stage, self._units[0]) if self._named else None)
        if row is None or row.stage != self._stage or set(self._units).isdisjoint(row.units):
            raise KeyError(name)
        return row

    def __iter__(self) -> Iterator[str]:
        yield from self._rows
        own = {row.name: row for row in REGISTERED.values()} if self._named else {}
        yield from (x for x, row in own.items() if row.stage == self._stage and row.units[0] in self._units)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    @property
    def _named(self) -> bool:
        """True if one's own functions may be of this kind."""
        return (
            self._stage in OWN_NEEDS and len(self._units) == 1 and self._units[0] in ("weights", "structure")
        )

    @cached_property
    def _rows(self) -> dict[str, MethodRow]:
        return {
            row.name: row
            for row in METHODS.values()
            if row.stage == self._stage
            and not set(self._units).isdisjoint(row.units)
            and (self._scope is None or (row.scope or "") == self._scope)
        }


METRICS = Methods("metric", "weights")
RECONSTRUCTIONS = Methods("reconstruction", "weights", "")
BLOCK_RECONSTRUCTIONS = Methods("reconstruction", "weights", "block")
MODEL_RECONSTRUCTIONS = Methods("reconstruction", "weights", "model")
"""Those with one threshold of their own under the rule ``global``."""
UPDATES = Methods("reconstruction", "weights")
"""All of them: metrics of recipes that have no scores, and repair by themselves."""
IMPORTANCES = Methods("importance", "structure")
UNIT_RECONSTRUCTIONS = Methods("reconstruction", "structure", "model")
"""Metrics of recipes that choose units and fit what stays by themselves, under the rule ``global``."""
EXPERT_IMPORTANCES = Methods("importance", "experts")
RULES = Methods("allocation")
DEPTH = Methods("depth", "blocks")
MASK_REPAIRS = Methods("repair", "weights")
CUT_REPAIRS = Methods("repair", "structure", "")
EXPERT_REPAIRS = Methods("repair", "experts")
UNIT_REPAIRS = Methods("repair", ("structure", "experts"), "")
"""Those of KV groups and channels, and of experts: one name may be of both."""
STREAM_REPAIRS = Methods("repair", "structure", "model")
DEPTH_REPAIRS = Methods("repair", "blocks")
REPAIRS: dict[Unit, Methods] = {unit: Methods("repair", unit) for unit in UNITS}


def metrics_of(unit: Unit) -> Mapping[str, MethodRow]:
    """Metrics that recipes of a unit may name, beside formulas and the blend."""
    found: dict[str, Mapping[str, MethodRow]] = {
        "weights": _Together(METRICS, UPDATES),
        "structure": _Together(IMPORTANCES, UNIT_RECONSTRUCTIONS),
        "experts": EXPERT_IMPORTANCES,
    }
    return found.get(unit, DEPTH)


class _Together(Mapping[str, MethodRow]):
    """Several mappings as one, in their order."""

    def __init__(self, *parts: Mapping[str, MethodRow]) -> None:
        self._parts = parts

    def __getitem__(self, name: str) -> MethodRow:
        part = next((part for part in self._parts if name in part), self._parts[-1])
        return part[name]

    def __iter__(self) -> Iterator[str]:
        return chain(*self._parts)

    def __len__(self) -> int:
        return sum(map(len, self._parts))


def has_scores(metric: str) -> bool:
    """False for metrics of recipes that choose what stays by themselves, without scores that rules could compare."""
    choosing = EXPERT_IMPORTANCES.get(metric)
    return not repairs_itself(metric) and (choosing is None or not choosing.scope)


def repairs_itself(metric: str) -> bool:
    """True for metrics of recipes that give weights, too."""
    return metric in UPDATES or metric in UNIT_RECONSTRUCTIONS


def searched(rows: Mapping[str, MethodRow]) -> tuple[str, ...]:
    """Names that a search tries where the settings name none."""
    return tuple(name for name, row in rows.items() if row.searched and not row.origin)
