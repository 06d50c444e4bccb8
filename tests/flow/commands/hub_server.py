"""A stand-in for the Hugging Face Hub: the part of its HTTP interface that publishes and fetches models."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_right"


class Hub:
    """Repositories in memory: the files of each commit, and the commit of each branch."""

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}
        self.branches: dict[str, dict[str, str]] = {}
        self.uploads: dict[str, bytes] = {}
        self.accepts_uploads = True
        self.url = ""

    def resolve(self, repository: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Return the commit and the files of a branch or commit."""
        commit = self.branches.get(repository, {}).get(revision, revision)
        matching = [oid for oid in self.commits.get(repository, {}) if oid.startswith(commit)]
        return (matching[0], self.commits[repository][matching[0]]) if matching else None

    def commit(self, repository: str, branch: str, lines: list[dict]) -> str:
        """Store a commit on a branch and return its hash."""
        parent = self.resolve(repository, branch)
        files = dict(parent[1]) if parent else {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.uploads[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        oid = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.commits[repository][oid] = files
        self.branches[repository][branch] = oid
        return oid


class Handler(BaseHTTPRequestHandler):
    """Answers one connection; `hub` is set by the server."""

    hub: Hub

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing."""

    def answer(self, status: int, body: object = None, **headers: str) -> None:
        """Send JSON or bytes."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def refuse(self, code: str) -> None:
        """Send the Hub's response for something that does not exist."""
        self.answer(404, {"error": code}, X_Error_Code=code, X_Error_Message=code)

    def do_GET(self) -> None:
        """Serve a model's information, its list of files, and its files."""
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        repository = "/".join(parts[2:4] if api else parts[:2])
        if repository not in self.hub.commits:
            return self.refuse("RepoNotFound")
        kind, revision = (parts[4], parts[5]) if api and len(parts) > 5 else ("revision", "main")
        if not api:
            revision = parts[3]
        commit = self.hub.resolve(repository, revision)
        if commit is None:
            return self.refuse("RevisionNotFound")
        oid, files = commit
        if not api:
            path = "/".join(parts[4:])
            if path not in files:
                return self.refuse("EntryNotFound")
            etag = f'"{hashlib.sha256(files[path]).hexdigest()}"'
            return self.answer(200, files[path], ETag=etag, X_Repo_Commit=oid)
        if kind == "tree":
            rows = [
                {"type": "file", "path": p, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                for p, c in files.items()
            ]
            return self.answer(200, rows)
        return self.answer(
            200, {"id": repository, "sha": oid, "private": False, "siblings": [{"rfilename": path} for path in files]}
        )

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        """Receive a large file."""
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.hub.uploads[hashlib.sha256(content).hexdigest()] = content
        self.answer(200 if self.hub.accepts_uploads else 403, {})

    def do_POST(self) -> None:
        """Create repositories and branches, describe uploads, and commit."""
        raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts == ["api", "validate-yaml"]:
            front = json.loads(raw)["content"].split("---")[1]
            problems = [] if isinstance(yaml.safe_load(front), dict) else [{"message": "not a mapping"}]
            return self.answer(400 if problems else 200, {"errors": problems, "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid username or password."})
        if parts == ["api", "repos", "create"]:
            body = json.loads(raw)
            repository = f"{body['organization']}/{body['name']}" if body.get("organization") else body["name"]
            if repository in self.hub.commits:
                return self.answer(409, {"error": "it exists", "url": f"{self.hub.url}/{repository}"})
            self.hub.commits[repository], self.hub.branches[repository] = {}, {}
            self.hub.commit(repository, "main", [])
            return self.answer(200, {"url": f"{self.hub.url}/{repository}"})
        if parts[2:] == ["info", "lfs", "objects", "batch"] or parts[-1] == "batch":
            objects = json.loads(raw)["objects"]
            actions = [
                {**o, "actions": {"upload": {"href": f"{self.hub.url}/upload/{o['oid']}", "header": {}}}}
                for o in objects
            ]
            return self.answer(200, {"transfer": "basic", "objects": actions})
        repository, kind, revision = "/".join(parts[2:4]), parts[4], parts[5]
        if repository not in self.hub.commits:
            return self.refuse("RepoNotFound")
        if kind == "branch":
            self.hub.branches[repository].setdefault(revision, self.hub.branches[repository]["main"])
            return self.answer(200, {})
        if kind == "preupload":
            modes = [
                {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"}
                for f in json.loads(raw)["files"]
            ]
            return self.answer(200, {"files": [mode | {"shouldIgnore": False, "oid": None} for mode in modes]})
        oid = self.hub.commit(repository, revision, [json.loads(line) for line in raw.splitlines()])
        commit_url = f"{self.hub.url}/{repository}/commit/{oid}"
        return self.answer(200, {"success": True, "commitOid": oid, "commitUrl": commit_url, "hookOutput": ""})


@contextmanager
def serve() -> Iterator[Hub]:
    """Run the stand-in on a port of this machine."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubHandler", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
