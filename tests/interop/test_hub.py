"""Weights go to a repository of the Hub and come back, against a stand-in server on this machine."""

import base64
import hashlib
import http.server
import json
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.interop.test_interop import VIT, assert_same, make
from vit_scaling import TransientError, UserError, interop, paths
from vit_scaling.interop import card, hub
from vit_scaling.interop.weights import of_module

constants = pytest.importorskip("huggingface_hub.constants")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class _Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hub as a download and an upload of small files need."""

    repositories: dict[str, dict[str, bytes]]
    private: dict[str, bool]
    posts: list[str]  # the paths to which something was sent
    status = 0  # of every answer, where it is not 0
    breaks = False  # whether uploads get no answer

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/([^/?]+)(\?.*)?", self.path):
            files = self.repositories.get(found[1])
            if files is None:
                return self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            if found[2] not in ("main", COMMIT):
                return self._json({"error": "Invalid rev"}, 404, {"X-Error-Code": "RevisionNotFound"})
            siblings = [{"rfilename": name} for name in files]
            return self._json({"id": found[1], "modelId": found[1], "sha": COMMIT, "siblings": siblings})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/.*", self.path):
            files = self.repositories[found[1]]
            return self._json([{"type": "file", "path": n, "size": len(d), "oid": "0"} for n, d in files.items()])
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", self.path):
            data = self.repositories[found[1]][found[2]]
            return self._answer(data, 200, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT})
        return self._json({}, 404)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.posts.append(self.path)
        if "Authorization" not in self.headers:
            return self._json({"error": "Invalid credentials"}, 401)
        if self.breaks:
            raise ConnectionAbortedError
        if self.path == "/api/repos/create":
            told = json.loads(body)
            name = f"{told['organization']}/{told['name']}"
            self.repositories.setdefault(name, {})
            self.private[name] = told.get("private", False) or told.get("visibility") == "private"
            return self._json({"url": f"{constants.ENDPOINT}/{name}", "id": name})
        if self.path == "/api/validate-yaml":  # of a model card
            return self._json({"errors": [], "warnings": []})
        name = "/".join(self.path.split("/")[3:5])
        if "/branch/" in self.path:
            return self._json({})
        if "/preupload/" in self.path:
            files = [{**file, "uploadMode": "regular", "shouldIgnore": False} for file in json.loads(body)["files"]]
            return self._json({"files": files})
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.repositories[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        return self._json(
            {"commitUrl": f"{constants.ENDPOINT}/{name}/commit/{COMMIT}", "commitOid": COMMIT, "success": True}
        )

    def _json(self, value: Any, status: int = 200, headers: Any = None) -> None:
        self._answer(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def _answer(self, data: bytes, status: int, headers: dict[str, str]) -> None:
        self.send_response(self.status or status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[_Hub]]:
    handler = type("Handler", (_Hub,), {"repositories": {}, "private": {}, "posts": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        running.handle_error = lambda *_: None  # type: ignore[method-assign]
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        address = f"http://127.0.0.1:{running.server_address[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", "hf_of_the_test")
        hub._download.cache_clear()
        yield handler
        running.shutdown()


def test_a_model_goes_there_and_comes_back(server: type[_Hub], tmp_path: Path) -> None:
    model = make(VIT)
    weights = of_module(model)
    text = card.card(weights, layout="huggingface", source="runs/birds", command=["weights", "push"])
    interop.write(weights, tmp_path / "export", layout="huggingface", texts={card.CARD: text})
    assert hub.push(tmp_path / "export", "birds/vit", public=False).endswith("birds/vit")
    files = {path.name: path.read_bytes() for path in (tmp_path / "export").iterdir()}
    assert {name: data for name, data in server.repositories["birds/vit"].items() if name != ".gitattributes"} == files
    assert server.private == {"birds/vit": True}
    server.repositories["birds/vit"] |= {"pytorch_model.bin": b"code", "onnx/model.safetensors": b"?", "run.py": b"?"}
    assert_same(interop.load("hf://birds/vit"), model)
    assert sorted(path.name for path in hub.place("hf://birds/vit@main").iterdir()) == sorted(
        files.keys() - {card.CARD}
    )
    assert interop.describe(f"hf://birds/vit@{COMMIT}")[1] == model.image_size


def test_a_push_to_a_branch_makes_it_and_writes_there(server: type[_Hub], tmp_path: Path) -> None:
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "config.json").write_text("{}")
    hub.push(tmp_path / "export", "birds/vit@v2", public=True)
    assert server.private == {"birds/vit": False}
    sent = [path.removeprefix("/api/models/birds/vit/").partition("?")[0] for path in server.posts]
    assert [path for path in sent if path.startswith(("branch", "commit"))] == ["branch/v2", "commit/v2"]


@pytest.mark.parametrize(
    ("path", "kind", "sentence"),
    [
        ("hf://birds/none", UserError, "the Hub shows no such repository to these credentials"),
        ("hf://birds/empty", UserError, r"holds no weight file that is read here \(\*\.safetensors, \*\.npz"),
        ("hf://birds/nothing", UserError, "hf://birds/nothing holds no weight file"),
        ("hf://birds/empty@v9", UserError, "the repository has no such revision"),
        ("hf://birds", UserError, "names no repository; write hf://OWNER/NAME"),
        ("hf://birds/vit/config.json", UserError, "names no repository"),
    ],
)
def test_what_is_not_there(path: str, kind: type[Exception], sentence: str, server: type[_Hub]) -> None:
    server.repositories |= {"birds/empty": {"config.json": b"{}"}, "birds/nothing": {}}
    with pytest.raises(kind, match=sentence):
        hub.place(path)


def test_a_hub_that_fails_is_tried_again_later(
    server: type[_Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 1: the command may be started again. Without a token it is the user's turn."""
    (tmp_path / "x").mkdir()
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"birds/vit: .*401"):
        hub.push(tmp_path / "x", "birds/vit", public=True)
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_test")
    server.breaks = True
    with pytest.raises(TransientError, match="birds/vit: the connection to the Hub failed"):
        hub.push(tmp_path / "x", "birds/vit", public=True)
    server.breaks, server.status = False, 507
    with pytest.raises(TransientError, match="birds/vit: the Hub answers 507"):
        hub.push(tmp_path / "x", "birds/vit", public=True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(TransientError, match="cannot be reached, and no download is kept"):
        hub.place("hf://birds/vit")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"needs the package huggingface_hub, .* pip install 'vit_scaling\[hub\]'"):
        hub.place("hf://birds/vit9")


def test_only_weights_are_read_from_the_hub() -> None:
    with pytest.raises(UserError, match=r"is of a kind \(hf:\) that is not supported"):
        paths.place("hf://birds/vit")
    with pytest.raises(UserError, match="--repo is 'vit'; it must be OWNER/NAME"):
        hub.check("vit")
