"""What formulas are made of, for every projection: collected once, mapped by each worker."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from secateur.pruners.calibration.gradient_kinds import Kind
from secateur.pruners.calibration.gradients import load_gradients, model_statistics
from secateur.pruners.calibration.statistics import ModelStatistics
from secateur.pruners.calibration.stream import BlockStatistics, stream_blocks
from secateur.pruners.formulas.terminals import Terminals, terminals_of
from secateur.pruners.models.anatomy import Anatomy, Linear
from secateur.pruners.stores.block_files import LevelStoreError
from secateur.pruners.weights.formula_grams import Grams, load_grams, save_grams
from secateur.spaces.formulas.operators import TERMINALS
from secateur.spaces.whole_file import whole_file

INPUTS, GRADIENTS = "inputs.safetensors", "gradients.safetensors"


class TerminalStore:
    """The quantities of each projection; G is mapped from its file, X and H are small, the others come from W.

    Args:
        directory: of a built store.
        anatomy: the dense model.
        names: of the terminals.

    Raises:
        LevelStoreError: if the directory holds no such store.
    """

    def __init__(self, directory: Path, anatomy: Anatomy, names: Collection[str]) -> None:
        identity = _about(directory).get("identity", "")
        self.directory, self.identity = directory, identity
        if not is_built(directory, names, identity):
            raise LevelStoreError(
                f"Expected the statistics of formulas in {directory}. They are built by a search."
            )
        self._names = tuple(names)
        self._inputs = load_file(directory / INPUTS)
        gradients = load_gradients(directory / GRADIENTS, identity) if "G" in names else None
        self._whole = ModelStatistics(len(anatomy.blocks), {"rms": gradients or {}})

    def terminals(self, linear: Linear) -> Terminals:
        """All terminals of the store, of one projection with its dense weight."""
        stored = {name: self._inputs.get(f"{linear.name}|{name}") for name in self._names}
        found = {
            name: tensor.to(linear.weight.device) for name, tensor in stored.items() if tensor is not None
        }
        rest = [name for name in self._names if name not in found]
        return found | dict(terminals_of(linear, rest, None, self._whole))

    def grams(self, grams: Grams) -> Mapping[str, Float[Tensor, "..."]]:
        """See `load_grams`.

        Raises:
            LevelStoreError: if the store was built without them.
        """
        found = load_grams(self.directory, grams, self.identity)
        if found is None:
            raise LevelStoreError(
                f"Expected second moments of blocks {list(grams.blocks)} in {self.directory}. They are built by a "
                "search."
            )
        return found


def is_built(directory: Path, names: Collection[str], identity: str, grams: Grams | None = None) -> bool:
    """True if the directory holds these quantities under this identity."""
    if grams is not None and load_grams(directory, grams, identity) is None:
        return False
    known = _about(directory)
    here = known.get("identity") == identity and set(names) <= set(known.get("names", ()))
    return here and ("G" not in names or load_gradients(directory / GRADIENTS, identity) is not None)


def _about(directory: Path) -> dict[str, Any]:
    """What a store says of itself; nothing where there is none."""
    try:
        with safe_open(directory / INPUTS, framework="pt") as file:
            known: dict[str, Any] = json.loads((file.metadata() or {}).get("about", "{}"))
    except (OSError, SafetensorError, ValueError):
        return {}
    return known


def build_terminals(
    directory: Path,
    anatomy: Anatomy,
    tokens: Int[Tensor, "windows length"],
    names: Collection[str],
    identity: str,
    *,
    damp: float = 0.01,
    grams: Grams | None = None,
    on_block: Callable[[int], None] = lambda index: None,
) -> None:
    """Collect what the terminals need, block by block on the dense model; gradients in one pass of their own.

    Args:
        directory: made if it is missing.
        anatomy: the dense model, left as it was.
        tokens: calibration windows.
        names: of the terminals.
        identity: of the model and the calibration tokens.
        damp: see `terminals_of`.
        grams: what to keep for output errors.
        on_block: told the index of each block that is done.

    Raises:
        LevelStoreError: if the disk is full.
    """
    directory.mkdir(parents=True, exist_ok=True)
    per_input = [name for name in names if TERMINALS[name].source in ("moments", "gram")]
    about = {"about": json.dumps({"identity": identity, "names": sorted(names)})}
    try:
        kinds: tuple[Kind, ...] = ("rms",) if "G" in names else ()
        model_statistics(anatomy, tokens, gradients=kinds, path=directory / GRADIENTS, identity=identity)
        tensors: dict[str, Tensor] = {}
        if per_input or grams is not None:
            full = _with_gram(anatomy, names, grams)
            for part in stream_blocks(anatomy, tokens, inputs="moments", gram_blocks=full):
                tensors |= _inputs(part, per_input, damp)
                if grams is not None and part.block.index in grams.blocks:
                    save_grams(directory, part, grams.kind, identity)
                on_block(part.block.index)
        with whole_file(directory / INPUTS) as new:
            save_file(tensors, new, metadata=about)
    except (SafetensorError, OSError) as error:
        raise LevelStoreError(
            f"Expected to write {directory}, got: {error}. Free some room on the disk and run the same command."
        ) from error


def _with_gram(anatomy: Anatomy, names: Collection[str], grams: Grams | None) -> Collection[int]:
    """The blocks whose full second moments are needed."""
    if any(TERMINALS[name].source == "gram" for name in names):
        return range(len(anatomy.blocks))
    return grams.blocks if grams is not None and grams.kind == "full" else ()


def _inputs(part: BlockStatistics, names: Collection[str], damp: float) -> dict[str, Tensor]:
    """The named terminals of a block's projections."""
    tensors: dict[str, Tensor] = {}
    for linear in part.block.linears:
        found = terminals_of(linear, names, part.inputs.get(linear.name), None, damp=damp)
        tensors |= {f"{linear.name}|{name}": x.contiguous().cpu() for name, x in found.items()}
    return tensors


def identity_of(*parts: str) -> str:
    """One text for all that a store depends on."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
