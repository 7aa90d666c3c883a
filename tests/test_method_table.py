"""The table of methods: every row leads to a function of its kind, and what is written about it is true."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from secateur.pruners.calibration.gradient_kinds import KINDS
from secateur.pruners.calibration.pass_kinds import CONTRAST_KINDS, PASS_KINDS
from secateur.pruners.formulas.terminals import needs
from secateur.pruners.recipes.allocation.threshold import NORMALISATIONS
from secateur.search.app.methods import method_rows
from secateur.search.cli.lists import as_markdown
from secateur.spaces.method import CONTRASTS, SIGNATURES, Gradients, MethodRow
from secateur.spaces.method_table import METHODS, TABLE
from secateur.spaces.methods import RULES
from secateur.spaces.plugins import resolve

ROOT = Path(__file__).parent.parent
IDS = [f"{row.kind} {row.name}" for row in TABLE]


def parameters(kind: str) -> list[str]:
    inside = re.match(r"\((.*?)\)", SIGNATURES[kind])
    return [name for name in inside[1].split(", ") if name not in ("*", "its parameters")]


@pytest.mark.parametrize("row", TABLE, ids=IDS)
def test_every_function_is_of_its_kind(row):
    if not callable(row.function):
        inputs, gradients = needs(row.function)
        assert row.stage == "metric"
        assert (row.needs, row.gradients) == (inputs, gradients)
        return
    takes = inspect.signature(row.function).parameters
    wanted = [*parameters(row.kind), *(parameter.name for parameter in row.parameters)]
    optional = [name for name in takes if takes[name].default is not inspect.Parameter.empty]
    assert [name for name in takes if name in wanted or name not in optional] == wanted
    assert (row.function.__doc__ or "").strip()
    if row.check_path:
        assert callable(row.check)
        if row.kind == "reconstruction of structure, the model at once":
            names = [*inspect.signature(row.check).parameters]
            assert names == ["anatomy", *(parameter.name for parameter in row.parameters)]


@pytest.mark.parametrize("row", TABLE, ids=IDS)
def test_every_row_is_whole(row):
    assert row.kind in SIGNATURES
    assert row.summary
    assert row.paper.startswith("https://") or row.name in ("none", "random")
    assert not row.origin
    assert (row.gives == "nothing") == (row.stage != "repair" or row.name == "none")
    with_parameters = ("allocation", "reconstruction of structure, the model at once")
    assert row.kind in with_parameters or not row.parameters
    for parameter in row.parameters:
        parameter.check(parameter.default, row.name)


def test_names_are_alone_in_their_stage_and_unit():
    assert len(METHODS) == sum(len(row.units) for row in TABLE)
    assert METHODS.problems == ()
    names = [parameter.name for row in RULES.values() for parameter in row.parameters]
    assert len(set(names)) == len(names)


def test_the_table_says_what_the_pruners_have():
    assert {*get_args(Gradients)} == {*KINDS, *PASS_KINDS, *CONTRAST_KINDS}
    assert {*CONTRAST_KINDS} == CONTRASTS
    assert RULES["global"].parameters[0].options == tuple(NORMALISATIONS)


def test_paths_that_lead_nowhere_are_refused():
    with pytest.raises(ValueError, match="Expected a path `module:name`, got 'json'"):
        resolve("json")
    with pytest.raises(ValueError, match="Expected `nothing` in the module json, got none"):
        MethodRow("x", "metric", "weights", "json:nothing", "").function  # noqa: B018


def test_the_table_loads_no_torch():
    code = "import sys; from secateur.spaces.methods import METHODS; assert len(METHODS) and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_page_of_methods_is_the_list():
    """Written by ``secateur list methods --markdown``, below its heading."""
    page = (ROOT / "docs" / "reference" / "methods.md").read_text("utf-8")
    assert page[page.index("| name") :].splitlines() == as_markdown(method_rows())


def test_contributing_names_every_kind():
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    for kind, signature in SIGNATURES.items():
        assert f"| {kind} | `{signature.partition(' -> ')[0]}` | {signature.partition(' -> ')[2]} |" in text


def test_contributing_names_files_that_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    named = set(re.findall(r"`((?:spaces|search|pruners|evaluators|docs|examples|scripts)/[\w/.-]*)`", text))
    assert len(named) > 12
    assert [path for path in named if not (ROOT / path).exists()] == []
