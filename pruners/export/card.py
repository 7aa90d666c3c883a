"""The model card of an exported model: short, with the numbers and the label."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from yaml import YAMLError

from secateur.pruners.export.gguf_file import FILE
from secateur.pruners.export.manifest import MANIFEST, Manifest
from secateur.pruners.models.checkpoints.hub import hub_file
from secateur.spaces.measurement import perplexity_of

CARD = "README.md"
HERE = "path/to/this/directory"
RATIO, ENDS = "loss ratio", ("low", "high")
"""Names in `Manifest.measured` of a ratio of test losses, and of the ends of its interval."""
OF_SAVED = ("as exported", "as recovered")
"""Endings of the names of measurements that were made on the saved model itself."""


def card(manifest: Manifest, repo: str = HERE, revision: str | None = None) -> str:
    """The text of ``README.md``, as the hub shows it.

    Args:
        manifest: of the export.
        repo: hub id that the lines on loading name; `HERE`: the directory, wherever it is.
        revision: branch of it; None: the main one.
    """
    made = ModelCard.from_template(
        _data(manifest, repo),
        template_str=_CARD,
        manifest=manifest,
        what=_structure(manifest) if manifest.kept else _zeros(manifest),
        notes=_notes(manifest),
        loading=_loading(manifest, repo, revision),
        method=_listed(manifest.method),
        calibration=_listed(manifest.calibration),
        rows=[
            *_measured_rows(manifest),
            *((n.replace("_", " "), _cell(x)) for n, x in manifest.checks.items()),
        ],
        path=MANIFEST,
    )
    return f"{made}\n"


def _measured_rows(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """Measurements as names and values, first the ratio of the test loss with its interval."""
    for where, values in manifest.measured.items():
        for name, value in values.items():
            if name == RATIO:
                yield f"{name} ({where})", f"{value:.6g}{_interval(values)}"
            elif name not in ENDS:
                yield f"{name} ({where})", f"{value:.6g}"
            if name == "ce":
                yield f"perplexity ({where})", f"{perplexity_of(value):.6g}"


def _interval(values: Mapping[str, float]) -> str:
    ends = [values[name] for name in ENDS if name in values]
    return f" ({ends[0]:.6g} to {ends[1]:.6g}, 95 % over test windows)" if len(ends) == 2 else ""


def _eval_results(manifest: Manifest) -> Iterator[EvalResult]:
    """Results on test text for the model index: the search's loss ratio, and measurements of the saved model."""
    for where, values in manifest.measured.items():
        tokens, _, of = where.partition(", ")
        part, _, n_tokens = tokens.partition(":")
        ratio = RATIO in values
        if part != "test" or not (ratio or of in OF_SAVED):
            continue
        further = {"perplexity": perplexity_of(values["ce"])} if "ce" in values else {}
        text = manifest.texts.get(part, "text")
        for name, value in {**further, **values}.items():
            if name not in ENDS:
                yield EvalResult(
                    task_type="text-generation",
                    dataset_type=text,
                    dataset_name=text,
                    dataset_split=part,
                    metric_type=name.replace(" ", "_"),
                    metric_name=f"{name}, {n_tokens} tokens, {of}",
                    metric_value=value,
                    metric_args={end: values[end] for end in ENDS if end in values}
                    if name == RATIO
                    else None,
                )


def _loading(manifest: Manifest, repo: str, revision: str | None) -> str:
    """Lines that load the model."""
    if manifest.format == "gguf":
        branch = f" --revision {revision}" if revision else ""
        fetch = "" if repo == HERE else f"hf download {repo} {FILE} --local-dir .{branch}\n"
        return f"```sh\n{fetch}llama-cli -m {FILE}\n```"
    where = f'"{repo}"' + (f', revision="{revision}"' if revision else "")
    trusting = ", trust_remote_code=True" if manifest.checks.get("trust_remote_code") else ""
    return (
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained({where}, dtype="auto"{trusting})\n'
        f"tokenizer = AutoTokenizer.from_pretrained({where})\n```"
    )


