"""How pruned models of each space leave for the disk: what their manifest says, and who saves them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.evaluators.session import Workbench
from secateur.pruners.export.export import ExportReport
from secateur.pruners.export.manifest import UNSTRUCTURED, Manifest
from secateur.pruners.export.registry import ANY, FORMATS
from secateur.pruners.export.save_session import save_cut, save_zeros
from secateur.pruners.export.structured import check_structured
from secateur.pruners.recipes.shipping import check_recipe, recipe_calibration, recipe_formats, save_recipe
from secateur.spaces.architecture.candidate import read_kept

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Shipping:
    """How models of one kind of space are saved.

    Args:
        asked: the manifest's fields that say what a configuration asks for.
        formats: that a space with such settings has, the first of them if none is asked for.
        check: refuses a configuration that the format can't carry, with the dense model, before any work: (bench,
            configuration, format).
        save: saves and checks the bench's live, pruned model: (bench, configuration, directory, manifest).
        calibration: the manifest's record of what the method has seen.
    """

    asked: Callable[[Config], dict[str, Any]]
    formats: Callable[[Any], Sequence[str]]
    check: Callable[[Workbench, Config, str], None]
    save: Callable[[Workbench, Config, Path, Manifest], ExportReport]
    calibration: Callable[[Workbench], dict[str, Any]] = lambda bench: {
        "text": bench.plan.calibration,
        "tokens": bench.calibration.numel(),
        "sha256": bench.calibration_sha256,
    }


def new_manifest(
    bench: Workbench,
    candidate: str,
    *,
    sequential: bool,
    seeds: Mapping[str, int],
    form: str | None = None,
    **method: Any,
) -> Manifest:
    """What is known of an export before anything is done.

    Args:
        bench: with the dense model.
        candidate: canonical text.
        sequential: how it is pruned, see `export_candidate`.
        seeds: by what they are for.
        form: a name in `FORMATS`; None: the one that the space was restricted to, or else its kind's usual one.
        method: what was done besides pruning.

    Raises:
        ValueError: if the text is no candidate, or its space has no such format.
    """
    config = bench.space.config(bench.space.parse(candidate))
    shipping = SHIPPING[bench.plan.space.kind]
    record = bench.plan.rig.record(bench.plan, config)
    return Manifest(
        parent=bench.loaded.name,
        fingerprint=bench.loaded.fingerprint,
        method={**record, "calibration": "sequential" if sequential else "dense", **method},
        candidate=candidate,
        calibration=shipping.calibration(bench),
        seeds=seeds,
        measured={},
        label=UNSTRUCTURED,
        format=_format(form, bench, shipping),
        **shipping.asked(config),
    )


def check_shipping(bench: Workbench, manifest: Manifest) -> None:
    """Raise a ValueError if the manifest's format can't carry its candidate; the bench's model is still dense."""
    config = bench.space.config(bench.space.parse(manifest.candidate))
    SHIPPING[bench.plan.space.kind].check(bench, config, manifest.format)


def save_pruned(bench: Workbench, to: Path, manifest: Manifest) -> ExportReport:
    """Save the bench's live model, which is pruned as the manifest says, with the checks of its format.

    Raises:
        ValueError: if `to` is not empty, or the format can't carry the model.
        ExportError: if the model can't be written, or does not load as it should.
    """
    config = bench.space.config(bench.space.parse(manifest.candidate))
    return SHIPPING[bench.plan.space.kind].save(bench, config, to, manifest)


def _format(form: str | None, bench: Workbench, shipping: Shipping) -> str:
    name: str = getattr(bench.plan.space, "target_format", ANY) if form is None else form
    formats = shipping.formats(bench.plan.space)
    if name == ANY:
        return formats[0]
    if name not in formats:
        raise ValueError(f"Expected a format of this space ({', '.join(formats)}), got {name!r}.")
    return name


def _save_zeros(bench: Workbench, config: Config, to: Path, manifest: Manifest) -> ExportReport:
    return save_zeros(bench, to, manifest)


def _anything(bench: Workbench, config: Config, form: str) -> None:
    """Zeros go anywhere."""


def _check_structure(bench: Workbench, config: Config, form: str) -> None:
    check_structured(bench.anatomy, bench.loaded.tokenizer, read_kept(config), form)


def _save_structure(bench: Workbench, config: Config, to: Path, manifest: Manifest) -> ExportReport:
    return save_cut(bench, read_kept(config), to, manifest, bench.units)


_ZEROS = Shipping(lambda config: {"asked": config["sparsity"]}, lambda space: ("hf",), _anything, _save_zeros)

# By the kind of the space.
SHIPPING: dict[str, Shipping] = {
    "allocation": _ZEROS,
    "formula": _ZEROS,
    "architecture": Shipping(
        lambda config: {"asked": {}, "kept": config["blocks"]},
        lambda space: tuple(FORMATS),
        _check_structure,
        _save_structure,
    ),
    "recipe": Shipping(
        lambda config: {"asked": {}},  # what it asks of each projection is known when it is decided
        recipe_formats,
        check_recipe,
        save_recipe,
        recipe_calibration,
    ),
}
