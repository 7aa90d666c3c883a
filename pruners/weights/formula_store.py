"""Terminals of formulas, and second moments for output errors, of every projection: built once, mapped by workers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from jaxtyping import Float, Int
from torch import Tensor, tensor

from secateur.pruners.calibration.fisher import output_moments
from secateur.pruners.calibration.gradients import gradients_to_write, kind_path, model_statistics
from secateur.pruners.calibration.kept_states import KeptStates, states_bytes
from secateur.pruners.calibration.statistics import ModelStatistics
from secateur.pruners.calibration.stream import BlockStatistics, stream_blocks
from secateur.pruners.formulas.terminals import Terminals, kinds_of, terminals_of
from secateur.pruners.models.anatomy import Anatomy, Linear
from secateur.pruners.stores.block_files import (
    Key,
    LevelStoreError,
    StoredBlocks,
    block_path,
    build_store,
    check_room,
    finished_key,
    load_tensors,
    save_tensors,
)
from secateur.spaces.formulas.operators import TERMINALS

GRADIENTS = "gradients.safetensors"
OUTPUTS = "outputs.safetensors"
_OWNERS = "owners"


@dataclass(frozen=True)
class Grams:
    """Stored second moments.

    Args:
        blocks: indices of their blocks.
        kind: whole matrices, or their diagonals.
    """

    blocks: tuple[int, ...]
    kind: Literal["full", "diagonal"] = "full"


@dataclass(frozen=True)
class TerminalKey(Key):
    """Identity of a store of terminals.

    Args:
        identity: of the model and the calibration tokens.
        names: of the terminals.
        grams: stored beside them.
    """

    identity: str
    names: tuple[str, ...]
    grams: Grams | None

    @property
    def record(self) -> dict[str, Any]:
        """All of it as plain values."""
        return asdict(self)


class TerminalStore:
    """Terminals of each projection; G and those like it are mapped from files, X and H are small, others come from W.

    Args:
        directory: of a built store.
        anatomy: the dense model.
        names: of the terminals.

    Raises:
        LevelStoreError: if the directory holds no such store.
    """

    def __init__(self, directory: Path, anatomy: Anatomy, names: Collection[str]) -> None:
        self.directory, self.identity = directory, str((finished_key(directory) or {}).get("identity", ""))
        if not is_built(directory, names, self.identity):
            raise LevelStoreError(
                f"Expected the statistics of formulas in {directory}. They are built by a search."
            )
        self._names, self._blocks = tuple(names), anatomy.blocks
        self._tensors = StoredBlocks(directory, len(anatomy.blocks))
        kinds = kinds_of(names)
        gradients = {
            kind: load_tensors(kind_path(directory / GRADIENTS, kind), self.identity) or {} for kind in kinds
        }
        self._whole = ModelStatistics(len(anatomy.blocks), gradients)

    def terminals(self, linear: Linear, weight: Float[Tensor, "out in"]) -> Terminals:
        """All terminals of the store, of one projection with this weight."""
        stored, device = self._tensors[linear.block], weight.device
        keys = {name: f"{linear.name}|{name}" for name in self._names}
        found = {name: stored[key].to(device) for name, key in keys.items() if key in stored}
        rest = [name for name in self._names if name not in found]
        return found | dict(terminals_of(linear, rest, None, self._whole, weight=weight))

    def grams(self, grams: Grams) -> Mapping[str, Float[Tensor, "..."]]:
        """Second moments by the projection's full name, ``in in``, or ``in`` if diagonal; one for a shared input.

        Raises:
            LevelStoreError: if the store was built without them.
        """
        if not is_built(self.directory, (), self.identity, grams):
            raise LevelStoreError(
                f"Expected second moments of blocks {list(grams.blocks)} in {self.directory}. They are built by a "
                "search."
            )
        found = {}
        for index in grams.blocks:
            linears, stored = self._blocks[index].linears, self._tensors[index]
            for linear, owner in zip(linears, stored[_OWNERS].tolist(), strict=True):
                found[linear.name] = stored[f"{linears[owner].name}|gram"]
        return found


def is_built(directory: Path, names: Collection[str], identity: str, grams: Grams | None = None) -> bool:
    """True if the directory holds these terminals and second moments under this identity."""
    known = finished_key(directory)
    if known is None or known["identity"] != identity or not set(names) <= set(known["names"]):
        return False
    kept = known["grams"] or {"kind": None}
    if grams is not None and (kept["kind"] != grams.kind or not {*grams.blocks} <= {*kept["blocks"]}):
        return False
    paths = (kind_path(directory / GRADIENTS, kind) for kind in kinds_of(names))
    return all(load_tensors(path, identity) is not None for path in paths)


def build_terminals(
    directory: Path,
    anatomy: Anatomy,
    tokens: Int[Tensor, "windows length"],
    names: Collection[str],
    identity: str,
    *,
    dampening: float = 0.01,
    grams: Grams | None = None,
    contrast: Int[Tensor, "others _"] | None = None,
    on_block: Callable[[int], None] = lambda index: None,
    only: Collection[int] | None = None,
) -> None:
    """Build the store block by block on the dense model; gradients in one pass of their own, before them.

    See `build_store`.

    Args:
        directory: made if it is missing.
        anatomy: the dense model, left as it was.
        tokens: calibration windows.
        names: of the terminals.
        identity: of the model and the calibration tokens.
        dampening: see `terminals_of`.
        grams: second moments to store for output errors.
        contrast: windows of the second calibration set, for terminals that need one.
        on_block: told the index of each block that is done.
        only: see `build_store`; gradients are left out, which are of the whole model.

    Raises:
        LevelStoreError: if the disk is full.
    """
    per_input, kinds = _per_input(names), kinds_of(names)
    kept = grams.blocks if grams is not None else ()

    key = TerminalKey(identity, tuple(sorted(names)), grams)

    def make(missing: Collection[int]) -> Iterator[tuple[int, dict[str, Tensor]]]:
        walk, states = streamed(anatomy, names, grams), KeptStates(directory, key.digest)
        for part in stream_blocks(anatomy, tokens, **walk, missing=missing, kept=states):
            index, tensors = part.block.index, dict[str, Tensor]()
            if index in missing:
                tensors |= _inputs(part, per_input, dampening)
                tensors |= _grams(part, grams) if grams is not None and index in kept else {}
            yield index, tensors

    def n_bytes(missing: Collection[int]) -> int:
        return terminal_bytes(anatomy, names, grams, missing) + states_bytes(anatomy, tokens)

    otherwise = "use fewer terminals"
    if only is None and kinds:
        path = directory / GRADIENTS
        directory.mkdir(parents=True, exist_ok=True)
        missing = [i for i in range(len(anatomy.blocks)) if not block_path(directory, i).exists()]
        needed = n_bytes(missing) + gradients_to_write(path, anatomy, kinds)
        check_room(directory, needed, otherwise)
        model_statistics(anatomy, tokens, gradients=kinds, path=path, identity=identity, contrast=contrast)
    build_store(
        directory,
        key,
        len(anatomy.blocks),
        n_bytes,
        make,
        otherwise=otherwise,
        on_block=on_block,
        only=only,
    )


def streamed(anatomy: Anatomy, names: Collection[str], grams: Grams | None) -> dict[str, Any]:
    """Statistics that the store is built from, as keyword arguments of `stream_blocks`."""
    full: Collection[int] = grams.blocks if grams is not None and grams.kind == "full" else ()
    if any(TERMINALS[name].source == "gram" for name in names):
        full = range(len(anatomy.blocks))
    inputs = "moments" if _per_input(names) or grams is not None else "nothing"
    return {"inputs": inputs, "gram_blocks": full}


def _per_input(names: Collection[str]) -> list[str]:
    """Terminals with a value an input, in their order."""
    return [name for name in names if TERMINALS[name].source in ("moments", "gram")]


def terminal_bytes(
    anatomy: Anatomy, names: Collection[str], grams: Grams | None, blocks: Collection[int] | None = None
) -> int:
    """Upper bound of the bytes of a store's tensors, of these blocks or of all; the model may be without memory."""
    kept = grams.blocks if grams is not None else ()
    linears = [linear for linear in anatomy.linears if blocks is None or linear.block in blocks]
    wide = {(x.block, x.sublayer, x.is_output, x.in_features) for x in linears if x.block in kept}
    needed = 4 * sum(width**2 for *_, width in wide)
    return needed + 4 * len(_per_input(names)) * sum(linear.in_features for linear in linears)