def _zeros(manifest: Manifest) -> str:
    n_zeros, n_weights = sum(manifest.zeros.values()), sum(manifest.weights.values())
    share = f"{n_zeros / n_weights:.2%}" if n_weights else "0 %"
    n_linears = len(manifest.asked)
    return f"{share} of the weights of {n_linears} linears are zero ({n_zeros:,} of {n_weights:,})."


def _notes(manifest: Manifest) -> str:
    """Paragraphs on what was in the parent before, and on what was left alone."""
    found = ""
    if manifest.parent_zeros >= 5e-5:
        found += f"\n\n{manifest.parent_zeros:.2%} of the parent's prunable weights were zeros before."
    if manifest.not_understood:
        names = ", ".join(f"`{name}`" for name in manifest.not_understood)
        n_params = sum(manifest.not_understood.values())
        found += (
            f"\n\n**Not understood, and left as they were: {n_params:,} parameters of the blocks ({names}).**"
        )
    return found


def _structure(manifest: Manifest) -> str:
    saved, parent = manifest.parameters["saved"], manifest.parameters["parent"]
    kept = manifest.kept
    without = {name: sum(block[name] == 0 for block in kept) for name in ("kv_groups", "ffn")}
    text = (
        f"{saved:,} of the parent's {parent:,} parameters ({saved / parent:.1%}), "
        f"{manifest.size_bytes / 1e6:.1f} MB in {manifest.dtype}. Of {len(kept)} blocks, {without['kv_groups']} lose "
        f"their attention and {without['ffn']} their MLP; {MANIFEST} has the heads and channels that stay."
    )
    if manifest.checks.get("trust_remote_code"):
        text += (
            "\n\n**Code comes along.** The blocks have different shapes, which stock classes don't know. The file "
            "`modeling_*.py` here builds them around the stock class; read it, and load the model with "
            "`trust_remote_code=True`."
        )
    return text


def _listed(facts: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_cell(value)}" for name, value in facts.items())


def _cell(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _data(manifest: Manifest, repo: str) -> ModelCardData:
    """Metadata for the hub, which takes a parent only if it is a hub id."""
    parent, results = manifest.parent, list(_eval_results(manifest))
    name = f"{Path(parent).name}-pruned" if repo == HERE else Path(repo).name
    is_hub_id = (
        parent.count("/") == 1
        and not parent.startswith((".", "/", "~"))
        and (manifest.revision is not None or not Path(parent).exists())
    )
    return ModelCardData(
        base_model=parent if is_hub_id else None,
        library_name="gguf" if manifest.format == "gguf" else "transformers",
        pipeline_tag="text-generation" if results else None,
        tags=["pruned", "secateur"],
        model_name=name if results else None,
        eval_results=results or None,
        **_licence(manifest, is_hub_id),
    )


def _licence(manifest: Manifest, is_hub_id: bool) -> dict[str, Any]:
    """The parent's, as far as its card can be read and says so."""
    local = Path(manifest.parent).expanduser() / CARD
    there = local if local.is_file() else None
    if there is None and is_hub_id:
        there = hub_file(manifest.parent, CARD, manifest.revision)
    try:
        data = {} if there is None else ModelCard.load(there).data.to_dict()
    except (OSError, ValueError, YAMLError):  # unreadable
        return {}
    return {name: data[name] for name in ("license", "license_name", "license_link") if name in data}


_CARD = """---
{{ card_data }}
---
# {{ manifest.parent }}, pruned

**{{ manifest.label }}**

{{ what }}{{ notes }}

{{ loading }}

Pruned with Secateur: {{ method }}. Calibration: {{ calibration }}.
The licence is the parent's.

| | |
|---|---|
{% for name, value in rows %}| {{ name }} | {{ value }} |
{% endfor %}
`{{ path }}` has every layer's share, the seeds, hashes and versions."""
