"""Text for calibration, search and test, and the windows of tokens that are cut from it."""

import hashlib
import json
import logging
import struct
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from secateur.evaluators.data import docs
from secateur.evaluators.data.sources import TextError
from secateur.evaluators.data.text import SHARES, Text, load_parts, load_text
from secateur.evaluators.data.tokens import windows
from secateur.pruners.calibration.tokens import tokens_sha256
from secateur.spaces.no_answer import NoAnswerError

LINES = "".join(f"line {i} of the file\n" for i in range(200))


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text(LINES)
    return path


@pytest.fixture(scope="module")
def tokenizer():
    vocab = {"[UNK]": 0, "line": 1, "of": 2, "the": 3, "file": 4} | {str(i): i + 5 for i in range(200)}
    words = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=16, unk_token="[UNK]")


def test_docs_parts_share_no_paragraph_and_have_about_their_shares():
    parts = load_parts("docs", "docs", "docs")
    seen: set[str] = set()
    for text in parts.values():
        paragraphs = {" ".join(p.split()) for p in text.text.split("\n\n")}
        paragraphs = {p for p in paragraphs if len(p) >= 40}
        assert len(paragraphs) > 100
        assert not seen & paragraphs
        seen |= paragraphs
    total = sum(len(text.text) for text in parts.values())
    assert total > 300_000
    for part, text in parts.items():
        assert len(text.text) / total == pytest.approx(SHARES[part], abs=0.05)


def test_docs_keep_every_paragraph_once():
    from pydoc_data.topics import topics as raw

    def long_paragraphs(text):
        return {p for p in (" ".join(p.split()) for p in text.split("\n\n")) if len(p) >= 40}

    kept = [long_paragraphs(text) for text in docs.topics().values()]
    everything = [long_paragraphs(text) for text in raw.values()]
    assert sum(map(len, kept)) == len(set().union(*kept)) < sum(map(len, everything))
    assert set().union(*kept) == set().union(*everything)


def test_docs_of_one_part_alone_are_those_of_the_split():
    assert load_text("docs", "test") == load_parts("docs", "docs", "docs")["test"].text


def test_one_file_for_all_parts_is_cut_at_line_ends(lines):
    parts = load_parts(str(lines), str(lines), str(lines))
    assert "".join(parts[part].text for part in ("calibration", "search", "test")) == LINES
    assert all(text.text.endswith("\n") for text in parts.values())
    for part, text in parts.items():
        assert len(text.text) / len(LINES) == pytest.approx(SHARES[part], abs=0.01)


def test_one_file_for_two_parts_is_cut_for_the_two(lines):
    parts = load_parts("docs", str(lines), str(lines))
    assert parts["search"].text + parts["test"].text == LINES
    assert len(parts["search"].text) / len(LINES) == pytest.approx(4 / 7, abs=0.01)


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.floats(0, 1), min_size=2, max_size=2, unique=True).map(sorted))
def test_adjacent_ranges_are_disjoint_and_complete(tmp_path_factory, cuts):
    path = tmp_path_factory.getbasetemp() / "ranges.txt"
    path.write_text(LINES)
    a, b = (f"{cut:.6f}" for cut in cuts)
    texts = []
    for span in (f"[:{a}]", f"[{a}:{b}]", f"[{b}:]"):
        try:
            texts.append(load_text(f"{path}{span}", "test"))
        except TextError:  # an empty piece
            texts.append("")
    assert "".join(texts) == LINES
    assert all(text == "" or text.endswith("\n") for text in texts)


def test_ranges_that_overlap_are_refused(lines):
    load_parts(f"{lines}[0:0.5]", f"{lines}[0.5:0.8]", f"{lines}[0.8:1]")
    with pytest.raises(TextError, match=r"Expected disjoint texts.*data\.search.*data\.test"):
        load_parts(f"{lines}[0:0.5]", f"{lines}[0.5:0.9]", f"{lines}[0.8:1]")
    with pytest.raises(TextError, match="Expected disjoint"):  # a range of a file that another part has whole
        load_parts(f"{lines}[0:0.5]", str(lines), "docs")


def test_the_same_file_under_another_name_or_in_a_directory_is_refused(lines):
    (lines.parent / "link.txt").symlink_to(lines)
    with pytest.raises(TextError, match="Expected disjoint"):
        load_parts(str(lines), str(lines.parent), "docs")
    halves = load_parts(str(lines), str(lines.parent / "link.txt"), "docs")  # one file, so it is cut
    assert halves["calibration"].text + halves["search"].text == LINES
    copy = lines.parent / "copy.txt"
    copy.write_text(LINES)
    with pytest.raises(TextError, match="same content"):
        load_parts(str(lines), str(copy), "docs")


def test_jsonl_and_directories(tmp_path):
    rows = [{"text": "one", "raw": "eins"}, {"text": "two\nlines", "raw": "zwei"}]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (tmp_path / "a.txt").write_text("\ufefffirst\r\nfile", encoding="utf-8")
    (tmp_path / ".hidden.txt").write_text("no")
    (tmp_path / "picture.png").write_bytes(b"\xff")
    assert load_text(str(tmp_path / "b.jsonl"), "test") == "one\n\ntwo\nlines"
    assert load_text(f"{tmp_path / 'b.jsonl'}:raw", "test") == "eins\n\nzwei"
    assert load_text(str(tmp_path), "test") == "first\nfile\n\none\n\ntwo\nlines"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "does not exist"),
        ("empty.txt", b"", "Expected text in `data.search`"),
        ("blank.txt", b"\n \n", "Expected text in `data.search`"),
        ("latin.txt", b"caf\xe9", "Expected UTF-8 text.*0xe9 at offset 3"),
        ("bad.jsonl", b'{"text": "a"}\n{"text"\n', "line 2"),
        ("other.jsonl", b'{"body": "a"}\n', "field 'text'.*got body"),
        ("number.jsonl", b'{"text": 3}\n', "Expected text in field 'text'.*got int"),
        ("list.jsonl", b'["text"]\n', "got list"),
        ("range.txt[0.5:0.2]", b"", "rising fractions"),
        ("range.txt[0:1.5]", b"", "rising fractions"),
        ("range.txt[0:1.2.3]", b"", "rising fractions"),
        ("tiny.txt[0.5:0.6]", None, "between 0.5 and 0.6"),
    ],
)
def test_bad_texts_get_one_line(tmp_path, name, content, message):
    (tmp_path / "tiny.txt").write_text("a single line")
    if content is not None:
        (tmp_path / name.partition("[")[0]).write_bytes(content)
    with pytest.raises(TextError, match=message) as caught:
        load_text(str(tmp_path / name), "search")
    assert "\n" not in str(caught.value)


