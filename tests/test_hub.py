"""Loading models from a hub of our own."""

from __future__ import annotations

import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import huggingface_hub.constants as hub_constants
import pytest

from secateur.pruners.models.checkpoints import hub, smollm2
from secateur.pruners.models.loading import EMBEDDED, find_checkpoint, load_model
from tests.checkpoints import fails


@pytest.fixture
def answers(monkeypatch):
    """A hub of our own: what it answers to every request, as (status, headers, body)."""
    state = {"status": 200, "headers": {}, "body": {}, "requests": 0}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            state["requests"] += 1
            body = json.dumps(state["body"]).encode()
            self.send_response(state["status"])
            for key, value in {**state["headers"], "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    for variable in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_a_hub_id_is_pinned_to_its_newest_commit(answers):
    answers["body"] = {"id": "someone/model", "sha": "c" * 40}
    checkpoint = hub.open_hub("someone/model")
    assert (checkpoint.location, checkpoint.revision) == ("someone/model", "c" * 40)
    assert checkpoint.fingerprint == "c" * 40
    assert checkpoint.source == f"hub someone/model@{'c' * 40}"


def test_a_model_that_the_hub_does_not_have_is_an_error(answers):
    answers |= {"status": 404, "headers": {"X-Error-Code": "RepoNotFound"}}
    fails("someone/model", "got 'someone/model', which is not there")


def test_a_hub_that_fails_or_is_not_there_counts_as_unreachable(answers, hub_cache, monkeypatch):
    answers["status"] = 500
    assert hub.latest_commit("someone/model") is None
    monkeypatch.setattr(hub_constants, "ENDPOINT", "http://127.0.0.1:9")
    assert hub.latest_commit("someone/model") is None
    fails("someone/model", "the hub is not reachable and it is not in the hub's cache")


def test_a_hub_that_is_not_reachable_ends_a_command_as_unavailable(
    answers, hub_cache, monkeypatch, secateur, tmp_path
):
    monkeypatch.setattr(hub_constants, "ENDPOINT", "http://127.0.0.1:9")
    for words in (
        ("evaluate", "someone/model"),
        ("latency", "someone/model"),
        ("prune", "someone/model", "--to", tmp_path / "out"),
        ("search", "-o", "model=someone/model", "--run", tmp_path / "run"),
        ("doctor", "someone/model"),
    ):
        status, _, err = secateur(*words)
        assert (status, "the hub is not reachable" in err) == (5, True), words
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    assert secateur("evaluate", "someone/model")[0] == 2  # the user forbids it


def test_offline_nothing_is_asked_and_the_hubs_cache_serves(answers, hub_cache, monkeypatch):
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    fails("someone/model", "HF_HUB_OFFLINE is set")
    commit = "d" * 40
    files = hub_cache / "models--someone--model"
    (files / "snapshots" / commit).mkdir(parents=True)
    (files / "snapshots" / commit / "config.json").write_text("{}")
    (files / "refs").mkdir()
    (files / "refs" / "main").write_text(commit)
    assert hub.open_hub("someone/model").revision == commit
    assert answers["requests"] == 0


def test_smollm2_comes_from_the_hub_where_there_is_one(answers):
    answers["body"] = {"id": smollm2.REPO, "sha": "e" * 40}
    assert EMBEDDED["smollm2-135m"]().source == f"hub {smollm2.REPO}@{'e' * 40}"


def test_smollm2_can_be_held_to_the_hub(hub_cache):
    fails("smollm2-135m@hub", "HF_HUB_OFFLINE is set")


def cached_model(hub_cache: Path, commit: str, **changes: object) -> Path:
    """The embedded model in the hub's cache, with another config."""
    snapshot = hub_cache / "models--someone--model" / "snapshots" / commit
    shutil.copytree(find_checkpoint("tiny").location, snapshot)
    config = snapshot / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text(commit)
    return snapshot


@pytest.mark.parametrize("n_layers", [0, 1, 1_000_000_000])
def test_a_config_that_contradicts_the_stored_weights_is_refused_before_a_model_is_built(hub_cache, n_layers):
    cached_model(hub_cache, "f" * 40, num_hidden_layers=n_layers)
    fails("someone/model", f"to be 6, as the stored weights have it, got {n_layers}")


def test_shards_elsewhere_are_refused(hub_cache):
    snapshot = cached_model(hub_cache, "f" * 40)
    (snapshot / "model.safetensors").rename(snapshot.parent / "secret.safetensors")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "../secret.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    fails("someone/model", "to files beside it")


def test_a_model_in_the_hubs_cache_loads(hub_cache):
    cached_model(hub_cache, "f" * 40)
    assert load_model("someone/model").fingerprint == "f" * 40
