from __future__ import annotations

import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.search.app.recipe_file import read_recipe
from secateur.search.controllers.registry import CONTROLLERS
from secateur.search.errors import UsageError
from secateur.search.executors.registry import EXECUTORS
from secateur.search.files import dump_yaml, parse_yaml
from secateur.search.settings.settings import identity, load_settings, resolved, settings_from
from secateur.spaces.registry import SPACES
from tests.calls import few_calls


def test_every_key_has_a_default():
    settings = load_settings()
    assert settings.model == "tiny"
    assert (settings.space.kind, settings.controller.kind, settings.executor.kind) == (
        "allocation",
        "evolution",
        "local",
    )
    assert settings.evaluator.fidelities == (2048, 8192, 32768)
    assert settings.budget.evaluations == 300


@pytest.mark.parametrize(
    ("overrides", "start"),
    [
        ([], "trust_region"),
        (["space={kind: architecture, target: 0.25}"], "trust_region"),
        (["space={kind: architecture, target: 0.25, units: [heads, channels, mlp]}"], "trust_region"),
        (["space={kind: architecture, target: 0.25, units: [blocks]}"], "uniform"),
        (["space={kind: architecture, target: 0.25, target_format: hf-stock}"], "uniform"),
        (["space={kind: recipe, unit: weights}"], "uniform"),
        (["evaluator.loss=ce"], "trust_region"),
        (["evaluator.loss=acceptance"], "uniform"),
        (["evaluator.training={tokens: [0, 512, 1024]}"], "uniform"),
        (["evaluator.calibration_tokens=1024"], "uniform"),
        (["controller={kind: evolution}"], "uniform"),
        (["controller.offspring=8"], "uniform"),
    ],
)
def test_where_no_controller_is_named_slots_are_searched_by_gradients_if_there_are_any(overrides, start):
    settings = load_settings(None, overrides)
    assert (settings.controller.kind, settings.controller.start) == ("evolution", start)
    assert settings_from(resolved(settings)) == settings


def test_a_search_over_recipes_asks_for_one_at_a_time_unless_told_otherwise():
    assert load_settings(None, ["space.kind=recipe"]).executor.batch == 1
    assert load_settings(None, ["space.kind=recipe", "executor={kind: ray, workers: 2}"]).executor.batch == 1
    assert load_settings(None, ["space.kind=recipe", "executor.batch=4"]).executor.batch == 4
    assert load_settings(None, ["space.kind=allocation"]).executor.batch == 16


