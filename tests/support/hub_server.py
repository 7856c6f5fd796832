"""A small Hub on 127.0.0.1 for the tests: what huggingface_hub and diffusers ask of the real one, with files on disk.

    python hub_server.py <folder>       # prints its address, serves until it is killed
    with HubServer(folder) as server:   # in a test; server.url, server.files("user/name"), server.faults, server.requests

Tokens: "writer" is user `user`, "reader" is user `guest` who may read only; anything else is not known.
"""

import base64
import hashlib
import json
import re
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

USERS = {"writer": "user", "reader": "guest"}
LFS_SUFFIXES = (".safetensors", ".bin", ".png", ".parquet")


class HubServer:
    """`faults` are dicts: `match`, a pattern of "METHOD /path"; `skip`, how many matching requests go well first; `times`, how
    many then do not; `do`, a status to answer with, "drop" to cut the connection, or a float, seconds to wait before going on.
    """

    def __init__(self, folder):
        self.blobs = Path(folder)
        self.blobs.mkdir(parents=True, exist_ok=True)
        self.repositories = {}  # (type, id) -> {"branches": {name: commit}, "commits": {commit: {path: entry}}, ...}
        self.requests, self.faults, self.lock = [], [], threading.Lock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.httpd = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.httpd.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.httpd.server_port}"

    def __enter__(self):
        threading.Thread(target=self.httpd.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.httpd.shutdown()
        self.httpd.server_close()

    def store(self, data: bytes) -> str:
        oid = hashlib.sha256(data).hexdigest()
        (self.blobs / oid).write_bytes(data)
        return oid

    def entry(self, path, data=None, sha256=None):
        data = (self.blobs / sha256).read_bytes() if data is None else data
        sha256 = self.store(data)
        git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        return {"sha256": sha256, "size": len(data), "oid": git, "lfs": path.endswith(LFS_SUFFIXES)}

    def create(self, repo_id, repo_type="model", private=False):
        repository = {"branches": {}, "commits": {}, "private": private, "pull_requests": 0, "log": []}
        self.repositories[repo_type, repo_id] = repository
        self.commit(repository, "main", {}, "initial commit")
        return repository

    def commit(self, repository, branch, files, message):
        parent = repository["branches"].get(branch, "")
        oid = hashlib.sha1(f"{parent}{branch}{message}{time.monotonic_ns()}".encode()).hexdigest()
        repository["commits"][oid], repository["branches"][branch] = files, oid
        repository["log"].append((branch, message))
        return oid

    def files(self, repo_id, branch="main", repo_type="model") -> dict[str, bytes]:
        repository = self.repositories[repo_type, repo_id]
        head = repository["commits"][repository["branches"][branch]]
        return {path: (self.blobs / entry["sha256"]).read_bytes() for path, entry in head.items()}

    def fault(self, request):
        with self.lock:
            for fault in self.faults:
                if re.search(fault["match"], request):
                    if fault.get("skip", 0) > 0:
                        fault["skip"] -= 1
                    elif fault.get("times", 1) > 0:
                        fault["times"] = fault.get("times", 1) - 1
                        return fault["do"]
        return None


class _Problem(Exception):
    def __init__(self, status, message, code=None):
        self.status, self.message, self.code = status, message, code


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def _serve(self):
        length = int(self.headers.get("Content-Length", 0))
        self.body = self.rfile.read(length) if length else b""
        url = urlsplit(self.path)
        self.query, self.route = parse_qs(url.query), unquote(url.path)
        self.hub.requests.append((self.command, self.route, self.headers.get("Authorization")))
        fault = self.hub.fault(f"{self.command} {self.route}")
        if fault == "drop":
            self.close_connection = True
            self.connection.close()
            return
        if isinstance(fault, float):
            time.sleep(fault)
        try:
            if isinstance(fault, int):
                raise _Problem(fault, f"fault {fault}")
            for method, pattern, name in ROUTES:
                match = re.fullmatch(pattern, self.route)
                if match and self.command in method.split():
                    return getattr(self, name)(**match.groupdict())
            raise _Problem(404, f"{self.command} {self.route} is not of this server")
        except _Problem as problem:
            headers = {"X-Error-Code": problem.code, "X-Error-Message": problem.message} if problem.code else {}
            self._json({"error": problem.message}, problem.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _json(self, value, status=200, headers=None):
        self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def _send(self, data, status=200, headers=None):
        self.send_response(status)
        headers = {"Content-Length": str(len(data)), **(headers or {})}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # who asks, and what for

    def _user(self):
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and token not in USERS:
            raise _Problem(401, "Invalid username or password.")
        return USERS.get(token)

    def _writer(self, repo_id):
        user = self._user()
        if user is None:
            raise _Problem(401, "Invalid username or password.")
        if repo_id.split("/")[0] != user or user == "guest":
            raise _Problem(403, f"You don't have the rights to write to {repo_id}")

    def _repository(self, repo_id, type="model"):
        user = self._user()
        repository = self.hub.repositories.get((type, repo_id))
        if repository is None or (repository["private"] and user != repo_id.split("/")[0]):
            raise _Problem(404 if user else 401, "Repository not found", "RepoNotFound")
        return repository

    def _commit(self, repository, revision):
        commit = repository["branches"].get(revision, revision)
        if commit not in repository["commits"]:
            raise _Problem(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit, repository["commits"][commit]

    # the interface for programs

    def whoami(self):
        user = self._user()
        if user is None:
            raise _Problem(401, "Invalid username or password.")
        self._json({"type": "user", "name": user, "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def create(self):
        asked = json.loads(self.body)
        owner, type = asked.get("organization") or self._user(), asked.get("type") or "model"
        repo_id = f"{owner}/{asked['name']}"
        self._writer(repo_id)
        url = f"{self.hub.url}/{'' if type == 'model' else type + 's/'}{repo_id}"
        if (type, repo_id) in self.hub.repositories:
            return self._json({"error": "You already created this repo", "url": url}, 409)
        self.hub.create(repo_id, type, asked.get("visibility") == "private" or bool(asked.get("private")))
        self._json({"url": url, "name": repo_id, "id": repo_id})

    def validate(self):
        self._json({"errors": [], "warnings": []})

    def info(self, type, repo_id, revision=None):
        repository = self._repository(repo_id, type)
        commit, files = self._commit(repository, revision or "main")
        siblings = [
            {"rfilename": path, **({"size": entry["size"]} if "blobs" in self.query else {})}
            for path, entry in sorted(files.items())
        ]
        date = "2026-01-01T00:00:00.000Z"
        entry_info = {
            "id": repo_id,
            "modelId": repo_id,
            "author": repo_id.split("/")[0],
            "sha": commit,
            "siblings": siblings,
        }
        entry_info |= {"private": repository["private"], "gated": False, "disabled": False, "tags": [], "downloads": 0}
        self._json({**entry_info, "likes": 0, "lastModified": date, "createdAt": date, "cardData": {}})

    def _tree_entry(self, path, entry):
        entry_info = {"type": "file", "path": path, "size": entry["size"], "oid": entry["oid"]}
        return (
            {**entry_info, "lfs": {"oid": entry["sha256"], "size": entry["size"], "pointerSize": 134}}
            if entry["lfs"]
            else entry_info
        )

    def tree(self, type, repo_id, revision, path=None):
        _, files = self._commit(self._repository(repo_id, type), revision)
        prefix = f"{path.strip('/')}/" if path and path.strip("/") else ""
        inside = {name: entry for name, entry in sorted(files.items()) if name.startswith(prefix)}
        if prefix and not inside:
            raise _Problem(404, f"{path} does not exist", "EntryNotFound")
        folders = {name[: name.index("/", len(prefix))] for name in inside if "/" in name[len(prefix) :]}
        recursive = self.query.get("recursive", ["false"])[0].lower() == "true"
        entries = [{"type": "directory", "path": name, "oid": "0" * 40, "size": 0} for name in sorted(folders)]
        entries += [
            self._tree_entry(name, entry)
            for name, entry in inside.items()
            if recursive or "/" not in name[len(prefix) :]
        ]
        self._json(entries)

    def paths_info(self, type, repo_id, revision):
        _, files = self._commit(self._repository(repo_id, type), revision)
        body = self.body.decode()
        asked = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body).get("paths", [])
        asked = [asked] if isinstance(asked, str) else asked
        entries = [self._tree_entry(path, files[path]) for path in asked if path in files]
        folders = [path for path in asked if any(name.startswith(f"{path}/") for name in files)]
        self._json(entries + [{"type": "directory", "path": path, "oid": "0" * 40} for path in folders])

    def refs(self, type, repo_id):
        repository = self._repository(repo_id, type)
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit}
            for name, commit in repository["branches"].items()
        ]
        self._json({"branches": branches, "converts": [], "tags": [], "pullRequests": []})

    def branch(self, type, repo_id, branch):
        self._writer(repo_id)
        repository = self._repository(repo_id, type)
        if branch in repository["branches"]:
            raise _Problem(409, "Reference already exists")
        start = json.loads(self.body or b"{}").get("startingPoint") or "main"
        repository["branches"][branch] = self._commit(repository, start)[0]
        self._json({})

    def delete_branch(self, type, repo_id, branch):
        self._writer(repo_id)
        if self._repository(repo_id, type)["branches"].pop(branch, None) is None:
            raise _Problem(404, "Invalid rev id", "RevisionNotFound")
        self._json({})

    def auth_check(self, type, repo_id):
        self._repository(repo_id, type)
        self._writer(repo_id)
        self._json({})

    # uploading

    def preupload(self, type, repo_id, revision):
        self._writer(repo_id)
        _, files = self._commit(self._repository(repo_id, type), revision)
        answer = []
        for file in json.loads(self.body)["files"]:
            path = file["path"]
            entry_info = files.get(path)
            oid = entry_info and (entry_info["sha256"] if entry_info["lfs"] else entry_info["oid"])
            mode = "lfs" if path.endswith(LFS_SUFFIXES) else "regular"
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **({"oid": oid} if oid else {})})
        self._json({"files": answer})

    def lfs_batch(self, repo_id):
        self._writer(repo_id)
        objects = []
        for asked in json.loads(self.body)["objects"]:
            oid = asked["oid"]
            upload = {"href": f"{self.hub.url}/signed/{oid}?signature=1", "header": {}}
            verify = {"href": f"{self.hub.url}/{repo_id}/verify", "header": {}}
            present = (self.hub.blobs / oid).is_file()
            objects.append({**asked, **({} if present else {"actions": {"upload": upload, "verify": verify}})})
        self._json({"transfer": "basic", "objects": objects})

    def store_upload(self, oid):
        if self.headers.get("Authorization"):
            raise _Problem(400, "Only one auth mechanism allowed")
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _Problem(400, "BadDigest")
        self.hub.store(self.body)
        self._send(b"", headers={"ETag": f'"{oid}"'})

    def verify(self, repo_id):
        self._writer(repo_id)
        asked = json.loads(self.body)
        blob = self.hub.blobs / asked["oid"]
        if not blob.is_file() or blob.stat().st_size != asked["size"]:
            raise _Problem(404, "not uploaded")
        self._json({})

    def commit(self, type, repo_id, revision):
        self._writer(repo_id)
        repository = self._repository(repo_id, type)
        parent, files = self._commit(repository, revision)
        files, header = dict(files), {}
        for line in self.body.splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header":
                header = value
            elif key == "file":
                files[value["path"]] = self.hub.entry(value["path"], base64.b64decode(value["content"]))
            elif key == "lfsFile":
                if not (self.hub.blobs / value["oid"]).is_file():
                    raise _Problem(400, f"{value['path']} was not uploaded")
                files[value["path"]] = self.hub.entry(value["path"], sha256=value["oid"])
            elif key == "deletedFile" and files.pop(value["path"], None) is None:
                raise _Problem(400, f"A file with this name doesn't exist: {value['path']}")
        if header.get("parentCommit", parent) != parent:
            raise _Problem(412, "A commit has happened since")
        request = None
        if self.query.get("create_pr") == ["1"]:
            repository["pull_requests"] += 1
            revision = f"refs/pr/{repository['pull_requests']}"
            repository["branches"][revision] = parent
            request = f"{self.hub.url}/{repo_id}/discussions/{repository['pull_requests']}"
        oid = self.hub.commit(repository, revision, files, header["summary"])
        url = f"{self.hub.url}/{repo_id}/commit/{oid}"
        self._json({"success": True, "commitOid": oid, "commitUrl": url, "pullRequestUrl": request, "hookOutput": ""})

    # downloading

    def resolve(self, repo_id, revision, path, type="model"):
        type = (type or "model").rstrip("s/")
        commit, files = self._commit(self._repository(repo_id, type), revision)
        if path not in files:
            raise _Problem(404, "Entry not found", "EntryNotFound")
        entry = files[path]
        data = (self.hub.blobs / entry["sha256"]).read_bytes()
        etag = entry["sha256"] if entry["lfs"] else entry["oid"]
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if entry["lfs"]:
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(entry["size"])}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked and self.command == "GET":
            first, last = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            return self._send(data[first : last + 1], 206, headers)
        self._send(data, 200, headers)


