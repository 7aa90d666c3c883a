"""Third-party packages: one part of each kind, each one file and one row, without a line of ours changed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

from secateur.search.executors.cluster.code import code_here, copied_plugins
from secateur.search.study.study import Study

ROOT = Path(__file__).parent.parent

METHODS = {
    "metric": """
        def function(weight, inputs, generator):
            return weight.abs().float() * inputs.norm.sqrt()

        row = MethodRow("extra_metric", "metric", "weights", HERE, "one", needs="moments", comparison="output")
        """,
    "reconstruction": """
        def function(layer, sparsities):
            import torch
            from secateur.pruners.masks import mask
            return torch.stack([layer.weight * mask(layer.weight.abs().float(), x) for x in sparsities])

        row = MethodRow("extra_reconstruction", "reconstruction", "weights", HERE, "one", needs="moments")
        """,
    "importance": """
        def function(evidence):
            return evidence.by_unit(evidence.weight.abs().sum(0)).amax(1)

        row = MethodRow("extra_importance", "importance", "structure", HERE, "one")
        """,
    "cut_repair": """
        def function(inputs, counts):
            return [inputs.weight[:, n:].double() @ inputs.mean[n:].double() / 2 for n in counts]

        row = MethodRow("extra_repair", "repair", "structure", HERE, "one", needs="moments", gives="bias")
        """,
    "mask_repair": """
        def function(masked):
            from secateur.pruners.weights.mask_repairs import Repaired
            return Repaired(masked.weight * masked.kept * 1.01)

        row = MethodRow("extra_repair", "repair", "weights", HERE, "one", gives="weight")
        """,
    "depth_repair": """
        def function(anatomy, runs, tokens, fitting):
            from secateur.pruners.depth.merge_targets import block_tensors
            return {run.target: block_tensors(anatomy.blocks[run.target]) for run in runs}

        row = MethodRow("extra_repair", "repair", "blocks", HERE, "one", gives="weight")
        """,
    "allocation": """
        def function(layers, evidence, sparsity, *, steepness):
            from secateur.pruners.recipes.allocation.filling import to_budget
            return to_budget(layers, [1 + steepness * layer.block for layer in layers], sparsity)

        PARAMETERS = (Parameter("steepness", 0.5, (0.0, 0.5)),)
        row = MethodRow("extra_rule", "allocation", ("weights", "structure"), HERE, "one", parameters=PARAMETERS)
        """,
    "depth": """
        def function(anatomy, tokens, whole):
            return tuple(float(block.index % 2) for block in anatomy.blocks)

        row = MethodRow("extra_depth", "depth", "blocks", HERE, "one")
        """,
}

OTHERS = {
    "secateur.spaces": (
        "extra_space",
        """
        from typing import Literal
        from secateur.spaces.allocation.settings import AllocationSettings, build_allocation
        from secateur.spaces.registry import SpaceRow

        class Settings(AllocationSettings):
            kind: Literal["extra_space"] = "extra_space"

        PRUNER = "secateur.pruners.weights.pruner:AllocationPruner"
        row = SpaceRow(settings=Settings, build=build_allocation, pruner=PRUNER, summary="levels", source="")
        """,
    ),
    "secateur.controllers": (
        "extra_controller",
        """
        from typing import Literal
        from secateur.search.controllers.random import Random, RandomSettings
        from secateur.search.controllers.registry import ControllerRow

        class Settings(RandomSettings):
            kind: Literal["extra_controller"] = "extra_controller"

        def row():
            return ControllerRow(settings=Settings, build=Random, summary="at random", source="")
        """,
    ),
    "secateur.executors": (
        "extra_executor",
        """
        from contextlib import nullcontext
        from typing import Literal
        from secateur.search.executors.local import LocalExecutor, LocalSettings
        from secateur.search.executors.registry import ExecutorRow

        class Settings(LocalSettings):
            kind: Literal["extra_executor"] = "extra_executor"

        row = ExecutorRow(
            settings=Settings,
            build=LocalExecutor,
            reached=lambda settings, payload: nullcontext(),
            summary="here",
            in_process=True,
        )
        """,
    ),
    "secateur.formats": (
        "extra_format",
        """
        from secateur.pruners.export.registry import FormatRow
        row = FormatRow("nothing at all", None, lambda cut, tokenizer: None, lambda job, directory, scratch: None)
        """,
    ),
}

BROKEN = {
    "secateur.methods": {
        "no_module": "missing_module:row",
        "no_row": "extra.wrong:NUMBER",
        "taken": "extra.wrong:TAKEN",
        "same_parameter": "extra.wrong:PARAMETER",
        "ends": "extra.ends:row",
    },
    "secateur.controllers": {
        "random": "extra.extra_controller:row",
        "wrong_class": "extra.extra_executor:row",
    },
}


WRONG = """
    from secateur.spaces.method import MethodRow, Parameter

    NUMBER = 3
    TAKEN = MethodRow("wanda", "metric", "weights", "extra.metric:function", "one")
    GAMMA = (Parameter("gamma", 0.5, (0.0, 0.5)),)
    PARAMETER = MethodRow("extra_gamma", "allocation", "weights", "x:y", "one", parameters=GAMMA)
    """


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder of packages as pip leaves it: modules, and metadata with entry points."""
    site = tmp_path_factory.mktemp("site")
    package = site / "extra"
    package.mkdir()
    (package / "__init__.py").touch()
    points = {"secateur.methods": {name: f"extra.{name}:row" for name in METHODS}}
    for name, source in METHODS.items():
        imports = "from secateur.spaces.methods import MethodRow, Parameter"
        text = f'{imports}\n\nHERE = "extra.{name}:function"\n{dedent(source)}'
        (package / f"{name}.py").write_text(text)
    for group, (name, source) in OTHERS.items():
        (package / f"{name}.py").write_text(dedent(source))
        points[group] = {name: f"extra.{name}:row"}
    (package / "wrong.py").write_text(dedent(WRONG))
    (package / "ends.py").write_text("raise SystemExit(3)")
    for group, broken in BROKEN.items():
        points[group] |= broken
    metadata = site / "extra_parts-0.3.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: extra-parts\nVersion: 0.3\n")
    sections = (
        f"[{group}]\n" + "".join(f"{name} = {path}\n" for name, path in named.items())
        for group, named in points.items()
    )
    (metadata / "entry_points.txt").write_text("\n".join(sections))
    return site


COMMANDS = """
    import contextlib, io, json, subprocess, sys
    from pathlib import Path
    from secateur.search.cli import main

    def reload_here(command, env, **_):  # test_export and test_formats reload in a fresh process
        from secateur.pruners.export import reload
        from transformers import dynamic_module_utils
        dynamic_module_utils.HF_MODULES_CACHE = env["HF_MODULES_CACHE"]
        reload.main(Path(command[-2]), Path(command[-1]))
        return subprocess.CompletedProcess(command, 0, "", "")

    for arguments in json.loads(sys.argv[1]):
        if arguments[0] == "prune":
            from secateur.pruners.export import export_check
            export_check.subprocess.run = reload_here
        sys.argv = ["secateur", *arguments]
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main()
                code = 0
            except SystemExit as ending:
                code = ending.code
        print(json.dumps([code, out.getvalue(), err.getvalue()]))
    """


def beside(site: Path | str, *command: str) -> str:
    """Output of a Python process with the folder's packages installed."""
    path = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, *command], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def secateur(site: Path | str, *commands: list[str]) -> list[tuple[int, str, str]]:
    """Status, stdout and stderr of commands of one process."""
    return [
        json.loads(line) for line in beside(site, "-c", dedent(COMMANDS), json.dumps(commands)).splitlines()
    ]


LISTED = ("methods", "metrics", "spaces", "controllers", "executors", "formats")

RECIPES = [
    ("weights", "extra_metric", "extra_rule", "extra_repair"),
    ("weights", "extra_reconstruction", "extra_rule", "none"),
    ("structure", "extra_importance", "extra_rule", "extra_repair"),
    ("blocks", "extra_depth", None, "extra_repair"),
]

