"""Transfer of this code to nodes without it or with another version."""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
from pathlib import Path
from typing import Any

from secateur.search.errors import UsageError
from secateur.search.executors.cluster.lazy_ray import load_ray

ROOMS = ("search", "spaces", "pruners", "evaluators")


def missing_code(directory: Path) -> list[str]:
    """Paths of the code to send to Ray's workers; none if every node already has it.

    Args:
        directory: for a copy of the code.

    Returns:
        For ``py_modules`` of Ray's runtime environment.

    Raises:
        UsageError: if a node lacks a library that the code needs.
    """
    ray = load_ray()

    here = _digest()
    others = {
        node["NodeID"]: node.get("NodeManagerHostname", node["NodeManagerAddress"])
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] != ray.get_runtime_context().get_node_id()
    }
    found = dict(zip(others, ray.get([_probe(node) for node in others]), strict=True))
    for node, (missing, _) in found.items():
        if missing:
            raise UsageError(
                f"Expected {', '.join(missing)} on every node of the cluster, found none on {others[node]}. Install "
                f"the versions of constraints.txt there; Secateur itself is sent along."
            )
    if all(digest == here for _, digest in found.values()):
        return []
    package = directory / "secateur"
    for room in ROOMS:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(_place(room), package / room, ignore=ignored, dirs_exist_ok=True)
    return [str(package)]


def _place(room: str) -> Path:
    spec = importlib.util.find_spec(f"secateur.{room}")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(next(iter(spec.submodule_search_locations)))


def _digest() -> str:
    """SHA-256 over the code, independent of its location."""
    total = hashlib.sha256()
    for room in ROOMS:
        root = _place(room)
        for path in sorted(root.rglob("*.py")):
            total.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return total.hexdigest()


def _probe(node: str) -> Any:
    """A running task on a node: (libraries that it lacks, digest of its code or "")."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ray = load_ray()

    rooms = ROOMS

    def look() -> tuple[list[str], str]:  # pickled by value: the node may lack this module
        import hashlib
        import importlib.util
        import pathlib

        needed = ("torch", "transformers", "safetensors", "numpy", "scipy", "pydantic", "optuna")
        missing = [name for name in needed if importlib.util.find_spec(name) is None]
        total = hashlib.sha256()
        for room in rooms:
            try:
                spec = importlib.util.find_spec(f"secateur.{room}")
            except ModuleNotFoundError:
                spec = None
            if spec is None or not spec.submodule_search_locations:
                return missing, ""
            root = pathlib.Path(next(iter(spec.submodule_search_locations)))
            for path in sorted(root.rglob("*.py")):
                total.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
        return missing, total.hexdigest()

    where = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=where)(look).remote()