def output_bytes(anatomy: Anatomy, grams: Grams | None) -> int:
    """Bytes of the tensors that `build_outputs` writes; the model may be without memory."""
    blocks = grams.blocks if grams is not None else ()
    return 4 * sum(x.out_features**2 for index in blocks for x in anatomy.blocks[index].linears)


def build_outputs(
    directory: Path,
    anatomy: Anatomy,
    tokens: Int[Tensor, "windows length"],
    identity: str,
    grams: Grams | None,
) -> None:
    """Write the second moments of the gradients of the outputs of these blocks' projections, unless they are there.

    See `fisher.output_moments`.

    Raises:
        LevelStoreError: if they can't be written.
        ValueError: if a gradient is not finite.
    """
    blocks = grams.blocks if grams is not None else ()
    whole = f"{identity} {blocks}"
    if load_tensors(directory / OUTPUTS, whole) is None:
        directory.mkdir(parents=True, exist_ok=True)
        names = [linear.name for index in blocks for linear in anatomy.blocks[index].linears]
        save_tensors(directory / OUTPUTS, output_moments(anatomy, tokens, names), whole)


def load_outputs(directory: Path, grams: Grams) -> Mapping[str, Float[Tensor, "out out"]]:
    """The second moments that `build_outputs` wrote, by the projection's full name.

    Raises:
        LevelStoreError: if there are none of these blocks.
    """
    identity = (finished_key(directory) or {}).get("identity", "")
    found = load_tensors(directory / OUTPUTS, f"{identity} {grams.blocks}")
    if found is None:
        raise LevelStoreError(
            f"Expected second moments of gradients of blocks {list(grams.blocks)} in {directory}. They are built by a "
            "search."
        )
    return found


def _inputs(part: BlockStatistics, names: Collection[str], dampening: float) -> dict[str, Tensor]:
    """The named terminals of a block's projections."""
    tensors: dict[str, Tensor] = {}
    for linear in part.block.linears:
        found = terminals_of(linear, names, part.inputs.get(linear.name), None, dampening=dampening)
        tensors |= {f"{linear.name}|{name}": x for name, x in found.items()}
    return tensors


def _grams(part: BlockStatistics, grams: Grams) -> dict[str, Tensor]:
    """Second moments a token, and for each projection the first that reads its input, which has them."""
    linears, first = part.block.linears, dict[int, int]()
    owners = [first.setdefault(id(part.inputs[x.name]), index) for index, x in enumerate(linears)]
    found = {_OWNERS: tensor(owners)}
    for name in (linears[index].name for index in first.values()):
        inputs = part.inputs[name]
        moments = inputs.gram if grams.kind == "full" else inputs.sum_squares
        assert moments is not None, "streamed with the full moments of this block"
        found[f"{name}|gram"] = moments / max(inputs.n_tokens, 1)
    return found


def identity_of(*parts: str) -> str:
    """Hash of all that a store depends on."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
