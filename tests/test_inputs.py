"""Texts, settings and paths as people have them."""

import gzip
import json

import pytest
import torch
from transformers import AutoTokenizer

from secateur.evaluators.data import tokens as cut
from secateur.evaluators.data.documents import TextError
from secateur.evaluators.data.text import Text, load_parts, load_text
from secateur.evaluators.data.tokens import windows
from secateur.pruners.calibration import tokens as calibration
from secateur.pruners.calibration.tokens import pieces, tokenize
from secateur.pruners.models.checkpoints.checkpoint import one_line
from secateur.pruners.models.loading import EMBEDDED
from secateur.search import app
from secateur.search.errors import UsageError
from secateur.search.settings.settings import load_settings, resolved, settings_from
from secateur.spaces.limited_text import parse_yaml
from secateur.spaces.names import did_you_mean

ROWS = [
    {"instruction": "Say {hi}", "output": "hi, there"},
    {"instruction": "Count", "output": "one\ntwo"},
]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(EMBEDDED["tiny"]().location)


@pytest.fixture
def said():
    return []


def written(path, text):
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_an_array_of_json_is_read_by_field(tmp_path):
    path = written(tmp_path / "x.json", json.dumps(ROWS))
    assert load_text(f"{path}:output", "test") == "hi, there\n\none\ntwo"
    assert load_text(f"{path}:instruction+output", "test") == "Say {hi}\nhi, there\n\nCount\none\ntwo"
    with pytest.raises(
        TextError, match=r"field 'text' in .*x.json row 1, got instruction, output.*PATH:FIELD"
    ):
        load_text(path, "test")


def test_lines_of_json_may_be_called_json(tmp_path):
    path = written(tmp_path / "x.json", "\n".join(map(json.dumps, ROWS)))
    assert load_text(f"{path}:output", "test") == "hi, there\n\none\ntwo"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{\n "data": []\n}', "array of JSON objects, or one a line, in .* at line 1"),
        ("[1, 2]", r"a field 'text' in .*row 1, got int"),
        ('["a"]', r"a field 'text' in .*row 1, got str"),
        ('[{"text": "a"', "array of JSON objects.*got Expecting"),
    ],
)
def test_other_json_is_refused(tmp_path, text, message):
    with pytest.raises(TextError, match=message) as caught:
        load_text(written(tmp_path / "x.json", text), "test")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("suffix", "mark"), [("csv", ","), ("tsv", "\t")])
def test_a_table_is_read_by_its_first_line(tmp_path, suffix, mark):
    table = f'id{mark}text\r\n1{mark}"a {{b}}, ""c""\r\nd"\r\n2{mark}e\r\n'
    path = written(tmp_path / f"x.{suffix}", table)
    assert load_text(path, "test") == 'a {b}, "c"\nd\n\ne'
    with pytest.raises(TextError, match=r"field 'body' in .* line .*got id, text"):
        load_text(f"{path}:body", "test")


def test_documents_of_a_table_may_be_long(tmp_path):
    path = written(tmp_path / "x.csv", f'text\n"{"long " * 40_000}"\n')
    assert load_text(path, "test") == "long " * 40_000


def test_a_broken_table_names_the_line(tmp_path):
    with pytest.raises(TextError, match="unexpected end of data at line 1"):
        load_text(written(tmp_path / "x.csv", 'text\n"a'), "test")


def test_other_suffixes_are_text_only_if_said_so(tmp_path):
    path = written(tmp_path / "server.log", "GET /\n")
    with pytest.raises(
        TextError, match=r"`data.test` to be a file \.txt.*got .*server.log. Write text:.*format: text"
    ):
        load_text(path, "test")
    assert load_text(f"text:{path}", "test") == "GET /\n"
    assert load_text(f"text:{path}[0:1]", "test") == "GET /\n"
    array = written(tmp_path / "x.json", "[]")
    assert load_text(f"text:{array}", "test") == "[]"


def test_format_text_is_that_of_each_file():
    data = {"calibration": "docs", "search": "a.log", "test": "hub:a/b", "format": "text"}
    settings = settings_from({"evaluator": {"data": data}})
    stored = resolved(settings)["evaluator"]["data"]
    assert stored == {"calibration": "docs", "search": "text:a.log", "test": "hub:a/b"}
    assert settings_from(resolved(settings)) == settings


def test_a_directory_says_what_it_skipped(tmp_path, said):
    written(tmp_path / "a.txt", "first")
    written(tmp_path / "b.json", json.dumps([{"text": "second"}]))
    written(tmp_path / "c.docx", "no")
    written(tmp_path / ".hidden", "no")
    assert load_text(str(tmp_path), "test", said.append) == "first\n\nsecond"
    assert said == [f"{tmp_path}: 1 files skipped, which are no text: c.docx"]


def test_rows_without_a_value_are_skipped_counted_and_said(tmp_path, said):
    rows = [{"text": "a", "more": None}, {"text": None, "more": None}, {"text": "b", "more": "c"}]
    path = written(tmp_path / "x.jsonl", "\n".join(map(json.dumps, rows)))
    assert load_text(path, "test", said.append) == "a\n\nb"
    assert said == [f"{path}: 1 of 3 rows skipped, whose 'text' is null"]
    assert load_text(f"{path}:text+more", "test") == "a\n\nb\nc"


