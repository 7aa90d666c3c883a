"""The way in from Python: one import, tables, pictures, and the words of the command line."""

import builtins
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest

from secateur import api
from secateur.api.commands import _merged, _with_metrics
from secateur.api.runs import Run
from secateur.search import app
from secateur.search.cli import COMMANDS
from secateur.search.errors import UsageError
from secateur.search.results.paired import against_baseline
from secateur.search.results.pick import parse_bounds
from secateur.spaces.methods import METRICS, REGISTERED
from tests.runs import make_run
from tests.test_packaging import ROOMS, ROOT

SMALL = {
    "space": {"target": 0.5, "step": 0.25, "metric": "magnitude"},
    "controller": {"kind": "uniform"},
    "evaluator": {"window": 128, "calibration_tokens": 256, "test_tokens": 256, "fidelities": [256]},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    return Run(make_run(tmp_path_factory.mktemp("api") / "run"))


# --- one import ---


@pytest.fixture
def top(tmp_path):
    """Runs code with the package as an installation has it."""
    place = tmp_path / "secateur"
    place.mkdir()
    for room in ROOMS:
        (place / room).symlink_to(ROOT / room)
    (place / "__init__.py").symlink_to(ROOT / "package" / "__init__.py")

    def call(code: str) -> str:
        env = {**os.environ, "PYTHONPATH": str(tmp_path)}
        words = [sys.executable, "-W", "error", "-c", code]
        done = subprocess.run(words, env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return call


def test_one_import_gives_all_names_and_no_torch(top):
    out = top(
        "import sys, secateur\n"
        "assert not {'torch', 'secateur.api', 'pydantic'} & set(sys.modules)\n"
        "from secateur.search.settings.settings import load_settings\n"  # the room, after which the function stays
        "for name in secateur.__all__:\n"
        "    assert getattr(secateur, name) is not None and name in dir(secateur), name\n"
        "print(callable(secateur.search), secateur.search.settings.settings.load_settings is load_settings)\n"
        "print(secateur.__version__, 'torch' in sys.modules)\n"
        "import inspect; print(list(inspect.signature(secateur.search).parameters))"
    ).splitlines()
    assert out[0] == "True True"
    assert out[1].endswith(" False")
    assert out[2] == "['settings', 'run', 'say', 'anyway', 'sections']"


def test_a_search_by_the_one_import(top, tmp_path):
    out = top(
        "import secateur\n"
        f"run = secateur.search(run='run', **{SMALL!r})\n"
        "found = run.pick(sparsity=0.5)\n"
        "print(type(run).__name__, found.number in run.front().index, found.test_ratio.value)"
    )
    assert out.split() == ["Run", "True", "1.0"]
    assert app.open_run(tmp_path / "run").settings.space.metric == "magnitude"


# --- functions have the words of the commands ---


@pytest.mark.parametrize("name", ["prune", "evaluate", "latency", "recover", "bench"])
def test_keyword_arguments_are_the_options_of_the_command(name):
    options = set(inspect.signature(COMMANDS[name]).parameters) - {"json", "models", "run", "trials"}
    function = inspect.signature(getattr(api, name)).parameters
    renamed = {"form": "format"}
    missing = {renamed.get(option, option) for option in options} - set(function)
    further = next((p.name for p in function.values() if p.kind is p.VAR_KEYWORD), None)
    allowed = {"limits", "bounds"} if further else set()
    bounds = {x for x in missing if x.startswith(("max_", "min_")) or x == "sparsity"} if allowed else set()
    assert missing <= bounds
    assert all(p.annotation is not p.empty for p in function.values())


def test_every_name_has_a_docstring_and_types():
    for name in api.__all__:
        found = getattr(api, name)
        assert found.__doc__, name
        assert not found.__doc__.startswith(("Return", "Get")), name
    assert {*api.__all__, "__version__"} >= {
        *(
            "search",
            "open_run",
            "prune",
            "evaluate",
            "latency",
            "recover",
            "bench",
            "register_metric",
            "__version__",
        )
    }


def test_settings_are_merged_section_by_section(tmp_path):
    below = {"space": {"kind": "allocation", "target": 0.5}, "seed": 1}
    assert _merged(below, {"space": {"target": 0.6}, "model": "x"}) == {
        "space": {"kind": "allocation", "target": 0.6},
        "seed": 1,
        "model": "x",
    }
    path = tmp_path / "settings.yaml"
    path.write_text("seed: -1")
    with pytest.raises(UsageError, match="seed"):
        api.search(path, run=tmp_path / "run")
    with pytest.raises(UsageError, match="Expected a known key"):
        api.search(run=tmp_path / "run", no_such_key=1)


def test_a_function_may_stand_where_a_metric_is_named(monkeypatch):
    before = dict(REGISTERED)

    def own_score(weight, inputs, generator):
        return weight.abs()

    try:
        space = {"target": 0.5, "metric": own_score, "metrics": ["wanda", own_score]}
        assert _with_metrics(space) == {
            "target": 0.5,
            "metric": "own_score",
            "metrics": ["wanda", "own_score"],
        }
        assert METRICS["own_score"].function is own_score
        assert space["metric"] is own_score, "what was given is left as it is"
    finally:
        REGISTERED.clear()
        REGISTERED.update(before)


def test_wrong_calls_say_what_to_do(run):
    with pytest.raises(UsageError, match="Expected one model for a table, got 2"):
        api.latency("a", "b")
    with pytest.raises(UsageError, match="got both"):
        api.prune("tiny", to="x", recipe="wanda", sparsity=0.5, max_params="0.5x")
    with pytest.raises(UsageError, match="Expected a known bound"):
        run.pick(max_parms=1)
    with pytest.raises(UsageError, match="Expected a bound to pick by"):
        run.pick()


# --- runs, fronts and trials ---


def test_tables_are_those_of_the_run(run):
    pytest.importorskip("pandas")
    front = run.front()
    assert list(front.index) == [found.number for found in run.front_list()]
    first = run.front_list()[0]
    assert front.loc[first.number, "loss"] == first.values["loss"]
    assert front.loc[first.number, "test_loss"] == first.test["loss"]
    ratios = front["test_ratio"].dropna()
    assert len(ratios) > 1
    trials = run.trials()
    assert len(trials) == len(run.view.study.trials)
    assert trials["infeasible"].notna().sum() == 1
    assert set(trials["fidelity"]) == {"search:2048", "search:1024", "test:1024"}


def test_without_pandas_lists_remain_and_the_error_names_them(run, monkeypatch):
    real = builtins.__import__

    def without(name, *rest, **more):
        if name.partition(".")[0] == "pandas":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match=r"Install pandas, or use `Run.front_list\(\)`"):
        run.front()
    with pytest.raises(UsageError, match=r"Run.trials_list\(\)"):
        run.trials()
    assert len(run.front_list()) == len(run.view.front())


def test_pick_takes_the_words_of_the_command(run):
    found = run.pick(sparsity=0.6)
    assert found.number == run.view.pick(parse_bounds({"sparsity": "0.6"})).number
    assert found.values["sparsity"] == pytest.approx(0.6, abs=0.005)
    assert run.pick(max_params="0.75x").values["params"] <= 0.75 * 1000
    assert run.pick(found.number).candidate == found.candidate
    assert set(found.sparsity_of) == {linear.name for linear in run.view.linears}


def test_the_front_is_a_figure_of_matplotlib(run, tmp_path):
    from matplotlib.figure import Figure

    figure = run.plot_front()
    assert isinstance(figure, Figure)
    assert figure.axes[0].get_title(loc="left") == "Loss against parameters"
    figure.savefig(tmp_path / "front.png")
    assert not (Path(run.directory) / "report" / "front.png").exists(), "nothing is written of its own"


def test_runs_and_trials_show_themselves(run):
    assert repr(run).startswith(f"<run {run.directory}: allocation of tiny, controller ")
    found = run.pick(sparsity=0.6)
    ratio = against_baseline(run.view, run.view.study.trials[found.number])
    assert f"test loss {ratio.text} of uniform@0.6" in repr(found)
    html = found._repr_html_()
    assert html.index("test loss / uniform@0.6") < html.index("<th>loss</th>"), "the test leads"
    assert "<script" not in run._repr_html_()
    assert str(run.directory) in run._repr_html_()


def test_what_comes_from_outside_is_escaped():
    from secateur.api.tables import html

    assert "<script>" not in html("<script>", {"<b>": "<script>alert(1)</script>"})
