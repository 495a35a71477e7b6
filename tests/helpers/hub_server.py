"""A small server that speaks as much of the Hugging Face hub's HTTP as its client needs to push and fetch models."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from huggingface_hub import ModelCard

__all__ = ["TOKEN", "FakeHub", "Repository", "hub", "unreachable"]

TOKEN = "hf_verysecrettoken"
BINARY = (".safetensors", ".png")  # what goes by Git LFS


@dataclass
class Repository:
    """Files of each commit, the newest last, and the commits of other branches and tags."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes]) -> str:
        """Adds a commit to main and returns its hash."""
        before = self.commits.get(self.refs.get("main", ""), {})
        oid = hashlib.sha1(repr((len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits[oid], self.refs["main"] = {**before, **files}, oid
        return oid

    def find(self, revision: str) -> str | None:
        return self.refs.get(revision, revision if revision in self.commits else None)


class FakeHub:
    """The hub.

    Attributes:
        repositories: by their names.
        requests: method and path of each request, in order.
        cards: the text of each model card that was to be validated.
        sizes: bytes that it says a file has, by name, in place of those it has.
        broken: the status of every answer; 0: as it should be.
        corrupt: whether a byte of what is stored by Git LFS is changed.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str]] = []
        self.cards: list[str] = []
        self.sizes: dict[str, int] = {}
        self.broken = 0
        self.corrupt = False
        self.objects: dict[str, bytes] = {}
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    def close(self) -> None:
        """Stops answering; a second time does nothing."""
        self.server.shutdown()
        self.server.server_close()


class Answer(Exception):  # noqa: N818 (no error)
    """What is answered: a status, a body, and headers."""

    def __init__(self, status: int, body: Any = b"", **headers: str) -> None:
        self.status = status
        self.body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class Handler(BaseHTTPRequestHandler):
    """Finds who answers a request by its path, and writes the answer."""

    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path))
        self.data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            if self.hub.broken and path != "/":
                raise Answer(self.hub.broken, {"error": "out of order"})
            for pattern, method in ROUTES:
                if match := re.fullmatch(pattern, path):
                    method(self, *match.groups())
            raise Answer(404)
        except Answer as answer:
            self.send_response(answer.status)
            self.send_header("Content-Length", str(len(answer.body)))
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(answer.body if self.command != "HEAD" else b"")

    do_GET = do_HEAD = do_POST = do_PUT = answer  # noqa: N815

    def log_message(self, *_: Any) -> None:
        """Prints nothing."""

    @property
    def is_owner(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def repository(self, name: str) -> Repository:
        """Returns a repository that may be read; strangers cannot tell a private one from none."""
        found = self.hub.repositories.get(name)
        if self.headers.get("Authorization") and not self.is_owner:
            message = "Invalid credentials in Authorization header"
            raise Answer(401, {"error": message}, X_Error_Message=message)
        if found is None or (found.private and not self.is_owner):
            raise Answer(404 if self.is_owner else 401, {"error": "not found"}, X_Error_Code="RepoNotFound")
        if found.gated and not self.is_owner:
            raise Answer(403, {"error": "gated"}, X_Error_Code="GatedRepo")
        return found

    def owned(self, name: str) -> Repository:
        """Returns a repository that may be written."""
        found = self.repository(name)
        if not self.is_owner or not name.startswith("me/"):
            raise Answer(403, {"error": "no rights"}, X_Error_Message="You have no right to write here")
        return found

    def commit_of(self, name: str, revision: str) -> tuple[str, dict[str, bytes]]:
        found = self.repository(name)
        commit = found.find(revision)
        if commit is None:
            raise Answer(404, {"error": "no revision"}, X_Error_Code="RevisionNotFound")
        return commit, found.commits[commit]

    def alive(self) -> None:
        raise Answer(200)

    def validate(self) -> None:
        text = json.loads(self.data)["content"]
        self.hub.cards.append(text)
        assert ModelCard(text).data.get("library_name")
        raise Answer(200, {"errors": [], "warnings": []})

    def create(self) -> None:
        asked = json.loads(self.data)
        name = f"{asked['organization']}/{asked['name']}"
        if not self.is_owner:
            raise Answer(401, {"error": "no token"}, X_Error_Message="Invalid username or password.")
        if asked["organization"] != "me":
            raise Answer(403, {"error": "no rights"}, X_Error_Message="You have no right to write here")
        if name in self.hub.repositories:
            raise Answer(409, {"error": "it exists"})
        self.hub.repositories[name] = made = Repository(asked.get("visibility", "public") == "private")
        made.commit({".gitattributes": b"*.safetensors filter=lfs\n"})
        raise Answer(200, {"url": f"{self.hub.endpoint}/{name}"})

    def info(self, name: str) -> None:
        commit, files = self.commit_of(name, "main")
        private = self.repository(name).private
        siblings = [{"rfilename": file} for file in files]
        raise Answer(200, {"id": name, "sha": commit, "private": private, "siblings": siblings, "tags": []})

    def preupload(self, name: str, _: str) -> None:
        self.owned(name)
        files = [file["path"] for file in json.loads(self.data)["files"]]
        modes = {file: "lfs" if file.endswith(BINARY) else "regular" for file in files}
        said = [{"path": file, "uploadMode": mode, "shouldIgnore": False, "oid": None} for file, mode in modes.items()]
        raise Answer(200, {"files": said})

    def batch(self, name: str) -> None:
        self.owned(name)
        objects = json.loads(self.data)["objects"]
        links = [{**one, "actions": {"upload": {"href": f"{self.hub.endpoint}/lfs/{one['oid']}"}}} for one in objects]
        raise Answer(200, {"transfer": "basic", "objects": links})

    def stored(self, oid: str) -> None:
        assert hashlib.sha256(self.data).hexdigest() == oid
        self.hub.objects[oid] = self.data[:-1] + b"?" if self.hub.corrupt else self.data
        raise Answer(200)

    def commit(self, name: str, _: str) -> None:
        found = self.owned(name)
        header, *lines = (json.loads(line) for line in self.data.splitlines())
        assert header["value"]["summary"]
        if header["value"].get("parentCommit") not in (None, found.refs["main"]):
            raise Answer(412, {"error": "it has changed"})
        files = {}
        for line in lines:
            value = line["value"]
            is_plain = line["key"] == "file"
            files[value["path"]] = base64.b64decode(value["content"]) if is_plain else self.hub.objects[value["oid"]]
        oid = found.commit(files)
        raise Answer(200, {"commitOid": oid, "commitUrl": f"{self.hub.endpoint}/{name}/commit/{oid}"})

    def paths(self, name: str, revision: str) -> None:
        _, files = self.commit_of(name, revision)
        said: list[dict[str, Any]] = []
        for path in parse_qs(self.data.decode())["paths"]:
            size, digest = len(files[path]), hashlib.sha256(files[path]).hexdigest()
            lfs = {"lfs": {"oid": digest, "size": size, "pointerSize": 130}} if path.endswith(BINARY) else {}
            said.append({"type": "file", "path": path, "size": size, "oid": "0" * 40, **lfs})
        raise Answer(200, said)

    def resolve(self, name: str, revision: str, path: str) -> None:
        commit, files = self.commit_of(name, revision)
        if path not in files:
            raise Answer(404, {"error": "no file"}, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        data = files[path]
        digest, size = hashlib.sha256(data).hexdigest(), str(self.hub.sizes.get(path, len(data)))
        linked = {"X_Linked_Size": size, "X_Linked_Etag": f'"{digest}"'} if path.endswith(BINARY) else {}
        raise Answer(200, data, X_Repo_Commit=commit, ETag=f'"{digest}"', **linked)


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES: list[tuple[str, Callable[..., None]]] = [
    ("/", Handler.alive),
    ("/api/validate-yaml", Handler.validate),
    ("/api/repos/create", Handler.create),
    (rf"/api/models/{NAME}", Handler.info),
    (rf"/api/models/{NAME}/preupload/(.+)", Handler.preupload),
    (rf"/api/models/{NAME}/commit/(.+)", Handler.commit),
    (rf"/api/models/{NAME}/paths-info/(.+)", Handler.paths),
    (rf"/{NAME}\.git/info/lfs/objects/batch", Handler.batch),
    (r"/lfs/(\w+)", Handler.stored),
    (rf"/{NAME}/resolve/([\w.-]+)/(.+)", Handler.resolve),
]


@contextmanager
def serving() -> Iterator[FakeHub]:
    """Runs a hub in a thread."""
    found = FakeHub()
    thread = threading.Thread(target=found.server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield found
    finally:
        found.close()
        thread.join()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """Returns a hub that the client finds, and an empty cache; there is a token that it takes."""
    with serving() as found:
        settings = {"HF_HUB_OFFLINE": False, "ENDPOINT": found.endpoint, "HF_HUB_CACHE": str(tmp_path / "hub")}
        settings["HUGGINGFACE_CO_URL_TEMPLATE"] = found.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        settings |= {"HF_HUB_DISABLE_XET": True, "HF_TOKEN_PATH": str(tmp_path / "none")}
        for name, value in settings.items():
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("no_proxy", "*")
        yield found


def unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets nothing listen where the hub should be; to wait for it is a failure."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("time.sleep", lambda *_: pytest.fail("waited"))
