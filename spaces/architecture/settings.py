"""Settings of the space `architecture`, and the space that they describe."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from secateur.spaces.architecture.cost import Of
from secateur.spaces.architecture.levels import LevelRules, Unit
from secateur.spaces.architecture.space import ArchitectureSpace
from secateur.spaces.architecture.tied import TiedSpace
from secateur.spaces.methods import CUT_REPAIRS, DEPTH
from secateur.spaces.plugins import points
from secateur.spaces.section import Section, one_of
from secateur.spaces.shape import ModelShape, Prunable
from secateur.spaces.targets import Target, check_target, targets_of

UNITS: frozenset[Unit] = frozenset({"groups", "channels", "attention", "mlp"})
TIED_UNITS: frozenset[Unit] = frozenset({"groups", "channels", "blocks"})
SMALLEST_MLP = {"gguf": 32}  # llama.cpp computes a block wrongly that has an attention and no MLP

DEFAULT_BASELINES = ("flap", "shortgpt")
FORMATS = ("any", "hf", "hf-stock", "hf-padded", "gguf")


def scored_baselines() -> tuple[str, ...]:
    """Known allocations: by the scores of units, or of whole blocks."""
    return ("flap", *DEPTH)


Repair = Annotated[str, one_of(lambda: CUT_REPAIRS)]
Scored = Annotated[str, one_of(scored_baselines)]
Format = Annotated[str, one_of(lambda: (*FORMATS, *(point.name for point in points("secateur.formats"))))]


class ArchitectureSettings(Section):
    """What can be searched: how many KV groups and FFN channels each block keeps.

    Args:
        target: share of what the blocks hold of `of` that is removed; one value, a list, or a range.
        of: what the target counts. Latencies are predicted from a table that was measured before.
        units: what may be removed: single KV ``groups`` (a KV head with its query heads) and FFN ``channels``, whole
            ``attention`` and ``mlp`` sub-layers, whole ``blocks``; None: all but blocks, of which sub-layers make up,
            or groups, channels and blocks if tied. ``blocks`` stand alone, beside both sub-layers, or are tied.
        ffn_step: channels from one level to the next; None: about a 12th of the width, or a 48th if tied.
        multiple_of: divides every number of channels that is kept.
        tied: all kept blocks are alike, so that stock classes load the model.
        importance: what orders groups and channels; the first ones are kept.
        repair: how kept weights make up for removed ones: ``none``, ``bias``, ``refit``, ``obs``, ``liar`` or
            ``admm``; of a list each candidate chooses one.
        damp: share of the mean diagonal that is added to Gram matrices.
        statistics: of exported models: ``sequential`` (collected behind pruned blocks) or ``dense`` (of the dense
            model).
        target_format: what exports shall be: ``hf`` of any kind, ``hf-stock`` (tied, with numbers of KV groups that
            the stock class takes), ``hf-padded`` (the dense shapes with zeros: a study of quality), ``gguf`` (an MLP
            beside an attention keeps 32 channels), or ``any``: ``hf`` where the family allows it.
        protect: indices of blocks that stay dense; tied: that are not dropped.
        baselines: what is measured beside the uniform candidates, and searched from: known allocations by scores of
            the dense model, ``flap`` (groups and channels below one threshold), and those that drop whole blocks:
            ``shortgpt`` (of least influence), ``last``, ``shortened_ppl`` (without which the loss is lowest),
            ``shortened_taylor`` (of least first-order effect), ``laco``, ``mka`` and ``streamline`` (as those methods
            choose, none merged or replaced); None: the first two, if `units` can make them.
    """

    renamed: ClassVar[Mapping[str, str]] = {"calibration": "statistics"}

    kind: Literal["architecture"] = "architecture"
    target: Target = 0.25
    of: Of = "params"
    units: list[Unit] | None = None
    ffn_step: int | None = Field(default=None, ge=1)
    multiple_of: int = Field(default=1, ge=1)
    tied: bool = False
    importance: str = "wanda_sp"
    repair: Repair | list[Repair] = "none"
    damp: float = Field(default=0.01, gt=0, allow_inf_nan=False)
    statistics: Literal["sequential", "dense"] = "sequential"
    target_format: Format = "any"
    protect: list[int] = Field(default=[])
    baselines: list[Scored] | None = None

    @field_validator("target")
    @classmethod
    def _check_target(cls, target: Target) -> Target:
        return check_target(target)

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
        return self

    def _check_units(self) -> None:
        units = self.rules.units
        if not units:
            raise ValueError("Expected `units` to name some, got an empty list.")
        if self.all_alike and not units <= TIED_UNITS:
            raise ValueError(
                f"Expected `units` out of {', '.join(sorted(TIED_UNITS))} where all blocks are alike (`tied`, or "
                f"`target_format: hf-stock`), got {', '.join(sorted(units))}."
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
    def _makeable(self) -> tuple[str, ...]:
        """The known allocations that the units allow."""
        units = self.rules.units
        by_units = not self.all_alike and bool(units & {"groups", "channels"})
        whole = "blocks" in units or units >= {"attention", "mlp"}
        return tuple(name for name in scored_baselines() if (whole if name in DEPTH else by_units))

    @property
    def scored(self) -> tuple[str, ...]:
        """The baselines that are made from scores."""
        if self.baselines is not None:
            return tuple(dict.fromkeys(self.baselines))
        return tuple(name for name in self._makeable if name in DEFAULT_BASELINES)

    @property
    def all_alike(self) -> bool:
        """Whether all kept blocks are alike."""
        return self.tied or self.target_format == "hf-stock"

    @property
    def repairs(self) -> tuple[str, ...]:
        """The repairs that candidates choose from."""
        return tuple(self.repair) if isinstance(self.repair, list) else (self.repair,)

    @property
    def targets(self) -> tuple[float, ...]:
        """The targets in ascending order."""
        return targets_of(self.target)

    @property
    def rules(self) -> LevelRules:
        """Which numbers may be kept."""
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
    """The space that the settings describe, for a model of this shape.

    Raises:
        ValueError: if the settings don't fit the model, a target can't be met, or a latency is not known.
    """
    space = TiedSpace if settings.all_alike else ArchitectureSpace
    held = None if shape.held_groups is None else frozenset(shape.held_groups)
    rules = replace(settings.rules, held_groups=held)
    return space(shape, rules, settings.targets, settings.of, settings.repairs)
