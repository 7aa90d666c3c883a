"""Statistics of the dense model on one choice of calibration windows, collected once and cached."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor

from secateur.pruners.calibration.cache import StatisticsCache
from secateur.pruners.calibration.gradient_kinds import KINDS, Kind
from secateur.pruners.calibration.gradients import Gradients, collect_gradients
from secateur.pruners.calibration.kept_states import KeptStates
from secateur.pruners.calibration.pass_kinds import n_bytes, trained
from secateur.pruners.calibration.statistics import ROLES, InputStatistics, ModelStatistics, OutputStatistics
from secateur.pruners.calibration.stream import BlockStatistics, most, stream_blocks
from secateur.pruners.calibration.tokens import tokens_sha256
from secateur.pruners.experts.evidence import SUMS, ExpertEvidence
from secateur.pruners.models.anatomy import Anatomy, Block
from secateur.pruners.stores.block_files import digest_of
from secateur.pruners.stores.saved_state import CachedState, SavedState
from secateur.spaces.method import Detail

Pieces: TypeAlias = Sequence[dict[str, Tensor]]
"""Tensors of each block, by name."""
_OWNERS, _INFLUENCE = "owners", "influence"
_EXPERTS = "experts"
_OF_OUTPUTS = ("total", "total_abs", "sum_squares", "window_squares")
VERSION = 2
"""Version of the collectors: a cache outlives an upgrade, and entries of an older one must not be found."""


class CalibrationStatistics:
    """Statistics of the dense model on calibration windows, from a cache, or collected at first use.

    `prepare` collects them in as few passes as possible: one walk over the blocks for moments, Gram matrices and
    influences, and one pass for all gradients of one value. A result depends neither on other statistics nor on
    whether it came from the cache. The live model must be dense whenever something is collected.

    Tensors are mapped from files: not to be written to.

    Args:
        cache: of statistics; the content of the windows is part of the key.
        identity: of the model and its precision, in one text.
        forward: signed gradients (`mean`) are estimated by forward passes; other kinds are refused.
        contrast: windows of a second text, which are a part of the key; None: there is none.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        tokens: Int[Tensor, "windows length"],
        cache: StatisticsCache,
        identity: str,
        *,
        forward: bool = False,
        contrast: Int[Tensor, "others _"] | None = None,
    ) -> None:
        self._anatomy, self._contrast = anatomy, contrast
        self._tokens = tokens
        self._cache = cache
        self._forward = forward
        record = {"made": VERSION, "model": identity, "tokens": tokens_sha256(tokens)}
        if contrast is not None:
            record["contrast"] = tokens_sha256(contrast)
        self._group = digest_of(record | {"shape": list(tokens.shape)})[:32]
        self._parts: dict[str, Pieces] = {}

    def of_another(self, identity: str) -> CalibrationStatistics:
        """Statistics on the same windows of the live model when it is another one, with this identity."""
        return CalibrationStatistics(
            self._anatomy, self._tokens, self._cache, identity, forward=self._forward, contrast=self._contrast
        )

    def prepare(
        self, *, inputs: Detail = "nothing", outputs: Detail = "nothing", gradients: Collection[Kind] = ()
    ) -> None:
        """Collect missing statistics of inputs of all projections and of output projections, and kinds of gradients.

        Raises:
            LevelStoreError: if there is no room for it, in the cache or on its disk; before it is collected.
            ValueError: as `collect_gradients` does, e.g. on too little memory, or if a kind can't be estimated.
        """
        kinds = [self._source(kind) for kind in gradients]
        detail = most(inputs, outputs)
        gram, walks = detail == "gram", detail != "nothing"
        if not self._missing(kinds) and not (walks and self._walked(gram) is None):
            return
        with self._cache.locked(
            self._group
        ):  # and look again: another process may have collected it meanwhile
            if missing := self._missing(kinds):
                self._collect_gradients(missing)
            if walks and self._walked(gram) is None:
                self._walk(gram)

    def unfinished(self, *, gram: bool) -> Path | None:
        """Directory of the files of a walk that is not finished, one a block; None: it is in the cache.

        Those of the first blocks that are there are used by `prepare`.
        """
        return (
            None
            if self._walked(gram) is not None
            else self._cache.fresh_place(f"{self._group}.{_of(gram=gram)}")
        )

    def use_walked(self, block: int, piece: dict[str, Tensor], *, gram: bool) -> None:
        """Use the `packed_statistics` of one block from a walk of the caller's, and forget those of others."""
        pieces: list[dict[str, Tensor]] = [{} for _ in self._anatomy.blocks]
        pieces[block] = piece
        self._parts[_of(gram=gram)] = pieces

    def inputs(self, block: int, gram: bool = False) -> dict[str, InputStatistics]:
        """Input statistics of a block's projections by their full names; those that read one input share one object."""
        return unpacked_inputs(self._anatomy.blocks[block], self._of_walk(gram)[block], gram=gram)

    def outputs(self, block: int, gram: bool = False) -> dict[str, OutputStatistics]:
        """Statistics of the output projections of a block, by their full names."""
        piece = self._of_walk(gram)[block]
        linears, found = self._anatomy.blocks[block].linears, dict[str, OutputStatistics]()
        for linear, index in zip(linears, piece[_OWNERS].tolist(), strict=True):
            if linear.role in ROLES and linear.expert is None:
                device = linear.weight.device
                moments = {x: piece[f"outputs.{x}.{linear.name}"].to(device) for x in _OF_OUTPUTS}
                matrix = piece[f"gram.{linears[index].name}"].to(device) if gram else None
                found[linear.name] = OutputStatistics(n_tokens=self._tokens.numel(), gram=matrix, **moments)
        return found

    def experts(self, block: int) -> ExpertEvidence:
        """Evidence of a block's mixture."""
        with self._cache.locked(self._group):
            pieces = self._part(_EXPERTS) or self._walk_experts()
        mixture = self._anatomy.blocks[block].mixture
        assert mixture is not None, "asked for mixtures alone"
        device = mixture.router.device
        return ExpertEvidence(mixture, pieces[block]["hidden"].to(device), *pieces[block]["sums"].to(device))

    def _walk_experts(self) -> Pieces:
        mixtures = [block.mixture for block in self._anatomy.blocks if block.mixture]
        n_numbers = sum(mixture.router.shape[1] for mixture in mixtures) * self._tokens.numel()
        self._cache.make_room(n_numbers * mixtures[0].router.element_size(), "the inputs of experts")
        self._put_walk(_EXPERTS, walk_mixtures)
        return self._parts[_EXPERTS]

    @property
    def influence(self) -> tuple[float, ...]:
        """Influence of each block, see `BlockStatistics`."""
        return tuple(float(piece[_INFLUENCE]) for piece in self._of_walk(gram=False))

    def gradients(self, kinds: Collection[Kind]) -> dict[Kind, Gradients]:
        """By kind and the projection's full name, as `collect_gradients` gives them, on the CPU."""
        self.prepare(gradients=kinds)
        parts = {kind: self._parts[_name(self._source(kind))] for kind in kinds}
        return {kind: {k: v for piece in pieces for k, v in piece.items()} for kind, pieces in parts.items()}

    def whole(self, kinds: Collection[Kind] = ()) -> ModelStatistics:
        """Statistics of the model as a whole, with these kinds of gradients."""
        n_windows, length = self._tokens.shape
        return ModelStatistics(len(self._anatomy.blocks), self.gradients(kinds), windows=(n_windows, length))

    def state(self, name: str) -> SavedState:
        """State of a computation on these windows of this model; `name` holds its settings."""
        return CachedState(self._cache, self._group, name)

    def _source(self, kind: Kind) -> Kind:
        """The kind that is collected for this one."""
        if not self._forward or kind not in KINDS:
            return kind
        if kind != "mean":
            raise ValueError(
                "Expected `gradients: forward` with a metric that takes signed means of gradients alone, got one "
                f"that takes {kind!r}. Say `gradients: backward`, or take another metric."
            )
        return "forward"

    def _missing(self, kinds: Collection[Kind]) -> list[Kind]:
        return [kind for kind in kinds if self._part(_name(kind)) is None]

    def _part(self, name: str) -> Pieces | None:
        """An entry of the cache, read once; None if it is not there."""
        if name not in self._parts:
            kept = self._cache.get(f"{self._group}.{name}")
            if kept is None:
                return None
            self._parts[name] = kept
        return self._parts[name]

    def _walked(self, gram: bool) -> Pieces | None:
        """Results of a walk; one that collected Gram matrices serves for moments, too."""
        names = ["gram"] if gram else sorted(("gram", "moments"), key=lambda name: name not in self._parts)
        return next((pieces for name in names if (pieces := self._part(name)) is not None), None)

    def _of_walk(self, gram: bool) -> Pieces:
        self.prepare(inputs="gram" if gram else "moments")
        pieces = self._walked(gram)
        assert pieces is not None, "prepared just now"
        return pieces

    def _walk(self, gram: bool) -> None:
        name = _of(gram=gram)
        self._cache.make_room(gram_bytes(self._anatomy) if gram else 0, f"the {name} of inputs")
        self._put_walk(name, partial(walk_dense, gram=gram))

    def _put_walk(self, name: str, walk: Callable[..., Iterator[dict[str, Tensor]]]) -> None:
        """Put an entry with a piece a block, from where a killed walk was."""
        fresh, n_there = self._cache.fresh(f"{self._group}.{name}")
        kept = KeptStates(fresh, self._group)
        pieces = walk(self._anatomy, self._tokens, first=n_there, kept=kept)
        self._parts[name] = self._cache.put(f"{self._group}.{name}", pieces, n_there)

    def _collect_gradients(self, kinds: Sequence[Kind]) -> None:
        n_weights = sum(linear.n_weights for linear in self._anatomy.linears)
        self._cache.make_room(sum(map(n_bytes, kinds)) * n_weights, "gradients")
        states = {
            kind: CachedState(self._cache, self._group, f"training-{kind}", held=True)
            for kind in trained(kinds)
        }
        found = collect_gradients(self._anatomy, self._tokens, kinds, contrast=self._contrast, states=states)
        for kind, by_name in found.items():
            self._put(_name(kind), (_of_block(block, by_name) for block in self._anatomy.blocks))
            if kind in states:
                states[kind].clear()

    def _put(self, name: str, pieces: Iterable[dict[str, Tensor]]) -> None:
        self._parts[name] = self._cache.put(f"{self._group}.{name}", pieces)