def test_the_file_of_the_design_is_read(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text(
        "model: smollm2-135m\n"
        "space: {kind: allocation, metric: wanda, granularity: linear, target: 0.6}\n"
        "controller: {kind: evolution, offspring: 16}\n"
        "evaluator: {loss: kl, data: {calibration: docs, search: docs, test: docs}, fidelities: [2048, 8192]}\n"
        "objectives: [loss, size_bytes]\n"
        "budget: {tokens: 1e6}\n"
    )
    settings = load_settings(path, ["evaluator.loss=ce", "seed=7", "evaluator.loss=kl"])
    assert settings.objectives == ("loss", "size_bytes")
    assert settings.evaluator.loss == "kl"
    assert settings.budget.model_dump() == {"evaluations": None, "tokens": 1_000_000, "minutes": None}
    assert settings.seed == 7


@pytest.mark.parametrize("kind", sorted(CONTROLLERS))
def test_resolved_settings_are_read_back_as_they_were(kind):
    settings = load_settings(
        None, [f"controller.kind={kind}", "space.target=[0.5, 0.6]", "budget.minutes=2.5"]
    )
    again = settings_from(parse_yaml(dump_yaml(resolved(settings)), "the test"))
    assert again == settings
    assert resolved(again) == resolved(settings)


@pytest.mark.parametrize(
    ("section", "rows"), [("space", SPACES), ("controller", CONTROLLERS), ("executor", EXECUTORS)]
)
def test_every_row_of_a_registry_has_strict_settings_with_defaults_and_its_kind(section, rows):
    for kind, row in rows.items():
        assert row.settings().kind == kind
        with pytest.raises(UsageError, match="Expected a known key"):
            load_settings(None, [f"{section}={{kind: {kind}, no_such_key: 1}}"])


# What is given, and what the one line has to say.
BAD = {
    "controller.offsprings=3": "known key in `controller`, got 'offsprings'. Did you mean 'offspring'? Known: ",
    "controler.kind=random": "known key in the settings, got 'controler'. Did you mean 'controller'?",
    "evaluator.data.serch=docs": "known key in `evaluator.data`, got 'serch'. Did you mean 'search'?",
    "controller.kind=evolutoin": "known `controller.kind`, got 'evolutoin'. Did you mean 'evolution'? Known: ",
    "space.kind=[1]": "known `space.kind`, got [1]",
    "controller=random": "`controller` to be a mapping such as {kind: evolution}, got 'random'",
    "evaluator=3": "`evaluator` to be a mapping, got 3",
    "seed=true": "`seed` to be no switch, got true",
    "seed=-1": "`seed` to be greater than or equal to 0, got -1",
    "seed=1.5": "`seed` to be a valid integer, got 1.5",
    "model=": "`model` to be a valid string, got None",
    "dtype=float8": "`dtype` to be 'auto', 'float32', 'bfloat16' or 'float16', got 'float8'",
    "evaluator.window=abc": "`evaluator.window` to be a valid integer, got 'abc'",
    "evaluator.fidelities=[2048, 1024]": "`evaluator.fidelities` to ascend, got [2048, 1024]",
    "evaluator.fidelities=[1000]": "`evaluator.fidelities` in whole windows of 512 tokens, got 1000. Use 1024,",
    "evaluator.fidelities=[]": "`evaluator.fidelities` to have at least 1 item, got []",
    "evaluator.test_tokens=8000": "`evaluator.test_tokens` in whole windows of 512 tokens, got 8000. Use 8192,",
    "evaluator.calibration_tokens=100": "`evaluator.calibration_tokens` in whole windows of 512 tokens",
    "budget={}": "`budget` to limit evaluations, tokens or minutes, got no limit",
    "budget.evaluations=0": "`budget.evaluations` to be greater than 0, got 0",
    "budget.minutes=.inf": "`budget.minutes` to be a finite number, got inf",
    "objectives=[los]": "known `objectives`, got 'los'. Did you mean 'loss'?",
    "objectives=[loss, loss]": "each of `objectives` once",
    "objectives=loss": "`objectives` to be a list, got 'loss'",
    "space.target=1.5": "`space.target` within [0, 1], got 1.5",
    "space.target=[0.5, a]": "`space.target.1` to be a valid number, got 'a'",
    "space.target={low: 0.9, high: 0.5}": "`space.target` with 0 <= `low` <= `high` <= 1",
    "space.step=0": "`space.step` to be greater than 0, got 0",
    "space.max_sparsity=1.5": "`space.max_sparsity` to be less than or equal to 1, got 1.5",
    "space.dampening=.inf": "`space.dampening` to be a finite number, got inf",
    "space.step=true": "`space.step` to be no switch, got true",
    "controller.offspring=true": "`controller.offspring` to be no switch, got true",
    "executor.batch=true": "`executor.batch` to be no switch, got true",
    "executor.batch=0": "`executor.batch` to be greater than 0, got 0",
    "seed": "an override such as budget.evaluations=600, got 'seed'",
    "=3": "an override such as budget.evaluations=600, got '=3'",
    "model.x=3": "`model` to hold keys, for 'model.x=3', got 'tiny'",
    "seed={a: [}": "YAML in 'seed={a: [}', got ",
}


@pytest.mark.parametrize("override", BAD)
def test_what_is_wrong_is_said_in_one_line(override, tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text("model: tiny\n")
    with pytest.raises(UsageError, match=re.escape(BAD[override])) as error:
        load_settings(path, [override])
    assert str(error.value).startswith("Expected ")
    assert "\n" not in str(error.value)


def test_of_several_problems_the_first_is_named_and_the_rest_counted():
    with pytest.raises(UsageError, match=r"'offsprings'.* \(and 2 more\)$"):
        load_settings(None, ["controller.offsprings=3", "seed=a", "device=[]"])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"model: tiny\nspace: {kind: a: b}\n", "line 2, column"),
        (b"seed: 1\nmodel: tiny\nseed: 2\n", "got the key 'seed' twice at line 3, column 1"),
        (b"- a\n", "Expected keys and values in"),
        (b"\xff\xfe\x00", "Expected UTF-8 text"),
        (b"a: \x00", "Expected YAML"),
        (None, "no such file"),
    ],
)
def test_a_file_that_is_no_settings_file(tmp_path, content, said):
    path = tmp_path / "s.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=said) as error:
        load_settings(path)
    assert "\n" not in str(error.value)


def test_an_empty_file_means_the_defaults(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text("# nothing yet\n")
    assert load_settings(path) == load_settings()


@pytest.mark.parametrize("kind", ["allocation", "architecture", "formula"])
def test_a_former_key_is_accepted_with_a_note(kind):
    former, now = (
        settings_from({"space": {"kind": kind, key: "dense"}}) for key in ("calibration", "statistics")
    )
    assert resolved(former) == resolved(now)
    assert identity(former) == identity(load_settings(None, [f"space.kind={kind}"]))
    assert (len(former.renamed_keys), now.renamed_keys) == (1, ())
    assert "`space.calibration` is called `space.statistics` now" in former.renamed_keys[0]
    with pytest.raises(UsageError, match="got both"):
        settings_from({"space": {"kind": kind, "calibration": "dense", "statistics": "dense"}})


def test_identity_holds_what_measurements_depend_on_and_nothing_else():
    base = identity(load_settings())
    same = [
        "budget.evaluations=5",
        "controller.kind=random",
        "executor.batch=2",
        "space.target=0.5",
        "device=cpu",
    ]
    same += ["objectives=[kl]", "evaluator.fidelities=[512]", "evaluator.test_tokens=512"]
    for override in same:
        assert identity(load_settings(None, [override])) == base, override
    assert identity(load_settings(None, ["evaluator.seed=0", "seed=1"])) == base, "of the controller alone"
    others = [
        "model=x",
        "dtype=float16",
        "trust_remote_code=true",
        "space.metric=ria",
        "evaluator.loss=ce",
    ]
    others += [
        "evaluator.window=256",
        "evaluator.data.search=x",
        "evaluator.calibration_tokens=512",
        "evaluator.seed=1",
        "seed=1",
    ]
    for override in others:
        assert identity(load_settings(None, [override])) != base, override


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=5,
    ),
    st.sampled_from(
        ["model", "space", "controller", "evaluator", "budget", "objectives", "seed", "executor"]
    ),
)
def test_whatever_a_key_holds_it_is_read_or_refused_in_one_line(value, key):
    said = ""
    try:
        settings_from({key: value})
    except UsageError as error:
        said = str(error)
    assert "\n" not in said


