"""Settings of the space `architecture`, and its construction from them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from secateur.spaces.architecture.cost import USAGES, ShareOf, block_shares, is_cost
from secateur.spaces.architecture.levels import LevelRules, Removable
from secateur.spaces.architecture.space import ArchitectureSpace
from secateur.spaces.architecture.tied import TiedSpace
from secateur.spaces.methods import DEPTH, EXPERT_IMPORTANCES, UNIT_REPAIRS
from secateur.spaces.plugins import points
from secateur.spaces.section import one_of
from secateur.spaces.shape import ModelShape, Prunable
from secateur.spaces.space_settings import SpaceSettings, Target, targets_of

UNITS: frozenset[Removable] = frozenset({"groups", "channels", "attention", "mlp"})
TIED_UNITS: frozenset[Removable] = frozenset({"groups", "channels", "blocks"})
HEADS: frozenset[Removable] = frozenset({"heads"})
HIDDEN: frozenset[Removable] = frozenset({"hidden"})
"""Not by default."""

EXPERTS: frozenset[Removable] = frozenset({"experts"})
"""By default beside the others where a model has mixtures."""

SMALLEST_MLP = {"gguf": 32}  # llama.cpp miscomputes blocks with an attention and no MLP

DEFAULT_BASELINES = ("flap", "shortgpt")
FORMATS = ("any", "hf", "hf-stock", "hf-padded", "gguf")


def scored_baselines() -> tuple[str, ...]:
    """Names of published allocations: by scores of units, or of whole blocks."""
    return ("flap", *DEPTH)


Repair = Annotated[str, one_of(lambda: UNIT_REPAIRS)]
ExpertImportance = Annotated[str, one_of(lambda: EXPERT_IMPORTANCES)]
Scored = Annotated[str, one_of(scored_baselines)]
Format = Annotated[str, one_of(lambda: (*FORMATS, *(point.name for point in points("secateur.formats"))))]


class ArchitectureSettings(SpaceSettings):
    """Settings of the space `architecture`: numbers of KV groups and FFN channels of each block.

    Args:
        target: share of the blocks' `of` to remove; one value, a list, or a range.
        of: quantity of the target. Latencies are predicted from a table measured before: ``latency_decode`` at the
            first batch size of `evaluator.latency.batch`, ``latency_decode@8`` at a further one.
        share_of: what `target` is a share of: the ``blocks``, or the whole ``model``.
        units: removable units: single KV ``groups`` (a KV head with its query heads) and FFN ``channels``, query
            ``heads`` (equally many of each KV group), routed ``experts`` of mixtures, ``expert_channels`` (within
            routed experts, equally many in each of a block, and within shared ones; beside neither mlp nor blocks),
            whole ``attention`` and ``mlp`` sub-layers, whole ``blocks``, or ``hidden`` channels, one width for the
            whole model (tied alone); None: all but heads, expert_channels, hidden and blocks, or groups, channels,
            experts and blocks if tied. ``blocks`` are allowed alone, beside both sub-layers, or tied.
        ffn_step: channels between levels; None: about a 12th of the width, or a 48th if tied.
        multiple_of: divisor of every number of kept channels.
        tied: all kept blocks have equal shapes, so that stock classes load the model.
        importance: ranking of groups and channels; the highest are kept. None: ``obs``, or ``wanda_sp`` where the
            memory is short, `units` are whole sub-layers and blocks, or a repair leaves weights as they are, for which
            the order of ``obs`` isn't made.
        expert_importance: ranking of the routed experts of a mixture, or the choice of those that stay (``nae``).
        repair: compensation for removed weights: ``none``, ``bias``, ``refit``, ``obs``, ``liar`` or ``admm``; for
            removed experts ``ream``, ``mc_smoe`` or ``hc_smoe``, which merge them into those that stay; each candidate
            chooses one of a list. None: ``obs``, or ``none`` on the first two of these conditions.
        dampening: share of the mean diagonal added to Gram matrices.
        statistics: of exported models: ``sequential`` (collected behind pruned blocks) or ``dense`` (of the dense
            model).
        target_format: format of exports: ``hf`` of any kind, ``hf-stock`` (tied, with numbers of KV groups that the
            stock class accepts), ``hf-padded`` (the dense shapes with zeros, for studies of quality), ``gguf`` (an MLP
            beside an attention keeps at least 32 channels), or ``any``: ``hf`` where the family allows it.
        switches: slots between which a mutation moves levels: ``any`` (others make up for the difference of cost, and
            whole sub-layers come and go), or ``alike`` ones, attentions or MLPs, whose totals stay as they are
            (DarwinLM).
        protect: indices of blocks kept dense; tied: of blocks that are not dropped.
        baselines: published allocations, measured beside the uniform candidates and used as starting points:
            ``flap`` (one global threshold for groups and channels), and rankings of whole blocks: ``shortgpt`` (block
            influence), ``last``, ``shortened_ppl`` (loss without the block), ``shortened_taylor`` (first-order
            effect), ``laco``, ``mka`` and ``streamline`` (the blocks these methods choose, without their merging or
            replacement); None: the first two, if `units` allow them.
    """

    renamed: ClassVar[Mapping[str, str]] = {"calibration": "statistics", "damp": "dampening"}

    by_model: ClassVar[tuple[str, ...]] = ("importance", "repair")

    later: ClassVar[tuple[str, ...]] = ("switches", "expert_importance")

    changeable: ClassVar[tuple[str, ...]] = ("target", "share_of", "statistics")

    kind: Literal["architecture"] = "architecture"
    target: Target = 0.25
    of: Annotated[str, one_of(lambda: USAGES, also=is_cost)] = "params"
    share_of: ShareOf = "blocks"
    units: list[Removable] | None = None
    ffn_step: int | None = Field(default=None, ge=1)
    multiple_of: int = Field(default=1, ge=1)
    tied: bool = False
    importance: str | None = None
    expert_importance: ExpertImportance = "reap"
    repair: Repair | list[Repair] | None = None
    dampening: float = Field(default=0.01, gt=0, allow_inf_nan=False)
    statistics: Literal["sequential", "dense"] = "sequential"
    target_format: Format = "any"
    switches: Literal["any", "alike"] = "any"
    protect: list[int] = Field(default=[])
    baselines: list[Scored] | None = None

    @model_validator(mode="after")
    def _check(self) -> ArchitectureSettings:
        if (self.ffn_step or 0) % self.multiple_of:
            raise ValueError(
                f"Expected `multiple_of` to divide `ffn_step`, got {self.multiple_of} and {self.ffn_step}."
            )
        if not self.repairs or len(set(self.repairs)) < len(self.repairs):
            raise ValueError(f"Expected `repair` to name some, each once, got {list(self.repairs)}.")
        self._check_units()
        self._check_baselines()
        if self.switches == "alike" and self.all_alike:
            raise ValueError(
                "Expected blocks of different shapes with `switches: alike`, got blocks that are all alike. Leave one "
                "of them out."
            )
        return self

    def _check_units(self) -> None:
        units = self.rules.units
        if not units:
            raise ValueError("Expected `units` to name some, got an empty list.")
        of_alike = TIED_UNITS | HEADS | HIDDEN | EXPERTS
        if self.all_alike and not units <= of_alike:
            raise ValueError(
                f"Expected `units` out of {', '.join(sorted(of_alike))} where all blocks are alike (`tied`, or "
                f"`target_format: hf-stock`), got {', '.join(sorted(units))}."
            )
        if "expert_channels" in units and units & {"mlp", "blocks"}:
            raise ValueError(
                f"Expected no mlp and no blocks in `units` with expert_channels, got {', '.join(sorted(units))}. A "
                "block keeps some experts then."
            )
        untimed = units & (HEADS | HIDDEN | {"expert_channels"})
        if untimed and self.of.startswith("latency"):
            raise ValueError(
                f"Expected no {min(untimed)} in `units` with `of: {self.of}`, as latency tables have no times of them, "
                f"got both."
            )
        if not self.all_alike and "hidden" in units:
            raise ValueError(
                "Expected `tied: true`, or `target_format: hf-stock`, with hidden in `units`, as one width serves all "
                "blocks, got blocks of different shapes."
            )
        if "hidden" in units and self.share_of == "model":
            raise ValueError(
                "Expected `share_of: blocks` with hidden in `units`, which take from the embedding too, got model."
            )
        if "hidden" in units and self.target_format not in ("any", "hf", "hf-stock"):
            raise ValueError(
                f"Expected `target_format` any, hf or hf-stock with hidden in `units`, got {self.target_format}."
            )
        if not self.all_alike and "blocks" in units and len(units) > 1 and not units >= {"attention", "mlp"}:
            raise ValueError(
                f"Expected blocks in `units` alone or beside attention and mlp, got {', '.join(sorted(units))}. Add "
                f"both, or use `tied: true`."
            )

    def _check_baselines(self) -> None:
        for name in self.baselines or ():
            if name not in self._makeable:
                raise ValueError(
                    f"Expected `baselines` that `units` can make, got {name} with {', '.join(sorted(self.rules.units))}"
                    f"{', all blocks alike' if self.all_alike else ''}. These can be made: "
                    f"{', '.join(self._makeable) or 'none'}."
                )

    @property
    def method_names(self) -> tuple[str, ...]:
        return () if self.importance is None else (self.importance,)

    @property
    def _makeable(self) -> tuple[str, ...]:
        """Published allocations that the units allow."""
        units = self.rules.units
        by_units = not self.all_alike and bool(units & {"groups", "channels"})
        whole = "blocks" in units or units >= {"attention", "mlp"}
        return tuple(name for name in scored_baselines() if (whole if name in DEPTH else by_units))

    @property
    def scored(self) -> tuple[str, ...]:
        """Baselines that need scores of the dense model."""
        if self.baselines is not None:
            return tuple(dict.fromkeys(self.baselines))
        return tuple(name for name in self._makeable if name in DEFAULT_BASELINES)

    @property
    def by_gradients(self) -> bool:
        return not self.all_alike and self.rules.units <= {"groups", "heads", "channels", "attention", "mlp"}

    @property
    def all_alike(self) -> bool:
        """True if all kept blocks have equal shapes."""
        return self.tied or self.target_format == "hf-stock"

    @property
    def repairs(self) -> tuple[str, ...]:
        if self.repair is None:  # not settled yet
            return ("none",)
        return tuple(self.repair) if isinstance(self.repair, list) else (self.repair,)

    @property
    def counts(self) -> str:
        return self.of

    @property
    def export_format(self) -> str:
        return self.target_format

    @property
    def export_statistics(self) -> str:
        return self.statistics

    @property
    def targets(self) -> tuple[float, ...]:
        return targets_of(self.target)

    @property
    def rules(self) -> LevelRules:
        smallest = SMALLEST_MLP.get(self.target_format, 0)
        default = TIED_UNITS if self.all_alike else UNITS
        return LevelRules(
            units=default if self.units is None else frozenset(self.units),
            ffn_step=self.ffn_step,
            multiple_of=self.multiple_of,
            smallest_mlp=math.ceil(smallest / self.multiple_of) * self.multiple_of,
            protect=frozenset(self.protect),
            n_steps=48 if self.all_alike else 12,
        )


def build_architecture(
    settings: ArchitectureSettings, linears: Sequence[Prunable], shape: ModelShape
) -> ArchitectureSpace | TiedSpace:
    """The space of these settings, for a model of this shape.

    Raises:
        ValueError: if the settings don't fit the model, a target can't be met, or a latency is not known.
    """
    held = None if shape.held_groups is None else frozenset(shape.held_groups)
    rules, counted = (
        replace(settings.rules, held_groups=held),
        (
            block_shares(shape, settings.targets, settings.share_of, settings.of),
            settings.of,
            settings.repairs,
        ),
    )
    mixed = any(block.experts for block in shape.blocks)
    if mixed and settings.units is None:
        rules = replace(rules, units=rules.units | EXPERTS)
    for name in ("experts", "expert_channels"):
        if name in rules.units and not mixed:
            raise ValueError(
                f"Expected a model with a mixture of experts for {name} in `units`, got one without. Name others: "
                f"{', '.join(sorted(UNITS))}."
            )
    if "heads" in rules.units and all(block.n_queries == 1 for block in shape.blocks):
        raise ValueError(
            "Expected several query heads that share a KV head for heads in `units`, got one each. Use groups."
        )
    untimed = rules.units & (HEADS | HIDDEN)
    if untimed and shape.latency is not None:
        raise ValueError(
            f"Expected no latencies with {min(untimed)} in `units`, as their tables have no times of them, got some."
        )
    if "hidden" in rules.units and not shape.narrower:
        raise ValueError(
            "Expected a model whose stock class holds fewer hidden channels for hidden in `units`, got another."
        )
    if settings.all_alike:
        return TiedSpace(shape, rules, *counted).asked_as(settings.targets)
    space = ArchitectureSpace(shape, rules, *counted, alike=settings.switches == "alike")
    return space.asked_as(settings.targets)
