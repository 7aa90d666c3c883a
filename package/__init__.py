"""Searches for the best way to prune a language model.

``secateur.search(...)`` starts or continues a search, ``secateur.open_run(DIR)`` opens its results; `plan`,
`prune`, `evaluate`, `latency`, `recover`, `bench` and `push` work as the commands of these names, with their words as
keyword arguments. `register_metric` adds a metric of your own. All of it is loaded at first use: this package alone
loads no torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from secateur.api import Found as Found
    from secateur.api import Plan as Plan
    from secateur.api import Run as Run
    from secateur.api import bench as bench
    from secateur.api import evaluate as evaluate
    from secateur.api import latency as latency
    from secateur.api import open_run as open_run
    from secateur.api import plan as plan
    from secateur.api import prune as prune
    from secateur.api import push as push
    from secateur.api import recover as recover
    from secateur.api import register_metric as register_metric

__all__ = [  # given by __getattr__
    "Found",
    "Plan",
    "Run",
    "__version__",
    "bench",
    "evaluate",
    "latency",
    "open_run",
    "plan",
    "prune",
    "push",
    "recover",
    "register_metric",
    "search",
]


class _SearchRoom(ModuleType):
    """The room ``secateur.search``, which is a function, too: `secateur.api.search`."""

    def __call__(self, *args: Any, **settings: Any) -> Any:
        return import_module("secateur.api").search(*args, **settings)

    @property
    def __signature__(self) -> Any:
        import inspect

        return inspect.signature(import_module("secateur.api").search)


import_module("secateur.search")  # the folder's docstring alone
sys.modules["secateur.search"].__class__ = _SearchRoom


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("secateur")
    if name in __all__:
        return getattr(import_module("secateur.api"), name)
    raise AttributeError(f"module 'secateur' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
