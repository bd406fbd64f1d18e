"""A stand-in for the Hub on the loopback interface: the parts of its HTTP interface that adapters meet.

Speaks what `huggingface_hub` calls to make a repository, commit to it and read from it: small files travel inside the
commit, weights through Git LFS; reading a weight redirects to its storage. Keeps everything in memory. Knows nothing
of models, and nothing of Xet: clients must set `HF_HUB_DISABLE_XET=1`.
"""

import base64
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_stand_in"
LFS_SUFFIXES = (".safetensors", ".bin")
REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"


@dataclass(frozen=True)
class Commit:
    """One state of a repository.

    Attributes:
        oid (`str`): 40 hexadecimal digits.
        message (`str`): Its summary.
        files (`dict[str, bytes]`): All files by path.
    """

    oid: str
    message: str
    files: dict[str, bytes]


@dataclass
class Repository:
    """Commits, oldest first, and branches, each the index of its last commit.

    A private one needs a token. Of a gated one nobody may read files.
    """

    private: bool = False
    gated: bool = False
    commits: list[Commit] = field(default_factory=list)
    branches: dict[str, int] = field(default_factory=dict)

    def commit(self, branch: str, message: str, changed: dict[str, bytes]) -> Commit:
        """Adds a commit on top of `branch`."""
        files = {**(self.at(branch).files if branch in self.branches else {}), **changed}
        oid = hashlib.sha1(repr((len(self.commits), message, sorted(files.items()))).encode()).hexdigest()
        self.commits.append(Commit(oid, message, files))
        self.branches[branch] = len(self.commits) - 1
        return self.commits[-1]

    def at(self, revision: str) -> Commit | None:
        """The commit that a branch or an oid names."""
        if revision in self.branches:
            return self.commits[self.branches[revision]]
        return next((commit for commit in self.commits if commit.oid == revision), None)


class HubStandIn:
    """The server. A context manager, in which it answers at `endpoint`.

    Attributes:
        endpoint (`str`): For the environment variable `HF_ENDPOINT`.
        storage_endpoint (`str`): Where objects of Git LFS go and come from.
        repositories (`dict[str, Repository]`): By name.
        storage (`dict[str, bytes]`): Objects of Git LFS by their SHA-256.
        requests (`list[str]`): Method and path of each request.
        unknown (`list[str]`): Those that it has no answer to.
    """

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.storage: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.unknown: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        # Another origin, as on the Hub: clients read the metadata off the redirect, and send no token there.
        self.storage_endpoint = f"http://localhost:{self._server.server_port}/storage"

    def __enter__(self) -> "HubStandIn":
        Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add(self, name: str, files: dict[str, bytes]) -> Repository:
        """Makes a repository that has `files`."""
        repository = self.repositories[name] = Repository()
        repository.commit("main", "initial commit", files)
        self.storage |= {_sha256(content): content for path, content in files.items() if path.endswith(LFS_SUFFIXES)}
        return repository

    def add_folder(self, name: str, folder: Path) -> Repository:
        """Makes a repository of the files in a folder."""
        files = [path for path in folder.rglob("*") if path.is_file()]
        return self.add(name, {path.relative_to(folder).as_posix(): path.read_bytes() for path in files})


class _Refusal(Exception):
    """An answer other than success: a status, and the code by which clients tell one 404 from another."""

    def __init__(self, status: int, code: str, message: str | None = None):
        self.status, self.code, self.message = status, code, message or code


