"""A hub on this computer: a folder served as the hub serves its repositories, to the client that the project uses.

It knows two answers of the real one that a source can be wrong by: no such repository, no such revision.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

MODELS, DATASETS = "models", "datasets"


def place(root: Path, kind: str, repository: str, revision: str) -> Path:
    """The folder of a repository's files at a revision."""
    return root / kind / repository / revision


@contextmanager
def served(root: Path) -> Iterator[str]:
    """Serve the folder; yields the address that goes into HF_ENDPOINT."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Hub, root))
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, root: Path, *request: object) -> None:
        self.root = root
        super().__init__(*request)  # type: ignore[arg-type]

    def log_message(self, *_: object) -> None:
        """Requests are no output of a test."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[0] == "api":  # /api/datasets/OWNER/NAME/tree/REVISION
            _, kind, owner, name, _, revision = parts
            if folder := self._snapshot(kind, f"{owner}/{name}", revision):
                self._answer(json.dumps([_described(file, folder) for file in _files(folder)]).encode())
            return
        kind = parts.pop(0) if parts[0] == DATASETS else MODELS
        owner, name, _, revision, *member = parts  # /OWNER/NAME/resolve/REVISION/PATH
        if folder := self._snapshot(kind, f"{owner}/{name}", revision):
            content = folder.joinpath(*member).read_bytes()
            self._answer(content, {"X-Repo-Commit": revision, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'})

    def _snapshot(self, kind: str, repository: str, revision: str) -> Path | None:
        for folder, code in (
            (self.root / kind / repository, "RepoNotFound"),
            (place(self.root, kind, repository, revision), "RevisionNotFound"),
        ):
            if not folder.is_dir():
                self._answer(b"", {"X-Error-Code": code}, HTTPStatus.NOT_FOUND)
                return None
        return folder

    def _answer(self, body: bytes, headers: dict[str, str] | None = None, status: HTTPStatus = HTTPStatus.OK) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _described(file: Path, folder: Path) -> dict[str, object]:
    return {
        "type": "file",
        "path": str(file.relative_to(folder)),
        "size": file.stat().st_size,
        "oid": hashlib.sha1(file.read_bytes()).hexdigest(),
    }
