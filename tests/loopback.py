"""A Hub on the loopback address: as much of the Hub's interface as huggingface_hub asks for, over folders.

    with loopback.serve() as served:              served.endpoint goes into HF_ENDPOINT
        served.add("some/model", folder)          its files, as revision main
        served.add_cache(home)                    all that a cache such as `stand_ins.build` writes holds

As on the real one, large files (weights, tables) are told by their sha256 and given from another address, by
ranges where asked; anybody may list a gated repository. What goes wrong is set per test: `gated` ids, `wrong`
(status, code) of every answer, `served_instead` of a file, and `cuts`: after how many bytes each next answer that
gives a file breaks off.
"""

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".bin", ".parquet")


class Hub:
    """What is served, what goes wrong, and what was asked."""

    def __init__(self):
        self.endpoint = self.elsewhere = ""
        self.repositories = {}  # (kind, id) -> revision -> file -> its path
        self.gated, self.wrong, self.served_instead, self.cuts = set(), None, {}, {}
        self.asked = []  # (method, path, the bytes asked for)

    def add(self, name: str, folder: Path, revision: str = "main", kind: str = "models") -> None:
        """Serve the files of a folder."""
        files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        self.repositories.setdefault((kind, name), {})[revision] = files

    def add_cache(self, home: Path) -> None:
        """Serve every revision that is in a cache."""
        for folder in (home / "hub").iterdir():
            kind, *name = folder.name.split("--")
            for reference in (path for path in (folder / "refs").rglob("*") if path.is_file()):
                revision = reference.relative_to(folder / "refs").as_posix()
                self.add("/".join(name), folder / "snapshots" / reference.read_text(), revision, kind)

    def given(self, file: str) -> list[str]:
        """The ranges in which the content of a file was asked for, "" for all of it."""
        held = [files for revisions in self.repositories.values() for files in revisions.values()]
        large = {_digest(files[file]) for files in held if file in files}
        return [part for how, path, part in self.asked if how == "GET" and path.rpartition("/")[2] in {file, *large}]


@contextmanager
def serve():
    """A Hub that answers while the block runs."""
    served = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": served}))
    served.endpoint, served.elsewhere = (f"http://{host}:{server.server_port}" for host in ("127.0.0.1", "localhost"))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()


def _digest(path: Path) -> str:
    """The sha256 of a file; of one in a cache the name of its blob."""
    return path.resolve().name if path.is_symlink() else hashlib.sha256(path.read_bytes()).hexdigest()


def _commit(name: str, revision: str) -> str:
    return hashlib.sha1(f"{name} {revision}".encode()).hexdigest()


class _Refused(Exception):
    """(status, code) of an answer."""


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_GET(self):
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        self.hub.asked.append((self.command, "/".join(parts), self.headers.get("Range", "")))
        try:
            if self.hub.wrong:
                raise _Refused(*self.hub.wrong)
            if parts[0] == "large":
                self._give(*self._large(parts[1]), {})
            elif parts[0] == "api":
                self._answer(200, json.dumps(self._told(parts[1], "/".join(parts[2:4]), parts[4:])).encode())
            else:
                kind, *parts = parts if parts[0] == "datasets" else ["models", *parts]
                self._resolve(kind, "/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        except _Refused as refused:
            status, code = refused.args
            self._answer(status, b"", {"X-Error-Code": code} if code else {})

    do_HEAD = do_GET

    def _revision(self, kind: str, name: str, revision: str) -> tuple[str, dict[str, Path]]:
        """The commit and the files of a revision."""
        if (kind, name) not in self.hub.repositories:
            raise _Refused(401, "RepoNotFound")  # so that nobody learns what is private
        revisions = self.hub.repositories[kind, name]
        found = next((one for one in revisions if revision in (one, _commit(name, one))), None)
        if found is None:
            raise _Refused(404, "RevisionNotFound")
        return _commit(name, found), revisions[found]

    def _told(self, kind: str, name: str, rest: list[str]):
        """What the API says of a repository, of a revision, of its files, or of the right to read them."""
        if rest == ["auth-check"]:
            if name in self.hub.gated:
                raise _Refused(403, "GatedRepo")
            return {}
        commit, files = self._revision(kind, name, rest[1] if rest else "main")
        if rest[:1] == ["tree"]:
            return [{"type": "file", "path": file, **self._described(path)} for file, path in files.items()]
        told = {"id": name, "sha": commit, "gated": "manual" if name in self.hub.gated else False}
        listed = [{"rfilename": file, **self._described(path)} for file, path in files.items()]
        return told | {"siblings": [one | {"blobId": one["oid"]} for one in listed]}

    def _described(self, path: Path) -> dict:
        size, digest = path.stat().st_size, _digest(path)
        large = {"lfs": {"oid": digest, "sha256": digest, "size": size, "pointerSize": 130}}
        return {"size": size, "oid": digest[:40]} | (large if path.suffix in LARGE else {})

    def _resolve(self, kind: str, name: str, revision: str, file: str) -> None:
        commit, files = self._revision(kind, name, revision)
        if name in self.hub.gated:
            raise _Refused(403, "GatedRepo")
        if file not in files:
            raise _Refused(404, "EntryNotFound")
        headers, digest = {"X-Repo-Commit": commit}, _digest(files[file])
        if files[file].suffix in LARGE:
            headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(files[file].stat().st_size)}
            self._answer(302, b"", headers | {"Location": f"{self.hub.elsewhere}/large/{digest}"})
        else:
            self._give(file, files[file], headers | {"ETag": f'"{digest[:40]}"'})

    def _large(self, digest: str) -> tuple[str, Path]:
        held = [files for revisions in self.hub.repositories.values() for files in revisions.values()]
        return next((file, path) for files in held for file, path in files.items() if _digest(path) == digest)

    def _give(self, file: str, path: Path, headers: dict) -> None:
        body, status = self.hub.served_instead.get(file) or path.read_bytes(), 200
        if part := self.headers.get("Range"):
            start, status = int(part.removeprefix("bytes=").partition("-")[0]), 206
            headers |= {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"}
            body = body[start:]
        cut = self.hub.cuts[file].pop(0) if self.command == "GET" and self.hub.cuts.get(file) else None
        self._answer(status, body[:cut], headers | {"Content-Length": str(len(body))})

    def _answer(self, status: int, body: bytes, headers: dict | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass
