"""Prospect: the model of a plan without memory, its parts, its space and its pruner, from config.json alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from secateur.evaluators.latency.store import find_table
from secateur.evaluators.plan import SessionPlan
from secateur.pruners.models.anatomy import Anatomy
from secateur.pruners.models.discover import dissect
from secateur.pruners.models.loading import DTYPES, EMBEDDED, device_of, precision_of, read_config
from secateur.pruners.models.room import room_beside
from secateur.pruners.models.shape import model_shape, prunables
from secateur.pruners.models.skeleton import ShapesOnly, n_experts_of, skeleton
from secateur.pruners.models.usable import check_windows
from secateur.pruners.pruner import DenseModel, Pruner, pruner_class
from secateur.spaces.located import located
from secateur.spaces.registry import SPACES

Say = Callable[[str], None]


@dataclass(frozen=True)
class Outline:
    """A model without memory.

    Args:
        config: of transformers.
        anatomy: of its skeleton.
        dtype: of its weights in memory.
        stored: of its weights in their files.
        device: where it is to run; one that is only thought of need not be there.
        trust_remote_code: see `load_model`.
    """

    config: Any
    anatomy: Anatomy
    dtype: torch.dtype
    stored: torch.dtype
    device: torch.device
    trust_remote_code: bool

    @property
    def n_experts(self) -> int:
        """Routed experts of a mixture."""
        return n_experts_of(self.config)

    @property
    def shapes(self) -> ShapesOnly:
        """A new mode to run the skeleton in."""
        return ShapesOnly(self.n_experts)


def outline(
    model: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    check: Callable[[Any], object] = lambda config: None,
    planned: str | None = None,
    planned_bytes: int | None = None,
    bos: int | None = None,
    say: Say = lambda line: None,
) -> Outline:
    """The outline of a model by its name, see `load_model`.

    Args:
        check: given the config; raises a ValueError for one that won't do.
        planned: a device that is only thought of, in place of `device`, such as ``cuda``; it need not be there.
        planned_bytes: its memory, if it is known.

    Raises:
        ModelError: if there is no such config, or it is of a model that can't be pruned.
        ValueError: as `check` does, or if a part of the model is not understood.
    """
    target = torch.device(planned) if planned else device_of("auto" if device == "spread" else device)
    precision = precision_of(dtype, target)
    config = read_config(model, trust_remote_code=trust_remote_code, say=say)
    check(config)
    stored = config.dtype if config.dtype in DTYPES.values() else precision
    empty = skeleton(config, precision, trust_remote_code=trust_remote_code)
    with ShapesOnly(n_experts_of(config)):
        anatomy = dissect(empty, bos)
    if planned is None or planned_bytes is not None:
        anatomy = replace(anatomy, room=room_beside(empty, target, planned_bytes))
    return Outline(config, anatomy, precision, stored, target, trust_remote_code)


@dataclass(frozen=True)
class Prospect:
    """A search's plan on a model without memory.

    Args:
        plan: with what the space leaves to the model.
        outline: of the model.
        dense: its parts and sizes.
        space: of the candidates.
    """

    plan: SessionPlan
    outline: Outline
    dense: DenseModel
    space: Any

    @property
    def anatomy(self) -> Anatomy:
        return self.dense.anatomy

    def pruner(self) -> Pruner:
        """The pruner of the space, without calibration data."""
        settings = self.plan.space
        return pruner_class(settings)(settings, self.dense, space=self.space, seed=self.plan.seed)


def prospect(
    plan: SessionPlan,
    *,
    planned: str | None = None,
    planned_bytes: int | None = None,
    say: Say = lambda line: None,
) -> Prospect:
    """The prospect of a plan; the same checks as of a session, as far as they need no weights and no texts.

    Args:
        planned, planned_bytes: see `outline`.

    Raises:
        ValueError: on anything in the plan that does not fit the config (family, metric, target, windows).
    """
    pruner = pruner_class(plan.space)
    pruner.check_settings(plan.space)
    found = outline(
        plan.model if plan.model in EMBEDDED else located(plan.model, plan.folders),
        dtype=plan.dtype,
        device=plan.device,
        trust_remote_code=plan.trust_remote_code,
        check=lambda config: pruner.check_config(plan.space, config),
        planned=planned,
        planned_bytes=planned_bytes,
        say=say,
    )
    anatomy = replace(found.anatomy, all_experts=plan.moe_all_experts)
    for length in (plan.window, *plan.space.window_lengths):
        check_windows(anatomy.model, length, allow_long=plan.allow_long_windows)
    with found.shapes:
        settled = pruner.settled(plan.space, anatomy)
        plan = replace(plan, space=settled)
        pruner.check_model(settled, anatomy)
        dense = dense_of(
            replace(found, anatomy=anatomy),
            plan.window,
            settled,
            latency=None
            if plan.latency is None
            else find_table(anatomy, plan.latency, plan.model, found.device),
        )
        space = SPACES[settled.kind].build(settled, prunables(anatomy), dense.shape)
    return Prospect(plan, replace(found, anatomy=anatomy), dense, space)


def dense_of(found: Outline, window: int, settings: Any, latency: Any = None) -> DenseModel:
    """The outlined model with its sizes, as `DenseModel.of` counts them."""
    pruner = pruner_class(settings)
    shape = model_shape(
        found.anatomy,
        window,
        found.stored.itemsize,
        blocks=pruner.is_smaller(settings),
        latency=latency,
        held=pruner.held_of(settings, found.anatomy),
    )
    return DenseModel(found.anatomy, "", shape)
