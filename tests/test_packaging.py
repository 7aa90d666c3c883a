"""What an installation promises: names, package data, and rooms that load without torch."""

import json
import os
import subprocess
import sys
import tomllib
from glob import glob
from graphlib import CycleError, TopologicalSorter
from importlib import import_module
from importlib.metadata import entry_points, version
from importlib.resources import files
from pathlib import Path
from pkgutil import walk_packages

import pytest

ROOMS = ("search", "spaces", "pruners", "evaluators", "api")
ROOT = Path(__file__).parents[1]


def modules_of(room: str) -> list[str]:
    package = import_module(f"secateur.{room}")
    return [package.__name__, *(m.name for m in walk_packages(package.__path__, f"{package.__name__}."))]


def test_version_is_that_of_the_distribution():
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    assert version("secateur") == pyproject["project"]["version"] == "0.2.0"


def test_the_command_line_is_a_console_script():
    (script,) = entry_points(group="console_scripts", name="secateur")
    assert script.value == "secateur.search.cli:main"
    assert callable(script.load())


@pytest.mark.parametrize("room", ROOMS)
def test_every_file_of_a_room_is_installed(room):
    in_the_repository = {
        ".".join(["secateur", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__")
        for path in (ROOT / room).rglob("*.py")
        if path.name != "__main__.py"
    }
    assert set(modules_of(room)) >= in_the_repository  # a folder without __init__.py would be left out


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_is_typed(room):
    assert files(f"secateur.{room}").joinpath("py.typed").is_file()


@pytest.mark.parametrize("room", ROOMS)
def test_every_data_file_of_a_room_is_packaged(room):
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    patterns = setup["*"] + setup.get(f"secateur.{room}", [])
    # Path.glob finds no files under `**`, as setuptools does.
    packaged = {path for pattern in patterns for path in glob(str(ROOT / room / pattern), recursive=True)}  # noqa: PTH207
    there = {
        str(path)
        for path in (ROOT / room).rglob("*")
        if path.is_file() and path.suffix != ".py" and "__pycache__" not in path.parts
    }
    assert there <= packaged


def test_no_files_import_each_other_in_a_circle(tmp_path):
    """Imports inside functions and for types alone count, too."""
    pytest.importorskip("grimp")
    for room in ROOMS:  # grimp takes rooms as root packages only where `secateur` above them is none
        (tmp_path / "secateur").mkdir(exist_ok=True)
        (tmp_path / "secateur" / room).symlink_to(ROOT / room)
    code = (
        f"import grimp, json; graph = grimp.build_graph(*{[f'secateur.{room}' for room in ROOMS]}, cache_dir=None)\n"
        "found = {m: sorted(graph.find_modules_directly_imported_by(m)) for m in sorted(graph.modules)}\n"
        "print(json.dumps(found))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    imports = json.loads(run.stdout)
    assert len(imports) > 300
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        circle = " imports ".join(reversed(error.args[1]))
        pytest.fail(f"Expected no circle of files, got: {circle}.")


def test_search_and_spaces_do_not_load_torch():
    """Import-linter sees what we import; this also sees what third parties import for us."""
    names = [name for room in ("search", "spaces") for name in modules_of(room)]
    names = [name for name in names if not name.startswith(("secateur.search.app", "secateur.search.cli"))]
    code = (
        "import sys, importlib\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        "print(*sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == []
