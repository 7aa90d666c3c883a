"""Hub of our own: an HTTP server with the addresses that `huggingface_hub` asks for an upload."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer

import huggingface_hub.constants as hub_constants
import pytest

LARGE = (".safetensors", ".gguf")


@dataclass
class Hub:
    """What the server holds, and how it answers.

    Args:
        files: contents by ``repo@branch`` and path.
        private: by repository.
        status: of every answer, if it is no success.
        blob_status: of the answers to large files.
        tokens: that the requests came with.
        commits: their summaries.
        blobs: large files by SHA-256.
    """

    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    status: int = 200
    blob_status: int = 200
    tokens: set[str | None] = field(default_factory=set)
    commits: list[str] = field(default_factory=list)
    blobs: dict[str, bytes] = field(default_factory=dict)


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self._begin()
            repo, _, branch = self.path.removeprefix("/api/models/").partition("?")[0].partition("/revision/")
            held = hub.files.get(f"{repo}@{branch or 'main'}", {})
            siblings = [{"rfilename": name} for name in held]
            self._answer({"id": repo, "private": hub.private.get(repo), "siblings": siblings})

        def do_PUT(self):
            body = self._begin()
            hub.blobs[hashlib.sha256(body).hexdigest()] = body
            self._answer({}, hub.blob_status)

        def do_POST(self):
            body = self._begin()
            path = self.path.partition("?")[0]
            if path.endswith("/commit/" + path.rpartition("/")[2]):
                self._commit(path.removeprefix("/api/models/"), body)
                return
            asked = json.loads(body)
            if path == "/api/repos/create":
                repo = f"{asked['organization']}/{asked['name']}"
                known = repo in hub.private
                hub.private.setdefault(
                    repo, asked.get("visibility") == "private" or bool(asked.get("private"))
                )
                hub.files.setdefault(f"{repo}@main", {})
                self._answer({"url": f"{self._root}/{repo}"}, 409 if known else 200)
            elif "/branch/" in path:
                repo, _, branch = path.removeprefix("/api/models/").partition("/branch/")
                hub.files.setdefault(f"{repo}@{branch}", {})
                self._answer({})
            elif "/preupload/" in path:
                large = {x["path"]: x["path"].endswith(LARGE) for x in asked["files"]}
                modes = {name: "lfs" if is_large else "regular" for name, is_large in large.items()}
                found = [{"path": n, "uploadMode": m, "shouldIgnore": False} for n, m in modes.items()]
                self._answer({"files": found})
            elif path.endswith("/info/lfs/objects/batch"):
                href = {"upload": {"href": f"{self._root}/blob", "header": {}}}
                objects = [{"oid": x["oid"], "size": x["size"], "actions": href} for x in asked["objects"]]
                self._answer({"transfer": "basic", "objects": objects})
            elif path == "/api/validate-yaml":
                self._answer({"errors": [], "warnings": []})
            else:
                self._answer({"error": f"no such address: {path}"}, 404)

        def _commit(self, place, body):
            repo, _, branch = place.partition("/commit/")
            held = hub.files[f"{repo}@{branch}"]
            for line in body.decode().splitlines():
                entry = json.loads(line)
                key, value = entry["key"], entry["value"]
                if key == "header":
                    hub.commits.append(value["summary"])
                elif key == "file":
                    held[value["path"]] = base64.b64decode(value["content"])
                elif key == "lfsFile":
                    held[value["path"]] = hub.blobs[value["oid"]]
                elif key == "deletedFile":
                    del held[value["path"]]
            self._answer({"commitUrl": f"{self._root}/{repo}/commit/{'c' * 40}", "commitOid": "c" * 40})

        @property
        def _root(self):
            return f"http://127.0.0.1:{self.server.server_port}"

        def _begin(self):
            hub.tokens.add(self.headers.get("Authorization"))
            if self.headers.get("Transfer-Encoding") == "chunked":
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return body
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def _answer(self, document, status=200):
            status = status if hub.status == 200 else hub.status
            body = json.dumps(document if status < 500 else {"error": "out of order"}).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    return Handler


@pytest.fixture
def own_hub(monkeypatch, tmp_path):
    """A hub of our own, which this process takes for the real one, with a token for it."""
    hub = Hub()
    server = HTTPServer(("127.0.0.1", 0), _handler(hub))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    for variable in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_test")
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub_constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield hub
    server.shutdown()
    thread.join()
    server.server_close()
