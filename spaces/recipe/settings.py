"""Settings of the space `recipe`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import ClassVar, Literal, get_args

from pydantic import Field, field_validator, model_validator

from secateur.spaces.architecture.cost import ShareOf
from secateur.spaces.formulas.metric import MetricName
from secateur.spaces.method import Unit
from secateur.spaces.methods import REPAIRS, RULES, check_protect, metrics_of, searched
from secateur.spaces.recipe.calibration_options import check_windows
from secateur.spaces.recipe.choices import Subspace, items_of_known
from secateur.spaces.recipe.form import nested
from secateur.spaces.recipe.groups import check_group_options
from secateur.spaces.recipe.keys import (
    BLEND,
    BLENDED,
    first_metric,
    leaves,
    signed_metrics,
)
from secateur.spaces.recipe.known import KNOWN
from secateur.spaces.recipe.proxied import RecipeProxySettings
from secateur.spaces.recipe.scheduled import ScheduleOptions
from secateur.spaces.space_settings import SpaceSettings, Target, targets_of


class RecipeSettings(SpaceSettings):
    """Recipes to search: calibration data, metric, allocation and repair together, at one sparsity.

    Args:
        unit: unit of pruning: single ``weights``, KV groups and FFN channels (``structure``), whole ``blocks``, or
            routed ``experts`` of mixtures.
        target: share to remove, of the prunable weights, for structure and blocks of the blocks' parameters, for
            experts of those of the routed experts; one value, a list, or a range.
        share_of: what `target` is a share of: the ``blocks``, or the whole ``model`` (structure and blocks alone).
        search: sections to search; the others are those of `start`.
        start: name of a published recipe; None: ``wanda``, ``wanda_sp``, ``shortgpt`` or ``reap``.
        known: names of published recipes to measure first, ``all`` of the unit, or None for a few.
        sources: calibration texts by name; none: the evaluator's calibration set, as ``calibration``.
        mixture: largest weight of a source in a mixture of several.
        pool_tokens: tokens of each source to draw samples from.
        samples: options for the number of windows.
        length: options for the tokens of a window.
        choose: options for the choice of windows: at ``random``, by the dense model's ``loss``, or by ``clusters`` of
            its hidden states.
        subsets: number of frozen random subsets.
        quantiles: options for the range of losses, as pairs.
        gradients: by ``backward`` passes, or estimated by ``forward`` passes alone, for metrics that allow it.
        metrics: names, or formulas such as ``formula: abs(W) * X``; ``blend`` is a parametrised family. None: a
            selection, and that of the start.
        group_size: options for the m of n of m patterns, of weights; 0: none. What contradicts a pattern is without it:
            metrics that can't choose within groups; the rule is uniform. None: the pattern of the start, if it has one.
        allocations: rules; None: a selection, and that of the start.
        repairs: names; None: a selection, and that of the start.
        schedule: options for the keys of schedules: rounds, and training in and around them, whose tokens count in the
            budget; None: the schedule of the start, or of the known recipe, stays as it is.
        profile: file with shares, or an order, for the rules that need one.
        protect: patterns (``*`` and ``?``) of full names of linears kept dense; for structure and blocks, with all
            units that contain them.
        dampening: share of the mean diagonal added to Gram matrices.
        proxy: for the loss of recipes of the unit ``weights``, for controllers that screen by it; None: there is none.
        cache_gb: size of each node's cache of statistics, with eviction of the least recently used: a search needs
            space for one choice of calibration data, 4 bytes a weight for each kind of gradients.
    """

    renamed: ClassVar[Mapping[str, str]] = {"damp": "dampening"}

    kind: Literal["recipe"] = "recipe"
    unit: Unit = "structure"
    target: Target = 0.2
    share_of: ShareOf = "blocks"
    search: list[Subspace] = Field(default=list(get_args(Subspace)))
    start: str | None = None
    known: list[str] | Literal["all"] | None = None
    sources: dict[str, str] = Field(default={})
    mixture: int = Field(default=2, ge=1)
    pool_tokens: int = Field(default=32768, gt=0)
    samples: list[int] = Field(default=[8, 16, 32])
    length: list[int] = Field(default=[64, 128, 256])
    choose: list[Literal["random", "loss", "clusters"]] = Field(default=["random", "loss", "clusters"])
    subsets: int = Field(default=8, ge=1)
    quantiles: list[tuple[float, float]] = Field(
        default=[(0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1), (0, 0.5), (0.25, 0.75), (0.5, 1)]
    )
    gradients: list[Literal["backward", "forward"]] = Field(default=["backward"])
    metrics: list[MetricName] | None = None
    group_size: list[int] | None = None
    allocations: list[str] | None = None
    repairs: list[str] | None = None
    schedule: ScheduleOptions | None = None
    profile: str | None = None
    protect: list[str] = Field(default=[])
    dampening: float = Field(default=0.01, gt=0, allow_inf_nan=False)
    cache_gb: float = Field(default=8.0, gt=0)
    proxy: RecipeProxySettings | None = None

    batch: ClassVar[int] = 1
    """Default number of candidates a round: few are measured, and they share no blocks."""

    later: ClassVar[tuple[str, ...]] = ("proxy", "schedule", "group_size")

    changeable: ClassVar[tuple[str, ...]] = ("target", "share_of", "cache_gb")
    """Keys that may change when a search is continued: candidates name their sparsity, and the cache is recomputed."""

    @field_validator("target")
    @classmethod
    def _check_target(cls, target: Target) -> Target:
        for value in targets_of(target):
            if not 0 < value < 1:
                raise ValueError(f"Expected `target` within (0, 1), got {value}.")
        return target

    @model_validator(mode="after")
    def _check(self) -> RecipeSettings:
        for name in LISTS:
            values = getattr(self, name)
            if values is not None and (not values or len(set(values)) < len(values)):
                raise ValueError(f"Expected `{name}` to list some, each once, got {values}.")
        for name, least in (("samples", 1), ("length", 2)):
            if min(getattr(self, name)) < least or getattr(self, name) != sorted(getattr(self, name)):
                raise ValueError(
                    f"Expected `{name}` to ascend from at least {least}, got {getattr(self, name)}."
                )
        if self.share_of == "model" and self.unit not in ("structure", "blocks"):
            raise ValueError(
                f"Expected `share_of: blocks` with the unit {self.unit}, got model. Leave it out, or choose the unit "
                "structure or blocks."
            )
        sizes, rule = self.group_size or (), leaves("weights")["metric.group_size"].rule
        if self.group_size is not None and self.unit != "weights":
            raise ValueError(f"Expected `group_size` with the unit weights, got {self.unit}. Leave it out.")
        if wrong := [size for size in sizes if not rule.holds(size)]:
            raise ValueError(f"Expected `group_size` {rule.words}, got {wrong[0]}.")
        if self.schedule is not None:
            self.schedule.check_unit(self.unit)
        check_windows(self)
        self._check_names()
        self._check_methods()
        return self

    def _check_methods(self) -> None:
        start = nested(items_of_known(self.start_name))
        others = [{"name": x} for x in self.metric_options] if "metric" in self.search else []
        metrics = [start["metric"], *others]
        for metric in metrics:
            check_protect(self.unit, metric, self.protect)
        of_metrics = dict.fromkeys(metric["name"] for metric in metrics)
        rules = [start["allocation"]["rule"]] if "allocation" in start else []
        rules = list(
            dict.fromkeys([*rules, *(self.allocation_options if "allocation" in self.search else ())])
        )
        if self.group_size is not None:
            check_group_options(self.group_size, self.targets, of_metrics, rules)
        if self.proxy is not None:
            trains = self.schedule is not None and self.schedule.trains
            self.proxy.check_recipes(self.unit, of_metrics, rules, trains=trains)

    def _check_names(self) -> None:
        rules = [name for name, row in RULES.items() if self.unit in row.units]
        known = [name for name, row in KNOWN.items() if row.unit == self.unit]
        named = (
            ("allocations", self.allocations, rules),
            ("repairs", self.repairs, REPAIRS[self.unit]),
            ("start", [self.start_name], known),
            ("known", self.known_names, known),
        )
        for key, names, allowed in named:
            for name in names or ():
                if name not in allowed:
                    raise ValueError(
                        f"Expected `{key}` of {self.unit} out of {', '.join(allowed) or 'none'}, got {name!r}."
                    )
        of_files = [name for name in self.allocations or () if "profile" in RULES[name].evidence]
        if of_files and self.profile is None:
            raise ValueError(f"Expected `profile`, the file that the rule {of_files[0]} follows, got none.")
        if "metric" in self.search and "forward" in self.gradients:
            signed = (*signed_metrics(), BLEND)
            able = [name for name in self.metric_options if name in signed]
            if not able or self.unit not in BLENDED:
                raise ValueError(
                    f"Expected one of `metrics` that takes signed gradients ({', '.join(signed)}) with "
                    f"`gradients: forward`, got {', '.join(self.metric_options)}."
                )

    @property
    def has_proxy(self) -> bool:
        return self.proxy is not None

    @property
    def window_lengths(self) -> tuple[int, ...]:
        return tuple(self.length)

    @property
    def n_text_tokens(self) -> int:
        return self.pool_tokens

    @property
    def files(self) -> dict[str, Path]:
        return {} if self.profile is None else {"profile": Path(self.profile)}

    def located(self, locate: Callable[[str], str], locate_text: Callable[[str], str]) -> RecipeSettings:
        sources = {name: locate_text(text) for name, text in self.sources.items()}
        profile = self.profile and locate(self.profile)
        return self.model_copy(update={"sources": sources, "profile": profile})

    @property
    def targets(self) -> tuple[float, ...]:
        return targets_of(self.target)

    @property
    def texts(self) -> dict[str, str]:
        """Text source by name; ``""``: the evaluator's calibration set."""
        return self.sources or {"calibration": ""}

    @property
    def source_names(self) -> tuple[str, ...]:
        return tuple(sorted(self.texts))

    @property
    def start_name(self) -> str:
        """Published recipe for values that are not searched."""
        return self.start or first_metric(self.unit)

    @property
    def known_names(self) -> tuple[str, ...]:
        """Published recipes to measure first, beside the start."""
        if self.known == "all":
            return tuple(name for name, row in KNOWN.items() if row.unit == self.unit)
        return FIRST_KNOWN[self.unit] if self.known is None else tuple(dict.fromkeys(self.known))

    @property
    def metric_options(self) -> tuple[str, ...]:
        if self.metrics is not None:
            return tuple(self.metrics)
        of_start = items_of_known(self.start_name)["metric.name"]
        blend = (BLEND,) if self.unit in BLENDED else ()
        return tuple(dict.fromkeys([*blend, *searched(metrics_of(self.unit)), of_start]))

    @property
    def allocation_options(self) -> tuple[str, ...]:
        if self.allocations is not None:
            return tuple(self.allocations)
        tried = searched({name: row for name, row in RULES.items() if self.unit in row.units})
        of_start = items_of_known(self.start_name).get("allocation.rule")
        return tuple(dict.fromkeys([*tried, *([of_start] if of_start else ())]))

    @property
    def repair_options(self) -> tuple[str, ...]:
        if self.repairs is not None:
            return tuple(self.repairs)
        of_start = items_of_known(self.start_name)["repair"]
        return tuple(dict.fromkeys([*searched(REPAIRS[self.unit]), of_start]))

    @property
    def method_names(self) -> tuple[str, ...]:
        return (*self.metric_options, *self.allocation_options, *self.repair_options)


LISTS = (
    "samples",
    "length",
    "choose",
    "quantiles",
    "gradients",
    "metrics",
    "group_size",
    "allocations",
    "repairs",
)
"""Keys with options, where there are some."""

FIRST_KNOWN: dict[Unit, tuple[str, ...]] = {
    "weights": ("magnitude", "sparsegpt"),
    "structure": ("flap", "ziplm"),
    "blocks": ("last",),
    "experts": ("frequency", "easy_ep"),
}
"""Default of `known`."""