def test_rows_of_parquet_follow_the_same_rule(tmp_path, said):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = str(tmp_path / "x.parquet")
    pq.write_table(pa.table({"text": ["a", None, "b"], "more": [None, None, "c"]}), path)
    assert load_text(path, "test", said.append) == "a\n\nb"
    assert said == [f"{path}: 1 of 3 rows skipped, whose 'text' is null"]
    assert load_text(f"{path}:text+more", "test") == "a\n\nb\nc"


def test_halves_of_surrogate_pairs_are_replaced_and_said(tmp_path, said):
    path = written(tmp_path / "x.jsonl", '{"text": "cut emoji \\ud83d here \\ud83d\\ude00"}')
    text = load_text(path, "test", said.append)
    assert text == "cut emoji \ufffd here \U0001f600"
    assert said == [f"{path}: 1 halves of surrogate pairs replaced by U+FFFD"]


@pytest.mark.parametrize(
    ("name", "text"), [("x.txt", "plain\r\ntext"), ("x.jsonl", '{"text": "plain\\ntext"}')]
)
def test_gzip(tmp_path, name, text):
    path = tmp_path / f"{name}.gz"
    path.write_bytes(gzip.compress(text.encode()))
    assert load_text(str(path), "test") == "plain\ntext"
    assert load_text(str(tmp_path), "test") == "plain\ntext"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(TextError, match="whole gzip file"):
        load_text(str(path), "test")


def test_a_field_of_a_compressed_file(tmp_path):
    (tmp_path / "x.json.gz").write_bytes(gzip.compress(json.dumps(ROWS).encode()))
    assert load_text(f"{tmp_path / 'x.json.gz'}:output", "test") == "hi, there\n\none\ntwo"


# --- tokens of long texts ---


def test_the_first_tokens_of_a_long_text_are_those_of_all_of_it(tokenizer, monkeypatch):
    text = load_parts("docs", "docs", "docs")["test"].text
    whole = tokenize(tokenizer, text)
    monkeypatch.setattr(calibration, "PIECE", 3000)
    seen = []
    monkeypatch.setattr(
        calibration, "_ids", lambda t, part, of=calibration._ids: seen.append(len(part)) or of(t, part)
    )
    for n_first in (1, 700, 1024, 5000):
        assert torch.equal(tokenize(tokenizer, text, n_first), whole[:n_first])
    assert max(seen) <= 8 * 5000 < len(text)


def test_pieces_are_the_text_and_end_with_lines_or_words():
    lines = "".join(f"line {i} of the text\n" for i in range(100))
    assert "".join(pieces(lines, 70)) == lines
    assert all(piece.endswith("\n") for piece in pieces(lines, 70))
    assert pieces("ab cd ef gh", 4) == ["ab ", "cd ", "ef ", "gh"]
    assert pieces("abcdefgh", 3) == ["abc", "def", "gh"]


def test_of_a_large_text_only_what_is_needed_is_tokenised(tokenizer, monkeypatch, said):
    docs = load_parts("docs", "docs", "docs")["search"].text
    text = Text("search", "large.txt", docs)
    for module in (cut, calibration):
        monkeypatch.setattr(module, "LARGE", 1000)
    seen = []
    monkeypatch.setattr(
        calibration, "_ids", lambda t, part, of=calibration._ids: seen.append(len(part)) or of(t, part)
    )
    small = windows(tokenizer, text, 64, 1024, "random", 3)
    assert sum(seen) < 3 * 5 * 1024 < len(docs) / 4
    large = windows(tokenizer, text, 64, 8192, "random", 3)
    assert torch.equal(large[:16], small)  # nested
    assert not torch.equal(small, windows(tokenizer, text, 64, 1024, "random", 4))
    monkeypatch.setattr(cut, "_PIECES_A_LINE", 50)
    every = windows(tokenizer, text, 64, None, "random", 3, say=said.append)
    assert torch.equal(every[:128], large)
    assert len(every) * 64 > 0.7 * len(tokenize(tokenizer, docs))
    assert said[0].startswith("tokenising piece 50/")
    assert len({tuple(row) for row in every.tolist()}) > 0.95 * len(every)  # none twice but by its text
    with pytest.raises(TextError, match="Expected at least"):
        windows(tokenizer, text, 64, 64 * (len(every) + 1), "random", 3)
    assert len(windows(tokenizer, text, 64, 64 * (len(every) + 1), "random", 3, at_most=True)) == len(every)


