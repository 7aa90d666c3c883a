"""The model card of an exported model: short, with the numbers and the label."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from secateur.pruners.export.manifest import MANIFEST, Manifest


def card(manifest: Manifest) -> str:
    """The text of ``README.md``, as the hub shows it."""
    rows = [
        (f"{name} ({where})", f"{value:.6g}")
        for where, values in manifest.measured.items()
        for name, value in values.items()
    ]
    rows += [(name.replace("_", " "), _cell(value)) for name, value in manifest.checks.items()]
    return _CARD.format(
        parent=manifest.parent,
        front_matter=_front_matter(manifest),
        label=manifest.label,
        what=_structure(manifest) if manifest.kept else _zeros(manifest),
        method=_listed(manifest.method),
        calibration=_listed(manifest.calibration),
        table="\n".join(f"| {name} | {value} |" for name, value in rows),
        manifest=MANIFEST,
    )


def _zeros(manifest: Manifest) -> str:
    n_zeros, n_weights = sum(manifest.zeros.values()), sum(manifest.weights.values())
    share = f"{n_zeros / n_weights:.2%}" if n_weights else "0 %"
    n_linears = len(manifest.asked)
    return f"{share} of the weights of {n_linears} linears are zero ({n_zeros:,} of {n_weights:,})."


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


def _front_matter(manifest: Manifest) -> str:
    """Metadata for the hub, which takes a parent only if it is a hub id."""
    parent = manifest.parent
    is_hub_id = parent.count("/") == 1 and not parent.startswith((".", "/", "~"))
    library = "gguf" if manifest.format == "gguf" else "transformers"
    return f"library_name: {library}\ntags: [pruned, secateur]\n" + is_hub_id * f"base_model: {parent}\n"


_CARD = """---
{front_matter}---
# {parent}, pruned

**{label}**

{what}

Pruned with Secateur: {method}. Calibration: {calibration}.
The licence is the parent's.

| | |
|---|---|
{table}

`{manifest}` has every layer's share, the seeds, hashes and versions.
"""