CHANGES = {
    "space.kind": "extra_space",
    "space.metric": "extra_metric",
    "controller.kind": "extra_controller",
    "executor.kind": "extra_executor",
    "budget.evaluations": 6,
    "evaluator.window": 64,
    "evaluator.calibration_tokens": 512,
    "evaluator.test_tokens": 128,
    "evaluator.fidelities": "[128]",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs") / "run"


@pytest.fixture(scope="module")
def ended(site, run) -> dict[str, tuple[int, str, str]]:
    """Exit statuses and output of commands beside the package, all in one process."""
    commands = {what: ["list", what, "--json"] for what in LISTED}
    for number, (unit, metric, rule, repair) in enumerate(RECIPES):
        recipe = {"unit": unit, "sparsity": 0.2, "metric": metric, "repair": repair}
        recipe["calibration"] = {"samples": 4, "length": 32}
        if rule is not None:
            recipe["allocation"] = {"rule": rule, "steepness": 0.5}
        file = run.with_name(f"{number}.yaml")
        file.write_text(json.dumps({"recipe": recipe, "sources": {"calibration": "docs"}}))
        commands[metric] = ["prune", "tiny", "--recipe", str(file), "--to", str(file.with_suffix(""))]
    options = [part for key, value in CHANGES.items() for part in ("-o", f"{key}={value}")]
    commands["search"] = ["search", *options, "--run", str(run)]
    commands["status"] = ["status", str(run)]
    commands["unknown"] = ["search", "-o", "space.metric=no_row", "--run", str(run.with_name("other"))]
    return dict(zip(commands, secateur(site, *commands.values()), strict=True))


@pytest.mark.parametrize("what", LISTED)
def test_each_is_listed_with_its_origin(ended, what):
    code, out, _ = ended[what]
    assert code == 0
    rows = {row["name"]: row["origin"] for row in json.loads(out)}
    extra = {name for name, origin in rows.items() if origin == "extra-parts 0.3"}
    of_weights = {"extra_metric", "extra_reconstruction"}
    wanted = {
        "methods": of_weights | {"extra_importance", "extra_repair", "extra_rule", "extra_depth"},
        "metrics": of_weights,
    }
    assert extra == wanted.get(what, {f"extra_{what.removesuffix('s')}"})
    assert "" in rows.values()


def test_what_is_broken_is_named_in_a_line_and_breaks_nothing(ended):
    lines = ended["controllers"][2].splitlines()
    said = {line.partition("'")[2].partition("'")[0]: line for line in lines}
    assert {*said} == {*BROKEN["secateur.methods"], *BROKEN["secateur.controllers"]}
    assert all("[at extra-parts 0.3]" in line for line in lines)
    assert "No module named 'missing_module'" in said["no_module"]
    assert "Expected `extra.wrong:NUMBER` to be a MethodRow or to return one, got int" in said["no_row"]
    assert "Expected a new name, got 'metric/weights/wanda'" in said["taken"]
    assert "got 'gamma', which the rule nirvana has" in said["same_parameter"]
    assert "SystemExit: 3" in said["ends"]
    assert "Expected a new name, got 'random'" in said["random"]
    assert "to be a ControllerRow or to return one, got ExecutorRow" in said["wrong_class"]


@pytest.mark.parametrize("metric", [metric for _, metric, _, _ in RECIPES])
def test_each_method_prunes_as_a_part_of_a_recipe(ended, metric):
    code, _, err = ended[metric]
    assert code == 0, err


def test_settings_accept_each_and_defaults_stay_ours(site):
    code = """
        from secateur.search.settings.settings import settings_from
        one = settings_from({"space": {"kind": "extra_space"}, "controller": {"kind": "extra_controller"}})
        assert type(one.space).__module__ == "extra.extra_space"
        space = {"kind": "architecture", "importance": "extra_importance", "repair": "extra_repair"}
        space |= {"baselines": ["extra_depth"], "target_format": "extra_format"}
        settings_from({"space": space, "executor": {"kind": "extra_executor"}})
        free = settings_from({"space": {"kind": "recipe", "unit": "weights"}}).space
        assert not any("extra" in x for x in free.metric_options + free.allocation_options + free.repair_options)
        """
    beside(site, "-c", dedent(code))


def test_a_search_uses_them_and_its_record_names_the_package(ended, run):
    for command in ("search", "status"):
        assert ended[command][0] == 0, ended[command][2]
    assert Study.open(run).about.facts["versions"]["extra-parts"] == "0.3"


def test_a_name_that_is_unknown_because_its_package_is_broken(ended):
    code, _, err = ended["unknown"]
    assert code == 2
    assert "Expected a known `metric`, got 'no_row'" in err
    assert "Left out 'no_row' of secateur.methods [at extra-parts 0.3]" in err


def test_nodes_of_a_cluster_can_be_sent_them(site, tmp_path, monkeypatch):
    """As Ray unpacks them: each in a folder of its own, all of which are on the path."""
    with monkeypatch.context() as patch:
        patch.syspath_prepend(site)
        copies, look = copied_plugins(tmp_path), code_here()
        assert look()[1]
    assert look() == ([], ""), "a node that lacks the package"
    assert {Path(copy).name for copy in copies} == {"extra", "extra_parts-0.3.dist-info"}
    folders = []
    for number, copy in enumerate(copies):
        folder = tmp_path / str(number)
        folder.mkdir()
        shutil.move(copy, folder)
        folders.append(str(folder))
    ((_, out, _),) = secateur(os.pathsep.join(folders), ["list", "controllers"])
    assert "extra_controller  extra-parts 0.3" in out


def test_the_example_package_is_installed_and_used(tmp_path):
    source, target = tmp_path / "source", tmp_path / "site"
    made = shutil.ignore_patterns("build", "*.egg-info", "__pycache__")  # by an installation from there
    shutil.copytree(ROOT / "examples" / "plugin", source, ignore=made)
    assert len(list(source.iterdir())) == 3
    pip = ["-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    beside(tmp_path, *pip, "--disable-pip-version-check", "--target", str(target), str(source))
    (tmp_path / "recipe.yaml").write_text(
        "recipe: {unit: weights, sparsity: 0.5, metric: deviation}\nsources: {calibration: docs}"
    )
    prune = ["prune", "tiny", "--recipe", str(tmp_path / "recipe.yaml"), "--to", str(tmp_path / "pruned")]
    listed, pruned = secateur(target, ["list", "metrics"], prune)
    assert "secateur-example 0.1" in listed[1]
    assert pruned[0] == 0, pruned[2]