def _bomb(first, form):
    """Ten lines, each with nine aliases of the one before."""
    lines = [
        form.format(inner=",".join(["*" + a] * 9), new=b) for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    ]
    return "\n".join([first, *lines])


LARGE = {
    "brackets": "[" * 2000,
    "levels": "[" * 3000 + "]" * 3000,
    "levels of keys": "\n".join(" " * i + "a:" for i in range(1400)),
    "aliases of lists": _bomb("a: &a [x,x,x,x,x,x,x,x,x]", "{new}: &{new} [{inner}]"),
    "aliases of merged keys": _bomb("a: &a {x: 1}", "{new}: &{new} {{<<: [{inner}]}}"),
    "levels of aliases": "\n".join(["a0: &a0 [1]", *(f"a{i}: &a{i} [*a{i - 1}]" for i in range(1, 3000))]),
    "itself": "&a [*a]",
    "values": "[" + "a," * 400_000 + "]",
    "bytes": "model: tiny\n" + "# settings\n" * 100_000,
    "hexadecimal": "seed: 0x" + "f" * 9000,
    "sexagesimal": "seed: " + "1:" * 9000 + "1",
    "long name": "q" * 5000 + ": 1",
    "long value": "dtype: " + "q" * 5000,
    "long list": f"objectives: {['q' * 5000]}",
    "long kind": "space: " + "q" * 5000,
    "unknown alias": "seed: *" + "q" * 5000,
}


@pytest.mark.parametrize("text", LARGE.values(), ids=LARGE)
def test_what_is_too_large_is_refused_at_once_in_a_short_line(tmp_path, text):
    path = tmp_path / "s.yaml"
    path.write_text(text)
    key, _, value = (
        text.partition(": ") if text[:5] in ("seed:", "dtype", "space", "objec") else ("seed", "", text)
    )
    for read in (
        lambda: load_settings(path),
        lambda: load_settings(None, [f"{key}={value}"]),
        lambda: read_recipe(path),
    ):
        with few_calls(), pytest.raises(UsageError) as error:
            read()
        assert "\n" not in str(error.value)
        assert len(str(error.value).replace(str(path), "")) < 700


def test_a_few_aliases_are_read():
    text = "a: &a {x: [1, 2]}\nb: &b [*a, *a]\nc: {y: *b}"
    inner = {"x": [1, 2]}
    expected = {"a": inner, "b": [inner, inner], "c": {"y": [inner, inner]}}
    assert parse_yaml(text, "the test") == expected
    assert parse_yaml("[" * 64 + "]" * 64, "the test")


def test_mutated_settings_are_read_or_refused_in_one_line(tmp_path):
    """A fixed choice of 400: characters, pieces and lines inserted, removed, repeated and exchanged."""
    base = dump_yaml(resolved(load_settings(None, ["storage=sqlite:///a.db", "space.target=[0.5, 0.6]"])))
    pieces = [
        *"[]{}'|>?#%@`~\"\t\n\x00é\u2028\ud7ff",
        "9" * 400,
        "0x" + "f" * 400,
        "1:1:1.5",
        "1e999",
        ".nan",
        "-.inf",
    ]
    pieces += [
        ": ",
        "- ",
        "&a ",
        "*a",
        "--- ",
        "... ",
        "null",
        "true",
        "2001-99-99",
        "!!int ''",
        "!!bool x",
        "!!set {a}",
    ]
    rng, path, n_read = random.Random(0), tmp_path / "s.yaml", 0
    for _ in range(400):
        text = base
        for _ in range(rng.randint(1, 2)):
            lines = text.split("\n")
            i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
            at, end = rng.randrange(len(text) + 1), rng.randrange(8)
            piece = rng.choice(pieces)
            lines[i], lines[j] = lines[j], lines[i]
            value = re.sub(r": .*", lambda _, piece=piece: f": {piece}", text.split("\n")[j])
            text = rng.choice(
                [
                    text[:at] + piece + text[at:],
                    text[:at] + text[at + end :],
                    text.replace(text.split("\n")[j], value),
                    "\n".join(lines),
                ]
            )
        path.write_text(text, encoding="utf-8")
        said = ""
        try:
            load_settings(path, ["seed=3"])
            n_read += 1
        except UsageError as error:
            said = str(error)
        assert "\n" not in said
        assert len(said) < 1000
    assert 20 < n_read < 380
