"""The extension point `Pruner`: weights of a model by the candidates of a space."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from jaxtyping import Float, Int64
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from secateur.pruners.blockwise import BlockwisePruning
from secateur.pruners.calibration.gradient_kinds import Kind
from secateur.pruners.calibration.gradients import check_contrast
from secateur.pruners.calibration.prompts import Prompts, prompt_tokens
from secateur.pruners.calibration.tokens import Calibration
from secateur.pruners.export.export import ExportReport, export_model
from secateur.pruners.export.manifest import Manifest
from secateur.pruners.models.anatomy import Anatomy
from secateur.pruners.models.loading import LoadedModel
from secateur.pruners.models.mapped import NotStreamedError
from secateur.pruners.models.shape import model_shape
from secateur.pruners.stores.worker_store import WorkerStore
from secateur.spaces.latency import LatencyTable
from secateur.spaces.plugins import resolve
from secateur.spaces.registry import SPACES
from secateur.spaces.shape import ModelShape

Config = Mapping[str, Any]
"""Plain configuration of a candidate, see `Space.config`."""

OnBlock = Callable[[int], None]
"""Callback with the index of each finished block."""


def no_report(index: int) -> None:
    """No callback."""


class InfeasibleError(ValueError):
    """Candidate without weights; the text is the reason."""


@dataclass(frozen=True)
class DenseModel:
    """Live, dense model that candidates are pruned from.

    Args:
        anatomy: of the live model.
        fingerprint: content hash of its weights.
        shape: its sizes, from which exact costs are counted; with blocks where candidates are smaller.
        prompts: token ids of texts that methods put before windows, by name.
    """

    anatomy: Anatomy
    fingerprint: str
    shape: ModelShape
    prompts: Prompts = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        loaded: LoadedModel,
        anatomy: Anatomy,
        context: int,
        *,
        blocks: bool,
        latency: LatencyTable | None = None,
        held: Mapping[str, Any] | None = None,
    ) -> DenseModel:
        """Dense model of a loaded one, with its sizes: bytes as it is stored.

        Args:
            loaded: the model.
            anatomy: of it.
            context: tokens that a token attends to, when multiply-accumulates are counted.
            blocks: count the parts of each block, too, for smaller candidates.
            latency: times of these parts, if targets or objectives need them.
            held: see `Pruner.held_of`.

        Raises:
            ValueError: if blocks are to be counted of a model that can't be cut.
        """
        stored = loaded.stored_dtype.itemsize
        shape = model_shape(anatomy, context, stored, blocks=blocks, latency=latency, held=held or {})
        return cls(anatomy, loaded.fingerprint, shape, prompt_tokens(loaded.tokenizer))

    @property
    def dtype(self) -> str:
        """Name of the dtype of its projections, e.g. ``float32``."""
        return str(self.anatomy.dtype).removeprefix("torch.")


class Pruner(ABC):
    """Prunes one live model by the candidates of one space: by reference in a search, for good in an export.

    In a search, `prepare` writes once what all candidates share, `open` reads it, and `keys`, `apply`, `release` and
    `restore` switch blocks of the live model by reference, so that nothing is copied that two candidates share. For
    good, `prune` changes the live model, and `save` writes it. Both work on the plain configuration of a candidate; a
    search is not needed to prune.

    Args:
        settings: of the space.
        dense: the live model; dense now.
        space: of the candidates; None: only `prune`, `save` and what describes them are used.
        seed: of whatever methods draw.
        calibration: needed by `prepare` and `prune`; None in workers, which `open` what was prepared.
    """

    copies: ClassVar[bool] = True
    """True if changed blocks take memory beside the dense ones, which `release` frees."""

    on_device: ClassVar[bool] = False
    """True if its store is kept on the model's device, as far as there is room, see `Room.levels`."""

    described: ClassVar[str] = ""
    """Subject of `describe` in a word, for progress; "": none."""

    def __init__(
        self,
        settings: Any,
        dense: DenseModel,
        *,
        space: Any = None,
        seed: int = 0,
        calibration: Calibration | None = None,
    ) -> None:
        self.settings = settings
        self.dense = dense
        self.anatomy = dense.anatomy
        self.space = space
        self.seed = seed
        self._calibration = calibration

    @property
    def calibration(self) -> Calibration:
        """The calibration data."""
        assert self._calibration is not None, "given to whoever prepares or prunes"
        return self._calibration

    # --- settings and checks before work ---

    @classmethod
    def settled(cls, settings: Any, anatomy: Anatomy) -> Any:
        """Settings with the keys of `by_model` filled in."""
        return settings

    @classmethod
    def check_settings(cls, settings: Any) -> None:
        """Raise a ValueError for settings that fit no model; called before one is loaded."""

    @classmethod
    def check_config(cls, settings: Any, config: Any) -> None:
        """Raise a ValueError for settings that don't fit a model's config; called before its weights are loaded."""

    @classmethod
    def check_model(cls, settings: Any, anatomy: Anatomy) -> None:
        """Raise a ValueError for settings that don't fit this model."""

    def check_calibration(self) -> None:
        """Raise a ValueError for texts that are too short, or missing, before anything is written."""
        check_contrast(self.gradients, self.calibration.contrast)

    @classmethod
    def is_smaller(cls, settings: Any) -> bool:
        """True if candidates are really smaller: costs are then counted from the sizes of blocks."""
        return False

    @classmethod
    def held_of(cls, settings: Any, anatomy: Anatomy) -> Mapping[str, Any]:
        """Shapes that an export can hold if all blocks are alike: fields ``held_`` of `ModelShape`."""
        return {}

    @classmethod
    def by_blocks(cls, settings: Any) -> bool:
        """True if `prepare` reads weights in `stream_blocks` alone: it works on a model of which a block is held."""
        return False

    # --- what it will take, from shapes alone: the model may be without memory ---

    keys_of_configs: ClassVar[bool] = False
    """True if `keys` needs no open store."""

    def stored_bytes(self) -> int:
        """Upper bound of the bytes that `prepare` writes into a new directory."""
        return 0

    @property
    def streamed(self) -> Mapping[str, Any]:
        """Statistics that `prepare` collects: keyword arguments of `stream_blocks`; none: it collects none."""
        return {}

    @property
    def gradients(self) -> Sequence[Kind]:
        """Kinds of gradients of the dense model that `prepare` collects."""
        return ()

    # --- in a search: switched by reference ---

    @abstractmethod
    def prepare(self, directory: Path, on_block: OnBlock = no_report) -> None:
        """Write the store that all candidates share into a directory, unless it is there; continue an unfinished one.

        Raises:
            LevelStoreError: if there is no room on the disk.
        """

    @property
    def independent_blocks(self) -> bool:
        """True if `prepare_blocks` builds each block without the others, from the dense model's activations alone."""
        return False

    def worker_stores(self, directory: Path) -> Sequence[WorkerStore]:
        """Stores in the directory of `prepare` that workers build, by `prepare_blocks` in the directory of each store.

        What they depend on is written first.

        Raises:
            LevelStoreError: if there is no room on the disk.
        """
        return [WorkerStore(directory)] if self.independent_blocks else []

    def prepare_blocks(self, directory: Path, blocks: Collection[int], on_block: OnBlock = no_report) -> None:
        """Write these blocks of the store alone, as `prepare` does; the store is finished by `prepare`.

        Nothing is done in the directory of a finished store.

        Raises:
            LevelStoreError: if there is no room on the disk.
        """
        raise NotImplementedError(f"{type(self).__name__} builds no blocks without the others.")

    @abstractmethod
    def open(self, directory: Path) -> None:
        """Open the store that `prepare` wrote, in this process or in another; the model is dense."""

    @abstractmethod
    def keys(self, config: Config) -> Sequence[Hashable]:
        """One key a block; equal keys at one block are equal weights of it.

        Raises:
            InfeasibleError: if the candidate has no weights.
        """

    @abstractmethod
    def apply(self, block: int, key: Hashable) -> None:
        """Point the live block to the weights of a key."""

    def finish(self, key: Hashable) -> None:  # most change blocks alone
        """Point what follows the last block to the weights that go with the last block's key."""

    def release(self, block: int) -> None:
        """Make one block dense again after it was computed; its memory may serve others."""

    @abstractmethod
    def restore(self) -> None:
        """Make the whole model dense again, with the same tensors."""

    def weights_of(self, block: int, key: Hashable) -> Mapping[str, Float[Tensor, "out in"]]:
        """Weights of a block under a key, from the open store, in dense shapes: zeros in place of what is cut.

        By the projection's full name; where units are cut, output projections alone: their zero columns remove the
        unit. Not to be written to.
        """
        raise NotImplementedError(f"{type(self).__name__} gives no weights in dense shapes.")

    def cost(self, candidate: Any) -> Mapping[str, float]:
        """Exact counts of a candidate by name: its space's, unless they depend on the weights.

        Raises:
            InfeasibleError: if the candidate has no weights.
        """
        counts: Mapping[str, float] = self.space.cost(candidate)
        return counts

    def merges(self, config: Config) -> bool:
        """True if a repair merges dropped blocks into the kept ones before them."""
        return False

    def training_tokens(self, config: Config) -> int:
        """Tokens of forward passes that training for these weights took, a backward pass as two; 0 if told before."""
        return 0

    def baselines(self, directory: Path) -> Mapping[str, Any]:
        """Further baselines by name, from scores in the store."""
        return {}

    def proxy_loss(self, config: Config) -> float:
        """Predicted loss without a forward pass, from the open store: finite, less is better, 0 for the dense model.

        Raises:
            InfeasibleError: if the candidate has no weights.
        """
        raise NotImplementedError(f"The settings of {type(self).__name__} have no proxy.")

    def describe(self, directory: Path, candidates: Sequence[str]) -> dict[str, Any]:
        """Facts about finished candidates beside their values, as plain values, from the store."""
        return {}

    # --- for good ---

    @abstractmethod
    def prune(self, config: Config, *, sequential: bool, on_block: OnBlock = no_report) -> None:
        """Prune the live model: it has new tensors of its own where it changes.

        Args:
            config: of a candidate.
            sequential: statistics of a block come from already pruned blocks; otherwise they are `searched_statistics`,
                which gives the very weights that a search measures. Gradients are the dense model's either way.
            on_block: told the index of each block that is done.

        Raises:
            ValueError: if the configuration does not fit.
        """

    def blockwise(self, config: Config, *, sequential: bool) -> BlockwisePruning:
        """As `prune`, block by block, for a model that is streamed; no weight is looked at.

        Raises:
            NotStreamedError: if it needs more of the model than one block at a time, with the reason.
        """
        raise NotStreamedError(
            "Expected a recipe that zeros weights, such as wanda, got another way to prune."
        )

    @property
    def searched_statistics(self) -> str:
        """Statistics of the weights that a search measures, in a word for manifests."""
        return "dense"

    def fitted(self, form: Mapping[str, Any]) -> Config:
        """The plain configuration of this model for a form that fits other models too, see `Space.portable`.

        Raises:
            ValueError: if the form does not fit this model, with the reason.
        """
        raise ValueError(
            f"Expected a pruner that fits candidates of other models, got {type(self).__name__}, which does not."
        )

    def costs_of(self, config: Config) -> Mapping[str, float]:
        """Exact counts of a configuration by name, see `Space.cost`.

        Raises:
            ValueError: if the pruned model is no smaller, or can't be made.
        """
        raise ValueError(
            "Expected a recipe that removes structure for a bound, got one whose zeros are stored."
        )

    def reuse(self, directory: Path) -> None:
        """Use the store of an earlier search where it still fits, instead of recomputing it."""

    @classmethod
    def formats(cls, settings: Any) -> tuple[str, ...]:
        """Names of export formats, the usual one first."""
        return ("hf",)

    def check_format(self, config: Config, tokenizer: PreTrainedTokenizerBase, form: str) -> None:
        """Raise a ValueError if a format can't carry the pruned model; the live one is dense, and is not changed."""

    @abstractmethod
    def record(self, config: Config) -> dict[str, Any]:
        """The method, as plain values for hashes and manifests."""

    @abstractmethod
    def asked(self, config: Config) -> dict[str, Any]:
        """Fields of a manifest that are known before pruning: ``asked``, sparsity by projection, or ``kept`` units."""

    def calibration_record(self) -> dict[str, Any]:
        """The calibration data, for a manifest."""
        of = self.calibration
        return {"text": of.text, "tokens": of.tokens.numel(), "sha256": of.sha256} | self.further_record

    @property
    def further_record(self) -> dict[str, Any]:
        """The token that windows begin with, and whether experts saw all tokens, for records; nothing if neither."""
        bos = {} if self.anatomy.bos is None else {"bos": self.anatomy.bos}
        return bos | ({"moe_all_experts": True} if self.anatomy.all_experts else {})

    def save(
        self,
        loaded: LoadedModel,
        config: Config,
        to: Path,
        manifest: Manifest,
        check_tokens: Int64[Tensor, "rows length"],
    ) -> ExportReport:
        """Save the live model, which was pruned, with zeros in place; see `export_model`, also for what is raised."""
        return export_model(
            loaded.model,  # type: ignore[arg-type]  # a transformers model, known to mypy as a module
            loaded.tokenizer,
            to,
            manifest=manifest,
            check_tokens=check_tokens,
            dtype=loaded.stored_dtype,
        )


def pruner_class(settings: Any) -> type[Pruner]:
    """Class that prunes by candidates of the space of these settings."""
    found: type[Pruner] = resolve(SPACES[settings.kind].pruner)
    return found
