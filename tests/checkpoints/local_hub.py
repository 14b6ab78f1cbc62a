"""A hub on this machine: enough of its HTTP interface for the real client to fetch, to be refused and to upload."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class LocalHub:
    """Repositories by name and revision: ``repos["owner/name"]["main"]`` is a folder.

    `fetched` lists the files that were sent. With `private`, requests without that token are refused.
    """

    def __init__(self, private: str | None = None) -> None:
        self.repos: dict[str, dict[str, Path]] = {}
        self.fetched: list[str] = []
        self.private = private
        self.uploads: Path | None = None

    @staticmethod
    def commit(folder: Path) -> str:
        """The name of a revision: a hash of where it lies."""
        return hashlib.sha1(str(folder).encode()).hexdigest()

    def folder(self, repo: str, revision: str) -> Path | None:
        """The files of a revision or commit."""
        for name, folder in self.repos.get(repo, {}).items():
            if revision in (name, self.commit(folder)):
                return folder
        return None


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self._serve(body=False)

    def do_GET(self) -> None:
        self._serve(body=True)

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        if self.headers.get("Transfer-Encoding") == "chunked":
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            data = self.rfile.read(length)
        path = urlsplit(self.path).path
        assert self.hub.uploads is not None
        if path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            told = json.loads(data)
            name = f"{told.get('organization') or 'owner'}/{told['name']}"
            self.hub.repos.setdefault(name, {"main": self.hub.uploads / told["name"]})
            self._json({"url": f"http://{self.headers['Host']}/{name}"})
        elif "/preupload/" in path:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(data)["files"]
            ]
            self._json({"files": files})
        elif "/commit/" in path:
            folder = self.hub.folder(path.removeprefix("/api/models/").split("/commit/")[0], "main")
            assert folder is not None
            for line in data.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    place = folder / entry["value"]["path"]
                    place.parent.mkdir(parents=True, exist_ok=True)
                    place.write_bytes(base64.b64decode(entry["value"]["content"]))
            address = f"http://{self.headers['Host']}/owner/x/commit/{self.hub.commit(folder)}"
            self._json({"success": True, "commitOid": self.hub.commit(folder), "commitUrl": address})
        else:
            self._json({"error": f"unknown {path}"}, 404)

    def _serve(self, body: bool) -> None:
        token = self.headers.get("Authorization")
        path = unquote(urlsplit(self.path).path)
        if self.hub.private is not None and token != f"Bearer {self.hub.private}":
            self._json({"error": "a token is needed"}, 401, {"X-Error-Code": "GatedRepo"}, body)
        elif path.startswith("/api/models/"):
            what = "/tree/" if "/tree/" in path else "/revision/"
            repo, _, revision = path.removeprefix("/api/models/").partition(what)
            folder = self.hub.folder(repo, revision or "main")
            if folder is None:
                self._json({"error": "no such revision"}, 404, {"X-Error-Code": "RevisionNotFound"}, body)
                return
            files = {str(file.relative_to(folder)): file for file in sorted(folder.rglob("*")) if file.is_file()}
            tree = [{"type": "file", "path": n, "size": f.stat().st_size, "oid": _hash(f)} for n, f in files.items()]
            facts = {"id": repo, "sha": self.hub.commit(folder), "siblings": [{"rfilename": name} for name in files]}
            self._json(tree if what == "/tree/" else facts, body=body)
        else:
            repo, _, rest = path.removeprefix("/").partition("/resolve/")
            revision, _, name = rest.partition("/")
            self._file(self.hub.folder(repo, revision), name, body)

    def _file(self, folder: Path | None, name: str, body: bool) -> None:
        if folder is None or not (folder / name).is_file():
            self._json({"error": "no such file"}, 404, {"X-Error-Code": "EntryNotFound"}, body)
            return
        data = (folder / name).read_bytes()
        headers = {"X-Repo-Commit": self.hub.commit(folder), "ETag": f'"{_hash(folder / name)}"'}
        if body:
            self.hub.fetched.append(name)
        self._send(data, 200, headers, body)

    def _json(self, value: object, status: int = 200, headers: dict[str, str] | None = None, body: bool = True) -> None:
        self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})}, body)

    def _send(self, data: bytes, status: int, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


def _hash(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()


@contextmanager
def serve(hub: LocalHub) -> Iterator[str]:
    """Run a hub; gives its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
