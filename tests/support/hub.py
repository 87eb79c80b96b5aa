"""A model hub on a loopback port: what the hub's client needs of the real one's API to push a folder."""

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha1, sha256
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.support.servers import QuietHandler, listening


@dataclass
class FakeHub:
    """Repositories by name, each with branches by name, each with files by name. Large files are kept by digest."""

    token: str
    url: str = ""
    repos: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    large: dict[str, bytes] = field(default_factory=dict)
    large_from: int = 1 << 40  # bytes: files from this size on are sent apart from the commit
    fails: dict[str, int | None] = field(default_factory=dict)  # part of a path -> status; None: it hangs up
    requests: list[str] = field(default_factory=list)
    commits: int = 0

    def write(self, repo: str, folder: Path, branch: str = "main") -> Path:
        """Write a branch as files, as a client that downloads it has them."""
        for name, data in self.repos[repo][branch].items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
        return folder

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        """Status and JSON of a request that is allowed."""
        parts = [unquote(part) for part in path.strip("/").split("/")]
        if path == "/api/whoami-v2":
            return 200, {"name": "me", "type": "user", "auth": {}}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if parts[0] == "lfs" and method == "PUT":
            assert sha256(body).hexdigest() == parts[1]
            self.large[parts[1]] = body
            return 200, {}
        if path.endswith("/info/lfs/objects/batch"):
            return 200, {"objects": [self._place(item) for item in json.loads(body)["objects"]]}
        repo, verb = f"{parts[2]}/{parts[3]}", parts[4] if len(parts) > 4 else "info"
        if repo not in self.repos:
            return 404, {"error": "Repository not found"}
        return self._of_repo(repo, verb, parts[5] if len(parts) > 5 else "main", body)

    def _create(self, wanted: dict[str, Any]) -> tuple[int, Any]:
        repo = f"{wanted['organization']}/{wanted['name']}"
        answer = {"url": f"{self.url}/{repo}"}
        if repo in self.repos:
            return 409, {"error": "You already created this model repo", **answer}
        self.repos[repo] = {"main": {".gitattributes": b""}}
        if wanted.get("visibility") == "private":
            self.private.add(repo)
        return 200, answer

    def _place(self, item: dict[str, Any]) -> dict[str, Any]:
        known = {"oid": item["oid"], "size": item["size"]}
        if item["oid"] in self.large:
            return known
        return known | {"actions": {"upload": {"href": f"{self.url}/lfs/{item['oid']}", "header": {}}}}

    def _of_repo(self, repo: str, verb: str, revision: str, body: bytes) -> tuple[int, Any]:
        branches = self.repos[repo]
        if verb in ("info", "revision"):
            return 200, {"id": repo, "private": repo in self.private, "sha": f"{self.commits:040x}", "siblings": []}
        if verb == "branch":
            is_new = revision not in branches
            branches.setdefault(revision, dict(branches["main"]))
            return (200, {}) if is_new else (409, {"error": "Reference already exists"})
        if revision not in branches:
            return 404, {"error": f"Invalid rev id: {revision}"}
        files = branches[revision]
        if verb == "tree":
            return 200, [{"type": "file", "path": n, "size": len(d), "oid": _git_oid(d)} for n, d in files.items()]
        if verb == "preupload":
            return 200, {"files": [self._mode(files, item) for item in json.loads(body)["files"]]}
        assert verb == "commit", verb
        branches[revision] = self._changed(files, [json.loads(line) for line in body.splitlines()])
        self.commits += 1
        return 200, {"commitUrl": f"{self.url}/{repo}/commit/{self.commits:040x}", "commitOid": f"{self.commits:040x}"}

    def _mode(self, files: dict[str, bytes], item: dict[str, Any]) -> dict[str, Any]:
        is_large = item["size"] >= self.large_from
        there = files.get(item["path"])
        oid = None if there is None else sha256(there).hexdigest() if is_large else _git_oid(there)
        mode = "lfs" if is_large else "regular"
        return {"path": item["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}

    def _changed(self, files: dict[str, bytes], lines: list[dict[str, Any]]) -> dict[str, bytes]:
        new = dict(files)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                new[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                new[value["path"]] = self.large[value["oid"]]
            elif line["key"] == "deletedFile":
                del new[value["path"]]
        return new


def _git_oid(data: bytes) -> str:
    return sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def fake_hub(token: str) -> Iterator[FakeHub]:
    """A hub that knows one token."""
    hub = FakeHub(token)

    class Handler(QuietHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:  # noqa: N802  the name that http.server calls
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = urlsplit(self.path).path
            hub.requests.append(f"{self.command} {path}")
            words: Any = {"error": f"not for {self.headers.get('Authorization')}"}  # says the token, as a proxy may
            status: int | None = next((code for part, code in hub.fails.items() if part in path), 200)
            if status is None:
                self.close_connection = True
                return
            if not path.startswith("/lfs/") and self.headers.get("Authorization") != f"Bearer {hub.token}":
                status = 401
            if status == 200:
                status, words = hub.answer(self.command, path, body)
            text = json.dumps(words).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_PUT = do_POST  # noqa: N815  the names that http.server calls

    with listening(Handler) as hub.url:
        yield hub
