"""Settings files to begin with, one for each wish, with comments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from secateur.search.errors import UsageError
from secateur.spaces.names import nearest


@dataclass(frozen=True)
class Preset:
    """A settings file to begin with.

    Args:
        summary: what it is for, in a line.
        text: the file, with ``{model}`` for the name of a model.
    """

    summary: str
    text: str


_DATA = """evaluator:
  data: {calibration: docs, search: docs, test: docs}   # PATH.txt, PATH.jsonl:field, a directory, hub:owner/name
  window: 512                                           # tokens of a sequence
  fidelities: [2048, 8192]                              # tokens of a measurement; the last one decides
"""

PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "smaller-stock": Preset(
            "a smaller model that a stock class loads, without code of its own",
            """# A smaller model of equal blocks, which transformers loads with the class of its parent.
model: {model}
space:
  kind: architecture
  target: 0.3              # remove 30 % ...
  share_of: model          # ... of the whole model's parameters, not of its blocks' alone
  target_format: hf-stock  # equal blocks, in numbers that the stock class accepts
"""
            + _DATA
            + """objectives: [loss, params]
budget: {evaluations: 60}
seed: 0
# Then: secateur export runs/smaller-stock --max-params 0.72x --to MODEL
""",
        ),
        "faster-cpu": Preset(
            "a model that decodes faster on this machine's CPU",
            """# A model that takes less time a token on this CPU, by a table of its parts. Measure it first, here:
#   secateur latency {model}
model: {model}
device: cpu
space:
  kind: architecture
  of: latency_decode       # or latency_prefill, for long prompts
  target: 0.3              # save 30 % ...
  share_of: model          # ... of the whole model's time a token
  tied: true               # equal blocks, for a stock class; false: blocks of their own shapes, with a file of code
"""
            + _DATA
            + """  latency: {batch: 1, prompt: 512}                      # as `secateur latency` measured: its defaults
objectives: [loss, latency_decode]
budget: {evaluations: 60}
seed: 0
# Then: secateur export runs/faster-cpu --max-latency 0.72x --to MODEL
#       secateur latency MODEL --against {model}
""",
        ),
        "unstructured": Preset(
            "single weights set to zero, for studies of quality: no smaller, no faster on stock servers",
            """# The share of zeros of each linear layer, at two sparsities of the whole.
model: {model}
space:
  kind: allocation
  metric: wanda            # sparsegpt loses less and takes more disk; all: secateur list metrics
  target: [0.5, 0.6]       # shares of zeros
  step: 0.05               # distance of a layer's levels
controller: {{kind: evolution, start: trust_region}}   # few steps by gradients, then evolution from there
"""
            + _DATA
            + """objectives: [loss, sparsity]
budget: {evaluations: 100}
seed: 0
# Then: secateur export runs/unstructured --sparsity 0.6 --to MODEL
""",
        ),
        "metric": Preset(
            "a metric of your own, compared with published ones by the same search",
            """# A score of your own, as a formula of the weight W, input norms X, ...: secateur list metrics.
model: {model}
space:
  kind: allocation
  metric: "formula: abs(W) * sqrt(X)"
  comparison: output       # rank within each output, as Wanda does, or within the layer
  target: [0.4, 0.5, 0.6]
  step: 0.1
controller: {{kind: uniform}}   # the metric alone, the same share everywhere; evolution: with the best shares for it
"""
            + _DATA
            + """objectives: [loss, sparsity]
budget: {evaluations: 30}
seed: 0
# Against a published one: secateur search THIS -o space.metric=wanda --run runs/wanda
""",
        ),
        "recipe": Preset(
            "calibration data, importance, allocation and repair searched together; the result is a file for any model",
            """# What a person otherwise sets by hand, for structure: attention groups and FFN channels.
model: {model}
space:
  kind: recipe
  unit: structure          # or weights, blocks
  target: 0.2              # remove 20 % ...
  share_of: model          # ... of the whole model's parameters
controller: {{kind: optuna, sampler: tpe}}
"""
            + _DATA
            + """objectives: [loss, params]
budget: {evaluations: 60}
seed: 0
# Then: secateur recipe runs/recipe --to best.yaml; secateur prune OTHER --recipe best.yaml --to MODEL
""",
        ),
        "cluster": Preset(
            "many workers by Ray, mirrored into a database",
            """# Workers on the cluster whose head is at `address`; null starts Ray on this machine.
model: {model}
space: {{kind: allocation, metric: wanda, target: [0.5, 0.6]}}
controller: {{kind: surrogate, prior: sensitivity, sensitivity: {{by: curvature}}}}   # for many workers
"""
            + _DATA
            + """objectives: [loss, sparsity]
executor:
  kind: ray
  address: null            # auto: the cluster of this machine; HOST:PORT: another one
  workers: 2               # null: as many as there is room for
  cpus_per_worker: 1
  gpus_per_worker: 0       # 1, or a share such as 0.25; asked for only where it is not 0
storage: null              # postgresql://me:${PGPASSWORD}@HOST/DATABASE; the search goes on while it is down
budget: {evaluations: 200}
seed: 0
""",
        ),
    }
)


def preset_text(name: str, model: str) -> str:
    """Settings file of a preset for a model.

    Raises:
        UsageError: if there is no such preset.
    """
    if name not in PRESETS:
        raise UsageError(f"Expected a known `--preset`, got {name!r}.{nearest(name, PRESETS)}")
    return PRESETS[name].text.replace("{model}", model).replace("{{", "{").replace("}}", "}")
