"""Transfer of this code to nodes without it or with another version."""

from __future__ import annotations

import importlib
import importlib.util
import shutil
from collections.abc import Callable, Iterator
from importlib.metadata import Distribution
from pathlib import Path
from typing import Any

from secateur.search.errors import UsageError
from secateur.search.executors.cluster.lazy_ray import load_ray
from secateur.spaces.plugins import GROUPS, points

ROOMS = ("search", "spaces", "pruners", "evaluators", "api")


def missing_code(directory: Path) -> list[str]:
    """Paths of the code to send to Ray's workers, plug-ins' included; none if every node already has it.

    Args:
        directory: for a copy of the code.

    Returns:
        For ``py_modules`` of Ray's runtime environment.

    Raises:
        UsageError: if a node lacks a library that the code needs.
    """
    ray, look = load_ray(), code_here()
    _, here = look()
    others = {
        node["NodeID"]: node.get("NodeManagerHostname", node["NodeManagerAddress"])
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] != ray.get_runtime_context().get_node_id()
    }
    found = dict(zip(others, ray.get([_probe(node, look) for node in others]), strict=True))
    for node, (missing, _) in found.items():
        if missing:
            raise UsageError(
                f"Expected {', '.join(missing)} on every node of the cluster, found none on {others[node]}. Install "
                f"the versions of constraints.txt there; Secateur itself and its plug-ins are sent along."
            )
    if all(digest == here for _, digest in found.values()):
        return []
    package = directory / "secateur"
    top = importlib.import_module("secateur").__file__
    if top is not None:  # else that of another version there would be found first
        package.mkdir(parents=True, exist_ok=True)
        _copy(Path(top), package / "__init__.py")
    for room in ROOMS:
        _copy(Path(importlib.import_module(f"secateur.{room}").__path__[0]), package / room)
    return [str(package), *copied_plugins(directory)]


def copied_plugins(directory: Path) -> list[str]:
    """Copies of the packages that add parts: the module of each entry point, and the distribution's metadata.

    Raises:
        UsageError: if a package is of another form than files in a directory.
    """
    found: dict[str, None] = {}
    for module, distribution in _plugins():
        spec = importlib.util.find_spec(module)
        places = list((spec and spec.submodule_search_locations) or [(spec and spec.origin) or ""])
        places += [str(place) for place in _metadata(distribution)]
        for place in map(Path, places):
            if not place.name or not place.exists():
                raise UsageError(
                    f"Expected the plug-in {distribution.name} as files in a directory, to send it to the cluster, got "
                    f"{place}. Install {distribution.name} {distribution.version} on every node."
                )
            copy = directory / place.name
            _copy(place, copy)
            found[str(copy)] = None
    return list(found)


def _plugins() -> Iterator[tuple[str, Distribution]]:
    """Top-level module and distribution of each entry point that can be imported."""
    for group in GROUPS:
        for point in points(group):
            module = point.module.partition(".")[0]
            if point.dist is not None and importlib.util.find_spec(module) is not None:
                yield module, point.dist


def _metadata(distribution: Distribution) -> list[Path]:
    site = Path(str(distribution.locate_file("")))
    name = distribution.name.lower().replace("-", "_")
    return [
        path for path in site.glob("*-info") if path.name.lower().replace("-", "_").startswith(f"{name}_")
    ]


def _copy(place: Path, copy: Path) -> None:
    if place.is_dir():
        shutil.copytree(place, copy, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
    else:
        shutil.copy(place, copy)


def code_here() -> Callable[[], tuple[list[str], str]]:
    """A function that finds the libraries that a node lacks, and the digest of its code and plug-ins."""
    plugins = sorted({(module, distribution.name) for module, distribution in _plugins()})
    names = [*(f"secateur.{room}" for room in ROOMS), *(module for module, _ in plugins)]
    distributions = [name for _, name in plugins]

    def look() -> tuple[list[str], str]:  # pickled by value: the node may lack this module
        import hashlib
        import importlib.metadata
        import importlib.util
        import pathlib

        needed = ("torch", "transformers", "safetensors", "numpy", "scipy", "pydantic", "optuna")
        missing = [name for name in needed if importlib.util.find_spec(name) is None]
        total = hashlib.sha256()
        for name in names:
            try:
                spec = importlib.util.find_spec(name)
            except ModuleNotFoundError:
                spec = None
            if spec is None:
                return missing, ""
            places = [pathlib.Path(place) for place in spec.submodule_search_locations or [spec.origin or ""]]
            for path in sorted(places[0].rglob("*.py") if places[0].is_dir() else places):
                total.update(path.relative_to(places[0]).as_posix().encode() + path.read_bytes())
        for name in distributions:
            try:
                total.update(importlib.metadata.version(name).encode())
            except importlib.metadata.PackageNotFoundError:
                return missing, ""
        return missing, total.hexdigest()

    return look


def _probe(node: str, look: Callable[[], tuple[list[str], str]]) -> Any:
    """A running task on a node: what `look` gives there."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    where = NodeAffinitySchedulingStrategy(node, soft=False)
    return load_ray().remote(num_cpus=0, scheduling_strategy=where)(look).remote()
