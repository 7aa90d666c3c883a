"""The model card of an exported model: short, with the numbers and the label."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache
from yaml import YAMLError

from secateur.pruners.export.manifest import MANIFEST, Manifest


def card(manifest: Manifest) -> str:
    """The text of ``README.md``, as the hub shows it."""
    rows = [
        (f"{name} ({where})", f"{value:.6g}")
        for where, values in manifest.measured.items()
        for name, value in values.items()
    ]
    rows += [(name.replace("_", " "), _cell(value)) for name, value in manifest.checks.items()]
    made = ModelCard.from_template(
        _data(manifest),
        template_str=_CARD,
        manifest=manifest,
        what=_structure(manifest) if manifest.kept else _zeros(manifest),
        notes=_notes(manifest),
        method=_listed(manifest.method),
        calibration=_listed(manifest.calibration),
        rows=rows,
        path=MANIFEST,
    )
    return f"{made}\n"


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
            "\n\nThe blocks have different shapes, which stock classes don't know. The file `modeling_*.py` here "
            "builds them around the stock class; read it, and load the model with `trust_remote_code=True`."
        )
    return text


def _listed(facts: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_cell(value)}" for name, value in facts.items())


def _cell(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _data(manifest: Manifest) -> ModelCardData:
    """Metadata for the hub, which takes a parent only if it is a hub id."""
    parent = manifest.parent
    is_hub_id = parent.count("/") == 1 and not parent.startswith((".", "/", "~"))
    return ModelCardData(
        base_model=parent if is_hub_id else None,
        library_name="gguf" if manifest.format == "gguf" else "transformers",
        tags=["pruned", "secateur"],
        **_licence(parent, is_hub_id),
    )


def _licence(parent: str, is_hub_id: bool) -> dict[str, Any]:
    """The parent's, as far as its card is on this machine and says so."""
    there: Any = Path(parent).expanduser() / "README.md"
    if not there.is_file() and is_hub_id:
        there = try_to_load_from_cache(parent, "README.md")
    try:
        data = ModelCard.load(Path(there)).data.to_dict() if isinstance(there, str | Path) else {}
    except (OSError, ValueError, YAMLError):  # none, or unreadable
        return {}
    return {name: data[name] for name in ("license", "license_name", "license_link") if name in data}


_CARD = """---
{{ card_data }}
---
# {{ manifest.parent }}, pruned

**{{ manifest.label }}**

{{ what }}{{ notes }}

Pruned with Secateur: {{ method }}. Calibration: {{ calibration }}.
The licence is the parent's.

| | |
|---|---|
{% for name, value in rows %}| {{ name }} | {{ value }} |
{% endfor %}
`{{ path }}` has every layer's share, the seeds, hashes and versions."""