def walk_dense(
    anatomy: Anatomy,
    tokens: Int[Tensor, "windows length"],
    *,
    gram: bool,
    first: int = 0,
    kept: KeptStates | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Statistics of each block as named tensors on the CPU that share no memory.

    An input that several projections read has one copy, under the name of the first, its owner. Moments do not
    depend on whether Gram matrices are collected.

    Args:
        first: block that is wanted first.
        kept: see `stream_blocks`.
    """
    missing = range(first, len(anatomy.blocks))
    for part in stream_blocks(anatomy, tokens, **collected_by_walks(gram), missing=missing, kept=kept):
        if part.block.index >= first:
            yield packed_statistics(part)


def walk_mixtures(
    anatomy: Anatomy, tokens: Int[Tensor, "windows length"], *, first: int, kept: KeptStates | None
) -> Iterator[dict[str, Tensor]]:
    """Evidence of each block's mixture likewise; nothing of a block without one."""
    missing = range(first, len(anatomy.blocks))
    for part in stream_blocks(anatomy, tokens, experts=True, missing=missing, kept=kept):
        if part.block.index >= first:
            yield {} if part.experts is None else packed(part.experts)


def collected_by_walks(gram: bool) -> dict[str, Any]:
    """Arguments of `stream_blocks` and `Walk.collect` for what `packed_statistics` packs."""
    return {"inputs": "both" if gram else "moments", "outputs": "moments"}


def packed_statistics(part: BlockStatistics) -> dict[str, Tensor]:
    """Statistics of a block as `walk_dense` gives them."""
    return {name: tensor.contiguous().cpu() for name, tensor in _pack(part).items()}


def _pack(part: BlockStatistics) -> dict[str, Tensor]:
    first: dict[int, int] = {}
    owners = [first.setdefault(id(part.inputs[x.name]), i) for i, x in enumerate(part.block.linears)]
    piece: dict[str, Tensor | None] = {_OWNERS: torch.tensor(owners)}
    for name in (part.block.linears[index].name for index in first.values()):
        piece[f"inputs.total.{name}"] = part.inputs[name].total
        piece[f"inputs.sum_squares.{name}"] = part.inputs[name].sum_squares
        piece[f"inputs.routed_squares.{name}"] = part.inputs[name].routed_squares
        piece[f"inputs.n_tokens.{name}"] = torch.tensor(part.inputs[name].n_tokens)
        if part.grams:
            piece[f"gram.{name}"] = part.grams[name].gram
    for name, statistics in part.outputs.items():
        piece |= {f"outputs.{field}.{name}": getattr(statistics, field) for field in _OF_OUTPUTS}
    piece[_INFLUENCE] = torch.tensor(part.influence, dtype=torch.float64)
    return {name: tensor for name, tensor in piece.items() if tensor is not None}


def packed(evidence: ExpertEvidence) -> dict[str, Tensor]:
    """The evidence of a mixture as tensors on the CPU."""
    sums = torch.stack([getattr(evidence, name) for name in SUMS])
    return {"hidden": evidence.hidden.contiguous().cpu(), "sums": sums.cpu()}


def unpacked_inputs(block: Block, piece: dict[str, Tensor], *, gram: bool) -> dict[str, InputStatistics]:
    """Input statistics of a block's projections from `packed_statistics`, see `CalibrationStatistics.inputs`."""
    linears, found = block.linears, dict[str, InputStatistics]()
    for linear, index in zip(linears, piece[_OWNERS].tolist(), strict=True):
        owner, device = linears[index].name, linear.weight.device
        if owner not in found:
            matrix = piece[f"gram.{owner}"].to(device) if gram else None
            squares = piece[f"inputs.sum_squares.{owner}"].to(device)
            routed = piece.get(f"inputs.routed_squares.{owner}")
            found[owner] = InputStatistics(
                int(piece[f"inputs.n_tokens.{owner}"]),
                squares if matrix is None else matrix.diagonal(),
                matrix,
                piece[f"inputs.total.{owner}"].to(device),
                None if routed is None else routed.to(device),
            )
        found[linear.name] = found[owner]
    return found


def gram_bytes(anatomy: Anatomy, blocks: Collection[int] | None = None) -> int:
    """Size of Gram matrices, of some blocks or all: of the input of each sub-layer, and of its output projection."""
    linears = [x for x in anatomy.linears if blocks is None or x.block in blocks]
    sizes = {(x.block, x.sublayer, x.expert, x.role in ROLES): x.in_features for x in linears}
    return sum(4 * size**2 for size in sizes.values())


def _of_block(block: Block, by_name: Gradients) -> dict[str, Tensor]:
    return {x.name: by_name[x.name].contiguous().cpu() for x in block.linears if x.name in by_name}


def _of(*, gram: bool) -> str:
    """Name of the entry of a walk."""
    return "gram" if gram else "moments"


def _name(kind: Kind) -> str:
    return f"gradients-{kind}"
