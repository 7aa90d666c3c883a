"""Samplers of Optuna by name, third-party ones by dotted name, with their capabilities."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

from secateur.spaces.names import nearest
from secateur.spaces.space import IntParameter

if TYPE_CHECKING:  # takes a second to import
    from optuna.distributions import BaseDistribution

# Options set by the controller.
RESERVED = {"seed", "constraints_func", "group"}


@dataclass(frozen=True)
class SamplerRow:
    """One sampler.

    Args:
        path: dotted name of the class.
        source: address of the paper that it comes from; empty if there is none.
        multi_objective: whether it takes several objectives.
        constrained: whether it learns from a violated constraint; others are told a bad value instead.
        conditional: options with which it groups conditional parameters by itself; None: it can't, and draws them at
            random.
        after: in a conditional space, the sampler with default options that proposes all parameters before this one
            replaces the ordered ones, see `OrderedParameters`; empty: this one proposes all.
        categorical: whether it proposes categorical values; else they are drawn at random.
        defaults: options that differ from the class's own defaults.
        comfort: largest numbers of parameters and trials at which it is fast, or None.
    """

    path: str
    source: str = ""
    multi_objective: bool = True
    constrained: bool = False
    conditional: Mapping[str, Any] | None = None
    after: str = ""
    categorical: bool = True
    defaults: Mapping[str, Any] = field(default_factory=dict)
    comfort: tuple[int, int] | None = None


SAMPLERS: dict[str, SamplerRow] = {
    "tpe": SamplerRow(
        "optuna.samplers.TPESampler",
        "https://arxiv.org/abs/2304.11127",
        constrained=True,
        conditional={"group": True},
        defaults={"multivariate": True, "constant_liar": True},  # multivariate: 8 times faster, as good
    ),
    "nsga2": SamplerRow(
        "optuna.samplers.NSGAIISampler", "https://doi.org/10.1109/4235.996017", constrained=True
    ),
    "nsga3": SamplerRow(
        "optuna.samplers.NSGAIIISampler", "https://doi.org/10.1109/TEVC.2013.2281535", constrained=True
    ),
    "gp": SamplerRow(
        "optuna.samplers.GPSampler",
        "https://arxiv.org/abs/1807.02811",
        after="tpe",
        defaults={"warn_independent_sampling": False},
        comfort=(15, 200),
    ),
    "cmaes": SamplerRow(
        "optuna.samplers.CmaEsSampler",
        "https://arxiv.org/abs/1604.00772",
        multi_objective=False,
        categorical=False,
        defaults={"warn_independent_sampling": False},
    ),
    "random": SamplerRow("optuna.samplers.RandomSampler"),
}


def quiet_optuna() -> Any:
    """Optuna without its log of every trial; it takes a second to import."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def row_of(name: str) -> SamplerRow:
    """Row of a known sampler; for a dotted name one with the least assumptions."""
    return SAMPLERS.get(name) or SamplerRow(name)


def check_name(name: str) -> str:
    """The name, checked without an import.

    Raises:
        ValueError: if it is neither known nor dotted.
    """
    if name in SAMPLERS or ("." in name and all(part.isidentifier() for part in name.split("."))):
        return name
    raise ValueError(
        f"Expected a known `sampler` or a dotted name such as optuna.samplers.QMCSampler, got {name!r}."
        f"{nearest(name, SAMPLERS)}"
    )


def build_sampler(
    name: str, options: Mapping[str, Any], seed: int, parameters: Sequence[IntParameter]
) -> Any:
    """Sampler that proposes as many of the parameters jointly as it can.

    Optuna's samplers find the parameters common to all trials by a scan of the trials, from the first one if any is
    unfinished. Here the common parameters are known, and the sampler's search space is fixed to them, unless some are
    conditional and the sampler groups them by itself.

    Args:
        name: in `SAMPLERS`, or the dotted name of a subclass of ``optuna.samplers.BaseSampler``.
        options: keyword arguments of the class.
        seed: passed on if the class takes one.
        parameters: all parameters, conditional ones included.

    Raises:
        ValueError: if the sampler is unknown or does not take the options.
    """
    from optuna.exceptions import ExperimentalWarning

    found, row = _load(name), row_of(name)
    _check_options(name, found, options)
    given = {**row.defaults, **options}
    if "seed" in inspect.signature(found).parameters:
        given["seed"] = seed
    if row.conditional is not None and any(p.when for p in parameters):
        given |= row.conditional
    else:
        found = _with_search_space(found, row, parameters)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            return found(**given)
    except (TypeError, ValueError, ImportError) as error:
        raise ValueError(
            f"Expected `options` that the sampler {name} takes, got {dict(options)}: {error}"
        ) from error


def _with_search_space(sampler: type, row: SamplerRow, parameters: Sequence[IntParameter]) -> type:
    """Subclass that proposes the unconditional parameters with at least two values jointly in every trial."""
    always = [p for p in parameters if not p.when and (row.categorical or not p.categorical)]
    space = {p.name: d for p in always if not (d := distribution_of(p)).single()}
    return type(
        sampler.__name__, (sampler,), {"infer_relative_search_space": lambda self, study, trial: dict(space)}
    )


def _load(name: str) -> type:
    from optuna.samplers import BaseSampler

    module, _, attribute = row_of(name).path.rpartition(".")
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"Expected `sampler` to be the dotted name of a class that can be imported, got {name!r}: {error}. "
            f"Install its package, or put its folder on PYTHONPATH."
        ) from error
    if not (isinstance(found, type) and issubclass(found, BaseSampler)):
        raise ValueError(
            f"Expected `sampler` to name a subclass of optuna.samplers.BaseSampler, got {name!r}."
        )
    return found


def _check_options(name: str, found: type, options: Mapping[str, Any]) -> None:
    parameters = inspect.signature(found).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    known = {p.name for p in parameters} - RESERVED
    for key in options:
        if key not in known:
            hint = nearest(key, known) if known else " It has none."
            raise ValueError(f"Expected known `options` of the sampler {name}, got {key!r}.{hint}")


def distribution_of(parameter: IntParameter) -> BaseDistribution:
    """Distribution of a parameter in Optuna; the choices of a categorical one are its numbers."""
    from optuna.distributions import CategoricalDistribution, IntDistribution

    if parameter.categorical:
        return CategoricalDistribution(range(parameter.low, parameter.high + 1))
    return IntDistribution(parameter.low, parameter.high)