# --- paths ---


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A settings file with a text beside it, and another working directory."""
    there, here = tmp_path / "there", tmp_path / "here"
    there.mkdir()
    here.mkdir()
    written(there / "lines.txt", "".join(f"The value of item {i} is {i * i}.\n" for i in range(800)))
    settings = "evaluator: {data: {calibration: lines.txt, search: lines.txt, test: lines.txt}, window: 32,"
    settings += " calibration_tokens: 64, fidelities: [64], test_tokens: 64}\nbudget: {evaluations: 2}\n"
    written(there / "settings.yaml", settings + "model: model\nspace: {metric: magnitude}\n")
    (there / "model").symlink_to(EMBEDDED["tiny"]().location)
    monkeypatch.chdir(here)
    return there


def test_relative_paths_are_those_of_the_settings_file(elsewhere, monkeypatch, secateur):
    settings = load_settings(elsewhere / "settings.yaml")
    assert settings.evaluator.data.test == "lines.txt"  # as it is written, in the run, too
    plan = app.plan(settings)
    assert plan.test == str(elsewhere / "lines.txt")
    status, _, err = secateur("search", elsewhere / "settings.yaml", "--run", elsewhere / "run")
    assert status == 0, err
    monkeypatch.chdir("/")
    status, _, err = secateur("export", elsewhere / "run", "1", "--to", elsewhere / "out", "--json")
    assert status == 0, err
    monkeypatch.chdir(elsewhere)  # the same search, from the folder itself
    status, _, err = secateur("search", "settings.yaml", "--run", "run")
    assert status == 0, err


def test_paths_of_the_working_directory_are_still_found(elsewhere, monkeypatch):
    written(elsewhere.parent / "here" / "own.txt", "text")
    settings = load_settings(elsewhere / "settings.yaml", ["evaluator.data.test=own.txt[0:1]"])
    assert app.plan(settings).test == "own.txt[0:1]"
    monkeypatch.chdir("/")
    assert app.plan(settings).test == f"{elsewhere.parent / 'here' / 'own.txt'}[0:1]"


@pytest.mark.parametrize("form", ["{}[0:0.5]", "text:{}", "text:{}[0.5:1]", "{}"])
def test_a_source_keeps_its_range_and_its_prefix(elsewhere, form):
    settings = load_settings(elsewhere / "settings.yaml", [f"evaluator.data.test={form.format('lines.txt')}"])
    assert app.plan(settings).test == form.format(elsewhere / "lines.txt")


def test_a_source_keeps_its_field(elsewhere):
    written(elsewhere / "x.jsonl", '{"raw": "a"}')
    settings = load_settings(elsewhere / "settings.yaml", ["evaluator.data.test=x.jsonl:raw"])
    assert app.plan(settings).test == f"{elsewhere / 'x.jsonl'}:raw"


# --- settings ---


def test_yaml_merge_keys():
    text = "base: &b {kind: allocation, target: 0.5}\nspace: {<<: *b, target: 0.6}\n"
    assert parse_yaml(text, "x")["space"] == {"kind": "allocation", "target": 0.6}
    both = "a: [&a {x: 1}, &b {x: 2, y: 3}]\nc: {<<: [*a, *b]}"
    assert parse_yaml(both, "x")["c"] == {"x": 1, "y": 3}
    with pytest.raises(ValueError, match="the key 'y' twice"):
        parse_yaml("a: &a {x: 1}\nb: {<<: *a, y: 1, y: 2}", "x")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("space.target=0,5", r"`space.target`.*got '0,5'.*write 0\.5"),
        ("space={target: 0,5}", r"names as keys in `space`, got 5\..*write 0\.5"),
        ("seed=0123", r"got 0123, which YAML reads as 83 \(base 8\)"),
        ("seed=1:30", r"got 1:30, which YAML reads as 90 \(base 60\)"),
    ],
)
def test_numbers_that_yaml_reads_otherwise(override, message):
    with pytest.raises(UsageError, match=message):
        load_settings(None, [override])


def test_numbers_as_they_are():
    assert parse_yaml("[0, 10, -5, 1_000, 0x10, 0.5, 1e6, '0123']", "x") == [
        0,
        10,
        -5,
        1000,
        16,
        0.5,
        1e6,
        "0123",
    ]


# --- messages ---


def test_messages_have_no_codes_of_a_terminal(tmp_path, secateur):
    assert one_line("\x1b[31mred\x1b[0m: bad\x07\nmore") == "red: bad"
    assert one_line("Validation error for field 'heads':\n  TypeError: no") == (
        "Validation error for field 'heads': TypeError: no"
    )
    source = EMBEDDED["tiny"]().location
    model = tmp_path / "model"
    model.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        (model / name).symlink_to(f"{source}/{name}")
    written(
        model / "config.json", json.dumps({"model_type": "\x1b[31mnothing\x1b[0m", "architectures": ["X"]})
    )
    status, _, err = secateur("evaluate", model)
    assert status == 2
    assert "model type `nothing`" in err
    assert "\x1b" not in err


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("mymetric.score", ""),
        ("wandaa", "wanda"),
        ("sparsgpt", "sparsegpt"),
        ("wnada", "wanda"),
        ("my_own", ""),
    ],
)
def test_only_near_names_are_suggested(name, meant):
    known = ["wanda", "sparsegpt", "magnitude", "random", "gblm", "ria"]
    assert did_you_mean(name, known) == (f" Did you mean {meant!r}?" if meant else "")
