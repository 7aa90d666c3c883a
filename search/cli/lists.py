"""Commands ``list`` and ``doctor``: names for settings, and checks of this machine."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from secateur.search.cli.option_groups import Json
from secateur.search.errors import UsageError
from secateur.search.show.console import FAILED, complain, show, show_facts, show_json
from secateur.spaces.names import nearest
from secateur.spaces.plugins import left_out

LISTED = (
    "spaces",
    "controllers",
    "evaluators",
    "methods",
    "metrics",
    "recipes",
    "families",
    "formats",
    "executors",
)


def list_(
    what: Annotated[str, typer.Argument(help=f"One of: {', '.join(LISTED)}.")],
    json: Json = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="As a table in Markdown.")] = False,
) -> None:
    """List the names that settings and commands accept."""
    from secateur.search.show import listing

    if what not in LISTED:
        raise UsageError(f"Expected something to list, got {what!r}.{nearest(what, LISTED)}")
    ours = {"methods": _methods, "metrics": _metrics, "families": _families, "formats": _formats}
    rows = {**listing.LISTS, **ours}[what]()
    if json:
        show_json(rows)
    else:
        for line in listing.markdown(rows) if markdown else listing.lines(rows):
            show(line)
    for line in left_out():
        complain(line, "warning")


def doctor(json: Json = False) -> None:
    """Check this machine: packages, extras, disk, the embedded model."""
    from secateur.pruners.models.checkpoints.cache import cache_root
    from secateur.pruners.models.loading import find_checkpoint
    from secateur.search.cli.doctor import examine

    checks = examine(cache_root(), _torch_facts, lambda: find_checkpoint("tiny").location)
    if json:
        show_json([asdict(check) for check in checks])
    else:
        marks = {True: "ok", None: "-", False: "BAD"}
        show_facts({check.name: f"{marks[check.ok]:4} {check.found}" for check in checks})
    if any(check.ok is False for check in checks):
        raise typer.Exit(FAILED)


def _methods() -> list[dict[str, str]]:
    from secateur.search.app.methods import method_rows

    return method_rows()


def _metrics() -> list[dict[str, str]]:
    from secateur.search.show.listing import row
    from secateur.spaces.formulas.operators import OPERATORS, TERMINALS
    from secateur.spaces.methods import METRICS, RECONSTRUCTIONS

    known = [
        row(x.name, x.summary, x.paper, x.origin) for x in [*METRICS.values(), *RECONSTRUCTIONS.values()]
    ]
    signs = [operator.infix or name for name, operator in OPERATORS.items()]
    formulas = row(
        "formula: ...", f"such as abs(W) * X; of {' '.join(TERMINALS)}, numbers, {' '.join(signs)}"
    )
    return [*known, formulas]


def _formats() -> list[dict[str, str]]:
    from secateur.pruners.export.registry import FORMATS
    from secateur.search.show.listing import row

    carries = {name: ", ".join(x.families) if x.families else "all families" for name, x in FORMATS.items()}
    return [row(name, f"{x.summary} ({carries[name]})", x.source, x.origin) for name, x in FORMATS.items()]


def _families() -> list[dict[str, str]]:
    from secateur.pruners.models.discover import FAMILIES
    from secateur.search.show.listing import row

    return [row(name, "tested; others that are built alike work too") for name in FAMILIES]


def _torch_facts() -> str:
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{torch.get_num_threads()} threads, CUDA: {', '.join(gpus) or 'none'}"