def test_other_bad_sources(tmp_path):
    for source, message in [
        ("docs[0:0.5]", "without a range"),
        (str(tmp_path), "Expected files .txt"),
        ("hub:", "hub:OWNER/NAME"),
        ("hub:a/b:c:d:e:f", "hub:OWNER/NAME"),
    ]:
        with pytest.raises(TextError, match=message):
            load_text(source, "search")


@pytest.mark.parametrize(
    ("module", "source"), [("pyarrow.parquet", "x.parquet"), ("datasets", "hub:a/b::test")]
)
def test_missing_extras_are_named(tmp_path, monkeypatch, module, source):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, module, None)
    (tmp_path / "x.parquet").write_bytes(b"")
    with pytest.raises(TextError, match=r"secateur\[data\]"):
        load_text(source, "search")


def test_parquet(tmp_path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"text": ["a", None, "b"], "n": [1, 2, 3]}), tmp_path / "x.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"no such format")
    assert load_text(str(tmp_path / "x.parquet"), "test") == "a\n\nb"
    for name, message in [
        ("x.parquet:raw", "field 'raw'.*got text, n"),
        ("x.parquet:n", "Expected text in field 'n'.*got int"),
        ("bad.parquet", "Expected a Parquet file"),
    ]:
        with pytest.raises(TextError, match=message) as caught:
            load_text(str(tmp_path / name), "test")
        assert "\n" not in str(caught.value)


def test_hub_sources_are_the_same_however_they_are_spelt():
    with pytest.raises(TextError, match="Expected disjoint"):
        load_parts("hub:a/b[0:0.6]", "hub:a/b::train:text[0.5:1]", "docs")


def test_windows_are_the_tokens_in_order_without_the_tail(tokenizer, caplog):
    text = Text("test", "lines.txt", LINES)
    with caplog.at_level(logging.WARNING):
        rows = windows(tokenizer, text, window=7)
    assert not caplog.records  # the text is longer than the tokenizer's context, and that is fine
    assert rows.shape == (1000 // 7, 7)
    assert rows.dtype == torch.int64
    assert rows.flatten().tolist() == tokenizer.encode(LINES, add_special_tokens=False)[: rows.numel()]
    assert torch.equal(windows(tokenizer, text, 7, 21), rows[:3])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 5), k=st.integers(1, 100))
def test_random_windows_are_nested_and_the_same_set(tokenizer, seed, k):
    text = Text("search", "lines.txt", LINES)
    whole = windows(tokenizer, text, 10, None, "random", seed)
    assert torch.equal(windows(tokenizer, text, 10, 10 * k, "random", seed), whole[:k])
    assert sorted(whole.tolist()) == sorted(windows(tokenizer, text, 10).tolist())
    assert not torch.equal(whole, windows(tokenizer, text, 10, None, "random", seed + 1))


def test_a_text_that_is_too_short_says_what_to_do(tokenizer):
    text = Text("search", "lines.txt", LINES)
    with pytest.raises(
        TextError, match=r"at least 1024 tokens in `data.search` \(lines.txt\), got 1000.*fidelities"
    ):
        windows(tokenizer, text, 512, 1024)
    with pytest.raises(TextError, match="at least 2048 tokens"):
        windows(tokenizer, text, 2048)


def test_tokens_asked_must_fill_windows(tokenizer):
    text = Text("search", "lines.txt", LINES)
    for window, n_tokens in [(10, 15), (10, 0), (10, -10)]:
        with pytest.raises(ValueError, match="positive multiple of the window"):
            windows(tokenizer, text, window, n_tokens)
    with pytest.raises(ValueError, match="`window` > 0"):
        windows(tokenizer, text, 0)


def test_hashes():
    expected = hashlib.sha256(struct.pack("<qq", 1, 2)).hexdigest()
    assert tokens_sha256(torch.tensor([[1, 2]])) == expected
    assert tokens_sha256(torch.tensor([[1, 2], [3, 4]]).T) == tokens_sha256(torch.tensor([1, 3, 2, 4]))
    assert Text("test", "x", "abc").sha256.startswith("ba7816bf8f01cfea")  # FIPS 180-2, appendix B.1


def test_a_data_set_whose_hub_does_not_answer_is_told_from_one_that_is_wrong(monkeypatch):
    def raising(error):
        def load_dataset(*names, split):
            raise error

        monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))

    raising(ConnectionError("no route"))
    with pytest.raises(NoAnswerError, match="Expected to load owner/name from the hub, got: no route"):
        load_text("hub:owner/name", "test")
    raising(ValueError("no such config"))
    with pytest.raises(TextError, match="no such config") as caught:
        load_text("hub:owner/name", "test")
    assert not isinstance(caught.value, NoAnswerError)