ID, TYPE, REVISION = r"(?P<repo_id>[\w.-]+/[\w.-]+)", r"(?P<type>model|dataset)s", r"(?P<revision>refs/pr/\d+|[^/]+)"
ROUTES = [
    ("GET", "/api/whoami-v2", "whoami"),
    ("POST", "/api/repos/create", "create"),
    ("POST", "/api/validate-yaml", "validate"),
    ("GET", f"/api/{TYPE}/{ID}", "info"),
    ("GET", f"/api/{TYPE}/{ID}/auth-check/write", "auth_check"),
    ("GET", f"/api/{TYPE}/{ID}/revision/{REVISION}", "info"),
    ("GET", f"/api/{TYPE}/{ID}/tree/{REVISION}(?P<path>/.*)?", "tree"),
    ("POST", f"/api/{TYPE}/{ID}/paths-info/{REVISION}", "paths_info"),
    ("GET", f"/api/{TYPE}/{ID}/refs", "refs"),
    ("POST", f"/api/{TYPE}/{ID}/branch/(?P<branch>.+)", "branch"),
    ("DELETE", f"/api/{TYPE}/{ID}/branch/(?P<branch>.+)", "delete_branch"),
    ("POST", f"/api/{TYPE}/{ID}/preupload/{REVISION}", "preupload"),
    ("POST", f"/api/{TYPE}/{ID}/commit/{REVISION}", "commit"),
    ("POST", f"/(?:datasets/)?{ID}\\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/signed/(?P<oid>[0-9a-f]{64})", "store_upload"),
    ("POST", f"/{ID}/verify", "verify"),
    ("GET HEAD", f"/(?P<type>datasets/)?{ID}/resolve/{REVISION}/(?P<path>.+)", "resolve"),
]

if __name__ == "__main__":
    server = HubServer(sys.argv[1])
    print(server.url, flush=True)
    server.httpd.serve_forever()