class _Handler(BaseHTTPRequestHandler):
    hub: HubStandIn
    protocol_version = "HTTP/1.1"

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        request = f"{self.command} {path}"
        self.hub.requests.append(request)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            for methods, pattern, action in _ROUTES:
                if self.command in methods.split() and (match := re.fullmatch(pattern, path)):
                    return action(self, **match.groupdict())
            self.hub.unknown.append(request)
            raise _Refusal(501, "NotInThisStandIn")
        except _Refusal as refusal:
            self._send(refusal.status, b"{}", {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message})

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    def _send(self, status: int, content: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _send_json(self, document: object, status: int = 200) -> None:
        self._send(status, json.dumps(document).encode(), {"Content-Type": "application/json"})

    def log_message(self, *args) -> None:
        """Nothing on the terminal; `HubStandIn.requests` has it."""

    def _repository(self, name: str) -> Repository:
        if name not in self.hub.repositories:
            raise _Refusal(404, "RepoNotFound")
        if self.hub.repositories[name].private:
            self._need_token("RepoNotFound")  # as the Hub says it, which keeps even the name to itself
        return self.hub.repositories[name]

    def _commit_at(self, repo: str, revision: str) -> Commit:
        commit = self._repository(repo).at(revision)
        if commit is None:
            raise _Refusal(404, "RevisionNotFound")
        return commit

    def _need_token(self, code: str = "Unauthorized") -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise _Refusal(401, code)

    # ---------------------------------------------------------------- writing

    def create_repo(self) -> None:
        self._need_token()
        wanted = json.loads(self.body)
        name = f"{wanted['organization'] or 'me'}/{wanted['name']}"
        exists = name in self.hub.repositories
        if not exists:
            self.hub.add(name, {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"})
            private = wanted.get("private") or wanted.get("visibility") == "private"
            self.hub.repositories[name].private = bool(private)
        self._send_json({"url": f"{self.hub.endpoint}/{name}", "id": name}, status=409 if exists else 200)

    def create_branch(self, repo: str, branch: str) -> None:
        self._need_token()
        repository = self._repository(repo)
        if branch in repository.branches:
            return self._send_json({"error": "branch exists"}, status=409)
        repository.branches[branch] = repository.branches["main"]
        self._send_json({})

    def validate_yaml(self) -> None:
        try:
            metadata = yaml.safe_load(json.loads(self.body)["content"].split("---")[1])
        except (yaml.YAMLError, IndexError) as error:
            return self._send_json({"errors": [{"message": str(error)}], "warnings": []}, status=400)
        known = isinstance(metadata, dict) and "library_name" in metadata
        self._send_json({"errors": [], "warnings": [] if known else [{"message": "empty or missing metadata"}]})

    def preupload(self, repo: str, revision: str) -> None:
        self._need_token()
        self._commit_at(repo, revision)
        paths = [file["path"] for file in json.loads(self.body)["files"]]
        modes = {path: "lfs" if path.endswith(LFS_SUFFIXES) else "regular" for path in paths}
        self._send_json(
            {"files": [{"path": path, "uploadMode": modes[path], "shouldIgnore": False} for path in paths]}
        )

    def lfs_batch(self, repo: str) -> None:
        self._need_token()
        self._repository(repo)
        answer = [{"oid": wanted["oid"], "size": wanted["size"]} for wanted in json.loads(self.body)["objects"]]
        for wanted in answer:
            if wanted["oid"] not in self.hub.storage:
                wanted["actions"] = {"upload": {"href": f"{self.hub.storage_endpoint}/{wanted['oid']}"}}
        self._send_json({"transfer": "basic", "objects": answer})

    def store(self, oid: str) -> None:
        if _sha256(self.body) != oid:
            raise _Refusal(400, "BadDigest")
        self.hub.storage[oid] = self.body
        self._send(200)

    def commit(self, repo: str, revision: str) -> None:
        self._need_token()
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        changed = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                changed[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                changed[value["path"]] = self._stored(value["oid"])
        repository, answer = self._repository(repo), {}
        if "create_pr=1" in urlsplit(self.path).query:
            answer["pullRequestUrl"] = f"{self.hub.endpoint}/{repo}/discussions/1"
            repository.branches["refs/pr/1"] = repository.branches[revision]
            revision = "refs/pr/1"
        commit = repository.commit(revision, header["summary"], changed)
        url = f"{self.hub.endpoint}/{repo}/commit/{commit.oid}"
        self._send_json({"commitUrl": url, "commitOid": commit.oid, **answer})

    def _stored(self, oid: str) -> bytes:
        if oid not in self.hub.storage:
            raise _Refusal(400, "LfsObjectMissing")
        return self.hub.storage[oid]

    # ---------------------------------------------------------------- reading

    def model_info(self, repo: str, revision: str = "main") -> None:
        commit = self._commit_at(repo, revision)
        siblings = [{"rfilename": path} for path in commit.files]
        card = commit.files.get("README.md", b"").decode().split("---")
        about = {"cardData": yaml.safe_load(card[1])} if len(card) > 2 else {}
        self._send_json({"id": repo, "modelId": repo, "sha": commit.oid, "siblings": siblings, "tags": [], **about})

    def tree(self, repo: str, revision: str, folder: str = "") -> None:
        commit = self._commit_at(repo, revision)
        files = {path: content for path, content in commit.files.items() if path.startswith(folder)}
        if not files:
            raise _Refusal(404, "EntryNotFound")
        self._send_json([_tree_entry(path, content) for path, content in files.items()])

    def resolve(self, repo: str, revision: str, path: str) -> None:
        commit = self._commit_at(repo, revision)
        if self._repository(repo).gated:
            known = self.headers.get("Authorization") is not None
            message = f"Access to model {repo} is restricted and you are not in the authorized list."
            raise _Refusal(403 if known else 401, "GatedRepo", message)
        if path not in commit.files:
            raise _Refusal(404, "EntryNotFound")
        content = commit.files[path]
        headers = {"X-Repo-Commit": commit.oid}
        if not path.endswith(LFS_SUFFIXES):
            return self._send(200, content, {**headers, "ETag": f'"{_blob_sha1(content)}"'})
        linked = {"X-Linked-Etag": f'"{_sha256(content)}"', "X-Linked-Size": str(len(content))}
        self._send(302, b"", {**headers, **linked, "Location": f"{self.hub.storage_endpoint}/{_sha256(content)}"})

    def fetch(self, oid: str) -> None:
        self._send(200, self._stored(oid), {"ETag": f'"{oid}"'})


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _blob_sha1(content: bytes) -> str:
    """The id that git gives to a file, which is the Hub's ETag of small files."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _tree_entry(path: str, content: bytes) -> dict:
    entry = {"type": "file", "path": path, "size": len(content), "oid": _blob_sha1(content)}
    if path.endswith(LFS_SUFFIXES):
        entry["lfs"] = {"oid": _sha256(content), "size": len(content), "pointerSize": 134}
    return entry


_ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("POST", "/api/repos/create", _Handler.create_repo),
    ("POST", "/api/validate-yaml", _Handler.validate_yaml),
    ("POST", f"/api/models/{REPO}/branch/(?P<branch>.+)", _Handler.create_branch),
    ("POST", f"/api/models/{REPO}/preupload/(?P<revision>.+)", _Handler.preupload),
    ("POST", f"/api/models/{REPO}/commit/(?P<revision>.+)", _Handler.commit),
    ("POST", f"/{REPO}[.]git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", "/storage/(?P<oid>[0-9a-f]{64})", _Handler.store),
    ("GET HEAD", f"/api/models/{REPO}", _Handler.model_info),
    ("GET HEAD", f"/api/models/{REPO}/revision/(?P<revision>.+)", _Handler.model_info),
    ("GET HEAD", f"/api/models/{REPO}/tree/(?P<revision>[^/]+)", _Handler.tree),
    ("GET HEAD", f"/api/models/{REPO}/tree/(?P<revision>[^/]+)/(?P<folder>.+)", _Handler.tree),
    ("GET HEAD", f"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve),
    ("GET HEAD", "/storage/(?P<oid>[0-9a-f]{64})", _Handler.fetch),
]
