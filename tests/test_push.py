"""Upload of exported models to a hub of our own, by the hub's library."""

import json
import os

import huggingface_hub.constants as hub_constants
import pytest
from huggingface_hub import ModelCard

from secateur import api
from secateur.pruners.export.card import card
from secateur.pruners.export.manifest import MANIFEST, Manifest, check_files, file_records
from tests.runs import make_run

# The hub's library sends large files that way without Xet.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

RATIO = {"loss ratio": 0.9, "low": 0.8, "high": 1.0}


def make_export(directory, *, code=False, **changes):
    """The files of an export, with a manifest as `export` writes it."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(b"weights" * 100)
    if code:
        (directory / "modeling_secateur_llama.py").write_text("import os\n")
    filled = {
        "parent": "/home/somebody/models/mine",
        "fingerprint": "0" * 64,
        "calibration": {"text": "/home/somebody/private.txt", "tokens": 64},
        "measured": {
            "test:128, as searched, against uniform@0.5": RATIO,
            "test:128, as searched": {"kl": 0.3, "ce": 2.1},
            "test:128, as exported": {"kl": 0.25, "ce": 2.0},
        },
        "texts": {"test": "text:/home/somebody/test.txt[0.5:1.0]"},
        "checks": {"trust_remote_code": code},
    }
    plain = {"method": {}, "candidate": "c", "asked": {}, "seeds": {}, "label": "label"}
    manifest = Manifest(**{**plain, **filled, **changes})
    (directory / "README.md").write_text(card(manifest))
    written = json.loads(manifest.to_json()) | {"files": file_records(directory)}
    (directory / MANIFEST).write_text(json.dumps(written))
    return directory


def remote(hub, place):
    return hub.files[place]


def test_a_dry_run_shows_files_and_card_and_sends_nothing(tmp_path, own_hub, secateur):
    made = make_export(tmp_path / "model")
    status, out, _ = secateur("push", made, "me/mine")
    assert status == 0
    assert [line.split() for line in out.splitlines()[1:]][2] == ["model.safetensors", "700", "bytes"]
    assert f"Next:  secateur push {made} me/mine --upload" in out
    assert 'from_pretrained("me/mine", dtype="auto")' in out
    assert not own_hub.tokens
    planned = json.loads(secateur("push", made, "me/mine", "--json")[1])
    assert planned["files"]["model.safetensors"] == 700
    assert (planned["uploaded"], planned["url"], planned["code"]) == (False, None, [])


def test_an_upload_is_one_commit_and_what_comes_down_again_is_whole(tmp_path, own_hub, secateur):
    made = make_export(tmp_path / "model")
    (made / "notes.txt").write_text("not of the export")
    before = file_records(made)
    status, out, err = secateur("push", made, "me/mine", "--upload")
    assert (status, out.splitlines()[0].rpartition("/")[2]) == (0, "c" * 40)
    assert "left out: notes.txt" in err
    assert own_hub.commits == ["Upload 4 files with Secateur"]
    assert own_hub.tokens - {None} == {"Bearer hf_of_the_test"}  # None: of addresses that are signed
    assert own_hub.private == {"me/mine": False}
    held = remote(own_hub, "me/mine@main")
    assert held.keys() == {"README.md", "config.json", "model.safetensors", MANIFEST}
    assert held["model.safetensors"] == b"weights" * 100
    down = tmp_path / "down"
    down.mkdir()
    for name, content in held.items():
        (down / name).write_bytes(content)
    assert check_files(down) == 3
    assert file_records(made) == before


def test_a_public_file_names_no_folder_of_this_machine(tmp_path, own_hub, secateur):
    made = make_export(tmp_path / "model")
    secateur("push", made, "me/mine", "--upload")
    held = remote(own_hub, "me/mine@main")
    assert b"somebody" not in held["README.md"] + held[MANIFEST]
    record = json.loads(held[MANIFEST])
    assert (record["parent"], record["calibration"]["text"]) == ("mine", "private.txt")
    assert record["texts"] == {"test": "text:test.txt[0.5:1.0]"}


def test_the_card_has_a_model_index_with_the_test_ratio_first(tmp_path, own_hub, secateur):
    made = make_export(tmp_path / "model")
    secateur("push", made, "me/mine", "--upload")
    text = remote(own_hub, "me/mine@main")["README.md"].decode()
    data = ModelCard(text).data
    assert data.model_name == "mine"
    first, *others = data.eval_results
    assert (first.metric_type, first.metric_value) == ("loss_ratio", 0.9)
    assert first.metric_args == {"low": 0.8, "high": 1.0}
    assert first.metric_name == "loss ratio, 128 tokens, as searched, against uniform@0.5"
    found = {x.metric_type: x.metric_value for x in others}
    assert found == {"perplexity": pytest.approx(7.38905609893065), "kl": 0.25, "ce": 2.0}
    assert {(x.dataset_name, x.dataset_split) for x in data.eval_results} == {
        ("text:test.txt[0.5:1.0]", "test")
    }
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert rows[1] == (
        "| loss ratio (test:128, as searched, against uniform@0.5) | 0.9 (0.8 to 1, 95 % over test windows) |"
    )


def test_code_that_comes_along_is_named(tmp_path, own_hub, secateur):
    made = make_export(tmp_path / "model", code=True)
    _, out, err = secateur("push", made, "me/mine")
    assert "code comes along and runs where the model is loaded: modeling_secateur_llama.py" in err
    assert 'from_pretrained("me/mine", dtype="auto", trust_remote_code=True)' in out


def test_base_model_and_licence_are_those_of_a_parent_from_the_hub(tmp_path, own_hub, secateur):
    commit = "d" * 40
    snapshot = tmp_path / "hub" / "models--someone--model" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Parent\n")
    made = make_export(tmp_path / "model", parent="someone/model", fingerprint=commit, revision=commit)
    _, out, err = secateur("push", made, "me/mine", "--json")
    data = ModelCard(json.loads(out)["card"]).data.to_dict()
    assert (data["base_model"], data["license"]) == ("someone/model", "apache-2.0")
    assert "licence" not in err


def test_a_card_that_was_edited_is_kept(tmp_path, own_hub, secateur):
    made = make_export(tmp_path / "model")
    text = (made / "README.md").read_text()
    (made / "README.md").write_text(text.replace("---\nlib", "---\nlicense: mit\nlib", 1) + "\nMy words.\n")
    _, out, err = secateur("push", made, "me/mine", "--json")
    shown = json.loads(out)["card"]
    assert ("edited after the export" in err, "no licence" in err) == (True, False)
    assert shown.endswith("My words.\n")
    assert 'from_pretrained("me/mine", dtype="auto")' in shown
    (made / "README.md").unlink()
    (tmp_path / "secret").write_text("a key")
    (made / "README.md").symlink_to(tmp_path / "secret")
    assert "a link to" in secateur("push", made, "me/mine")[2]


def test_gguf_has_a_command_that_fetches_the_file():
    manifest = Manifest("p", "f", {}, "c", {}, {}, {}, {}, "label", format="gguf")
    text = card(manifest, "me/mine", "small")
    assert "hf download me/mine model.gguf --local-dir . --revision small\nllama-cli -m model.gguf" in text
    assert "hf download" not in card(manifest)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_damaged_export_is_refused(tmp_path, own_hub, secateur, name):
    made = make_export(tmp_path / "model")
    (made / name).write_text("x")
    status, _, err = secateur("push", made, "me/mine", "--upload")
    assert (status, f"got {name} missing or damaged" in err) == (2, True)
    assert not own_hub.tokens


def test_what_is_no_export_or_no_repository_is_refused(tmp_path, own_hub, secateur):
    made = make_export(tmp_path / "model")
    assert "Expected a repository as owner/name, got 'mine'" in secateur("push", made, "mine")[2]
    assert "Expected a repository as owner/name, got 'a/b/c'" in secateur("push", made, "a/b/c")[2]
    assert "Expected an export with its secateur.json" in secateur("push", tmp_path, "me/mine")[2]
    old = json.loads((made / MANIFEST).read_text()) | {"files": {}}
    (made / MANIFEST).write_text(json.dumps(old))
    assert "of an earlier version" in secateur("push", made, "me/mine")[2]


def test_a_run_stands_for_its_newest_export(tmp_path, own_hub, secateur):
    run = make_run(tmp_path / "run").study.directory
    status, _, err = secateur("push", run, "me/mine")
    assert (status, "Expected an exported model in" in err, "secateur export" in err) == (2, True, True)
    new = make_export(run / "new")
    old = make_export(run / "old", label="old")
    os.utime(old / MANIFEST, (1, 1))
    status, out, err = secateur("push", run, "me/mine", "--json")
    assert (status, json.loads(out)["directory"]) == (0, str(new))
    assert f"{new}; others: {old}" in err


def test_a_branch_and_a_private_repository(tmp_path, own_hub, secateur):
    made = make_export(tmp_path / "model")
    status, _, _ = secateur("push", made, "me/mine", "--upload", "--private", "--revision", "small")
    assert (status, own_hub.private) == (0, {"me/mine": True})
    assert remote(own_hub, "me/mine@main") == {}
    assert b'from_pretrained("me/mine", revision="small"' in remote(own_hub, "me/mine@small")["README.md"]
    own_hub.private["me/other"] = False
    own_hub.files["me/other@main"] = {}
    status, _, err = secateur("push", made, "me/other", "--upload", "--private")
    assert (status, "got me/other, which is public" in err) == (2, True)
    assert remote(own_hub, "me/other@main") == {}


def test_weights_of_an_earlier_upload_do_not_stay_beside_those_of_this_one(tmp_path, own_hub, secateur):
    own_hub.private["me/mine"] = False
    own_hub.files["me/mine@main"] = {
        "model-00001-of-00002.safetensors": b"old",
        "model.safetensors.index.json": b"{}",
        "picture.png": b"kept",
    }
    assert secateur("push", make_export(tmp_path / "model"), "me/mine", "--upload")[0] == 0
    assert {name for name in remote(own_hub, "me/mine@main") if "safetensors" in name} == {
        "model.safetensors"
    }
    assert remote(own_hub, "me/mine@main")["picture.png"] == b"kept"


# --- a hub that does not take it ---


@pytest.mark.parametrize(
    ("status", "ended", "message"),
    [
        (401, 2, "hf auth login"),
        (403, 2, "hf auth login"),
        (503, 5, "Try again later"),
        (400, 2, "status 400"),
    ],
)
def test_answers_of_the_hub_are_one_line_with_a_status(
    tmp_path, own_hub, secateur, monkeypatch, status, ended, message
):
    own_hub.status = status
    found, _, err = secateur("push", make_export(tmp_path / "model"), "me/mine", "--upload")
    last = [line for line in err.splitlines() if line.startswith("secateur: ")]
    assert (found, len(last), message in last[0]) == (ended, 1, True)


def test_a_large_file_that_does_not_arrive_ends_with_what_the_hub_said(tmp_path, own_hub, secateur):
    own_hub.blob_status = 400
    status, _, err = secateur("push", make_export(tmp_path / "model"), "me/mine", "--upload")
    assert (status, "Expected the hub to take me/mine, got status 400" in err) == (2, True)
    assert not own_hub.commits


def test_a_hub_that_is_not_there_is_unavailable(tmp_path, own_hub, secateur, monkeypatch):
    monkeypatch.setattr(hub_constants, "ENDPOINT", "http://127.0.0.1:9")
    made = make_export(tmp_path / "model")
    status, _, err = secateur("push", made, "me/mine", "--upload")
    assert (status, "Expected the hub to answer, got: " in err) == (5, True)
    assert secateur("push", made, "me/mine")[0] == 0  # a dry run asks nobody
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    status, _, err = secateur("push", made, "me/mine", "--upload")
    assert (status, "HF_HUB_OFFLINE is set" in err) == (2, True)


def test_from_python(tmp_path, own_hub):
    said: list[str] = []
    pushed = api.push(make_export(tmp_path / "model"), "me/mine", upload=True, say=said.append)
    assert pushed.url.endswith("/me/mine/commit/" + "c" * 40)
    assert said[-1] == "uploading to me/mine"
