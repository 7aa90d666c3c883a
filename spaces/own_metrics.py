"""Metrics of one's own, registered in Python without a package."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from secateur.spaces.method import Comparison, Gradients, MethodRow, Needs
from secateur.spaces.methods import METRICS, RECONSTRUCTIONS, REGISTERED

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class HeldMethod(MethodRow):
    """A method whose function can't be imported elsewhere, as of a notebook; sent to workers by value."""

    held: Any = None

    @property
    def function(self) -> Any:
        return self.held


def register_metric(
    function: F | None = None,
    *,
    name: str | None = None,
    needs: Needs = "moments",
    gradients: tuple[Gradients, ...] = (),
    comparison: Comparison = "output",
    summary: str = "of your own",
    paper: str = "",
) -> Any:
    """Register a metric of weights, so that settings, recipes and commands of this process know its name.

    At the top of a module it is registered wherever the module is imported, and ``package.module:function`` in settings
    imports it: in other processes, on the command line and in workers. A run records that path. A function of a
    notebook has none: it is sent to workers, and exists in this process alone.

    Args:
        function: ``(weight, inputs, generator)`` to a score a weight, ``out in``, higher = keep; see
            ``CONTRIBUTING.md``. Left out where this is a decorator.
        name: for settings; None: that of the function.
        needs: calibration statistics in `inputs`: ``nothing``, ``moments`` or ``gram``.
        gradients: kinds of gradients, given by the keyword ``gradients``.
        comparison: who competes with whom unless settings say otherwise: weights of an ``output`` or of a ``layer``.
        summary: one line for ``secateur list metrics``.
        paper: address.

    Returns:
        The function.

    Raises:
        ValueError: if the name is taken by another metric, or none for settings.
    """
    if function is None:
        return lambda found: register_metric(
            found,
            name=name,
            needs=needs,
            gradients=gradients,
            comparison=comparison,
            summary=summary,
            paper=paper,
        )
    name = name or function.__name__
    path = _path_of(function)
    known = REGISTERED.get(name)
    if ":" in name or not name.strip() or (name in [*METRICS, *RECONSTRUCTIONS] and known is None):
        raise ValueError(f"Expected a new name of a metric, without a colon, got {name!r}. Name another.")
    if known is not None and known.path != path:
        raise ValueError(f"Expected a new name of a metric, got {name!r}, that of {known.path or 'another'}.")
    facts = (summary, paper, needs, gradients)
    more: dict[str, Any] = {"comparison": comparison}
    if path:
        REGISTERED[name] = MethodRow(name, "metric", "weights", path, *facts, **more)
        REGISTERED[path] = MethodRow(path, "metric", "weights", path, *facts, **more)
    else:
        REGISTERED[name] = HeldMethod(name, "metric", "weights", "", *facts, **more, held=function)
    return function


def held_methods() -> tuple[HeldMethod, ...]:
    """Registered methods that other processes can't import."""
    return tuple(row for row in REGISTERED.values() if isinstance(row, HeldMethod))


def hold(rows: tuple[HeldMethod, ...]) -> None:
    """Register methods that another process has sent."""
    REGISTERED.update({row.name: row for row in rows})


def _path_of(function: Callable[..., Any]) -> str:
    """Path that other processes find the function at; "" if there is none."""
    module, name = function.__module__, function.__qualname__
    if module == "__main__" or "<" in name or module not in sys.modules:
        return ""
    return f"{module}:{name}"
