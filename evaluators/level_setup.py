"""Setup of workers that build blocks of a level store, or of statistics: a plain value that is sent."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from secateur.evaluators.cases import Case
from secateur.evaluators.plan import SessionPlan
from secateur.evaluators.session import Session, set_threads
from secateur.evaluators.worker_setup import open_there, plan_there, weights_of
from secateur.pruners.calibration.prompts import prompt_tokens
from secateur.pruners.calibration.tokens import Calibration
from secateur.pruners.models.memory import take_share
from secateur.pruners.pruner import DenseModel
from secateur.pruners.stores.block_files import begun_digest, block_path
from secateur.spaces.own_metrics import HeldMethod, held_methods, hold
from secateur.spaces.sent_modules import SentModule, install, modules_of
from secateur.spaces.shape import ModelShape


@dataclass(frozen=True)
class LevelSetup:
    """Builds blocks of one level store, apart from others, with a session's model, space and calibration data.

    Args:
        plan: of the session, for workers.
        space: of the session.
        shape: sizes of the model.
        n_blocks: of the model.
        calibration: data that activations are computed on.
        threads: of torch.
        fingerprint: of the model.
        model: directory of a model whose weights are mapped as they are stored.
        levels: the store, which is begun.
        digest: of the key that it is built under.
        held: methods that the driver has registered and workers can't import.
        modules: of metrics that the settings name by a path, for workers that do not find them.
        share: of each GPU's memory, where several workers use one.
        doing: what workers do, in two words, for progress.
    """

    plan: SessionPlan
    space: Any
    shape: ModelShape
    n_blocks: int
    calibration: Calibration
    threads: int
    fingerprint: str
    model: Path
    levels: Path
    digest: str
    held: tuple[HeldMethod, ...]
    modules: tuple[SentModule, ...]
    share: float
    doing: str

    @property
    def directories(self) -> tuple[Path, ...]:
        """Directories that a worker reads."""
        return (self.model,)

    @property
    def files(self) -> list[Path]:
        """The file of each block, there or not."""
        return [block_path(self.levels, index) for index in range(self.n_blocks)]

    def __call__(
        self, directories: Sequence[Path], to: Path, blocks: Collection[int], on_file: Callable[[Path], None]
    ) -> None:
        """Build blocks, unless they are there.

        Args:
            directories: paths of those of the setup on this node.
            to: directory for these blocks alone, with what a killed worker left of them.
            blocks: their indices.
            on_file: given the file of each block when it is whole.

        Raises:
            LevelStoreError: if there is no room on the disk.
            ValueError: as `Pruner.prepare`; or if the blocks would not be those of the driver's store.
        """
        set_threads(self.threads)
        take_share(self.share)
        hold(self.held)
        install(self.modules)
        loaded, anatomy = open_there(self.plan, directories[0])
        dense = DenseModel(anatomy, self.fingerprint, self.shape, prompt_tokens(loaded.tokenizer))

        def tell(index: int) -> None:
            if begun_digest(to) != self.digest:
                raise ValueError(
                    "Expected workers with the methods and libraries of the driver, got another identity of the level "
                    "store. Install the same versions on every node."
                )
            if index in blocks:
                on_file(block_path(to, index))

        Case(self.plan, self.space, dense, self.calibration).pruner().prepare_blocks(to, blocks, tell)


def level_setups(
    session: Session, levels: Path, *, threads: int, spread: bool, device: str, share: float
) -> Iterator[LevelSetup]:
    """Setup of each store, of a session and its other models, that workers can build by blocks; it is begun.

    Others are built by one process: those from activations behind pruned blocks (`space.statistics: expected`), and
    gradients with what is made of them.

    Args:
        session: the driver's.
        levels: the level store.
        threads: of torch in a worker.
        spread: put one model on all devices that a worker sees.
        device: of the workers' models otherwise.
        share: of each GPU's memory that a worker plans with.

    Raises:
        LevelStoreError: if there is no room on the disk.
    """
    of_models = [(session, levels), *((x, x.beside(levels)) for x in session.others)]
    for one, store in [(x, store) for x, place in of_models for store in x.pruner.worker_stores(place)]:
        calibration = one.pruner.calibration
        if store.tokens is not None:
            calibration = replace(calibration, tokens=store.tokens, sources={})
        Case(one.plan, one.space, one.dense, calibration).pruner().prepare_blocks(store.directory, ())
        digest = begun_digest(store.directory)
        assert digest is not None, "begun just now"
        yield LevelSetup(
            plan_there(one, one.plan, spread=spread, device=device),
            one.space,
            one.dense.shape,
            len(one.anatomy.blocks),
            calibration,
            threads,
            one.loaded.fingerprint,
            weights_of(one),
            store.directory,
            digest,
            held_methods(),
            modules_of(one.plan.space.method_names),
            share,
            store.doing,
        )
