"""The way in from Python: commands as functions, runs with tables and pictures. ``import secateur`` gives the same."""

from secateur.api.boards import bench
from secateur.api.commands import evaluate, latency, prune, push, recover, search
from secateur.api.plans import Plan, plan
from secateur.api.runs import Found, Run, open_run
from secateur.spaces.own_metrics import register_metric

__all__ = [
    "Found",
    "Plan",
    "Run",
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
