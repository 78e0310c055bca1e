"""A Hugging Face Hub on loopback, as far as publishing and loading a model need it: its HTTP protocol, in memory.

Create, delete, validate-yaml, preupload, the LFS batch, PUT of LFS objects, commit (NDJSON), repo info, tree, resolve.
`fail` makes a step answer with a status; `meanwhile` is what somebody else does just before a step; `log` keeps what
was asked, `revisions` which revisions of files were.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "t" * 34
LFS_BYTES = 200_000  # from this size on, or with this ending, a file goes to LFS


@dataclass
class Repo:
    private: bool
    commits: list[dict[str, bytes]] = field(default_factory=lambda: [{}])
    messages: list[str] = field(default_factory=list)  # of all commits but the first, which is empty

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1]

    @property
    def sha(self) -> str:
        return hashlib.sha1(f"{len(self.commits)}".encode()).hexdigest()


@dataclass
class LocalHub:
    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    fail: dict[str, int] = field(default_factory=dict)
    meanwhile: dict[str, Callable[[], None]] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    revisions: list[str] = field(default_factory=list)

    @property
    def env(self) -> dict[str, str]:
        """What a process needs to take this for the hub. Files go by LFS: Xet has a protocol of its own."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": TOKEN,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }

    @contextmanager
    def running(self) -> Iterator["LocalHub"]:
        handler = type("Handler", (_Handler,), {"hub": self})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.route("GET")

    def do_HEAD(self) -> None:
        self.route("HEAD")

    def do_POST(self) -> None:
        self.route("POST")

    def do_PUT(self) -> None:
        self.route("PUT")

    def do_DELETE(self) -> None:
        self.route("DELETE")

    def route(self, method: str) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length)
        path = unquote(urlsplit(self.path).path)
        routes = (
            ("create", r"POST /api/repos/create", self.create),
            ("delete", r"DELETE /api/repos/delete", self.delete),
            ("validate", r"POST /api/validate-yaml", lambda: self.send({"errors": [], "warnings": []})),
            ("preupload", r"POST /api/models/([\w.-]+/[\w.-]+)/preupload/main", self.preupload),
            ("batch", r"POST /([\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch", self.batch),
            ("put", r"PUT /lfs/(\w+)", self.put),
            ("commit", r"POST /api/models/([\w.-]+/[\w.-]+)/commit/main", self.commit),
            ("tree", r"GET /api/models/([\w.-]+/[\w.-]+)/tree/(\w+)(?:/.*)?", self.tree),
            ("info", r"GET /api/models/([\w.-]+/[\w.-]+)(?:/revision/\w+)?", self.info),
            ("resolve", r"(?:GET|HEAD) /([\w.-]+/[\w.-]+)/resolve/(\w+)/(.+)", self.resolve),
        )
        for step, pattern, answer in routes:
            match = re.fullmatch(pattern, f"{method} {path}")
            if match:
                self.hub.log.append(step)
                self.hub.meanwhile.get(step, lambda: None)()
                if step in self.hub.fail:
                    self.send({"error": f"{step} fails, as asked"}, self.hub.fail[step])
                elif step != "put" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    self.send({"error": "Invalid username or password."}, 401)
                else:
                    answer(*match.groups())
                return
        self.hub.log.append(f"? {method} {path}")
        self.send({"error": f"no route {method} {path}"}, 404)

    def send(self, body: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(key, value)
        if isinstance(body, dict) and "error" in body:
            self.send_header("X-Error-Message", body["error"])
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked['organization'] or 'me'}/{asked['name']}"
        if name in self.hub.repos:
            return self.send({"error": "You already created this model repo"}, 409)
        self.hub.repos[name] = Repo(private=asked.get("visibility") == "private" or bool(asked.get("private")))
        self.send({"url": f"{self.hub.url}/{name}", "name": name})

    def delete(self) -> None:
        asked = json.loads(self.body)
        del self.hub.repos[f"{asked['organization']}/{asked['name']}"]
        self.send({})

    def preupload(self, name: str) -> None:
        def mode(file: dict[str, Any]) -> str:
            return "lfs" if file["size"] >= LFS_BYTES or file["path"].endswith(".safetensors") else "regular"

        files = json.loads(self.body)["files"]
        self.send({"files": [{"path": f["path"], "uploadMode": mode(f), "shouldIgnore": False} for f in files]})

    def batch(self, name: str) -> None:
        objects = json.loads(self.body)["objects"]
        actions = {o["oid"]: {"upload": {"href": f"{self.hub.url}/lfs/{o['oid']}"}} for o in objects}
        self.send({"transfer": "basic", "objects": [{**o, "actions": actions[o["oid"]]} for o in objects]})

    def put(self, oid: str) -> None:
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.hub.objects[oid] = self.body
        self.send({})

    def commit(self, name: str) -> None:
        repo = self.hub.repos[name]
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = next(v["value"] for v in lines if v["key"] == "header")
        parent = header.get("parentCommit")
        if parent and parent != repo.sha:
            return self.send({"error": "the branch moved"}, 412)
        files = dict(repo.files)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        repo.commits.append(files)
        repo.messages.append(header["summary"])
        self.send({"commitUrl": f"{self.hub.url}/{name}/commit/{repo.sha}", "commitOid": repo.sha})

    def info(self, name: str) -> None:
        repo = self.hub.repos.get(name)
        if repo is None:
            return self.send({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        siblings = [{"rfilename": f} for f in repo.files]
        self.send(
            {"id": name, "modelId": name, "sha": repo.sha, "private": repo.private, "siblings": siblings, "tags": []}
        )

    def tree(self, name: str, _: str) -> None:
        files = self.hub.repos[name].files
        self.send([{"type": "file", "path": p, "size": len(c), "oid": etag(c)} for p, c in files.items()])

    def resolve(self, name: str, revision: str, path: str) -> None:
        self.hub.revisions.append(revision)
        repo = self.hub.repos.get(name)
        if repo is None:
            return self.send({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        if path not in repo.files:
            return self.send(
                {"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": repo.sha}
            )
        content = repo.files[path]
        self.send(content, headers={"ETag": f'"{etag(content)}"', "X-Repo-Commit": repo.sha})


def etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
