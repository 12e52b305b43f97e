"""A server that speaks the routes of the Hugging Face hub by which data sets are read, with a CDN
on a port of its own. That it is what the hub's own client expects is tested beside it.
"""

import hashlib
import json
import re
import threading
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

TOKEN = "hf_thetokenofthetests"
#: Files of a page of a listing; the hub has a thousand.
PAGE = 3
#: Endings of files that the hub keeps in its CDN.
LARGE = (".parquet", ".tar")


@dataclass
class Repository:
    """A data set: its commits, each a name of content for every path, and its branches."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def push(self, files: dict[str, bytes], branch: str = "main") -> str:
        names = "".join(f"{path} {oid(content)}\n" for path, content in sorted(files.items()))
        commit = hashlib.sha1(f"{len(self.commits)}\n{names}".encode()).hexdigest()
        self.commits[commit], self.branches[branch] = files, commit
        return commit

    def push_folder(self, folder: Path, at: str = "data", branch: str = "main") -> str:
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        names = {path: path.relative_to(folder).as_posix() for path in paths}
        return self.push({f"{at}/{names[path]}": path.read_bytes() for path in paths}, branch)

    def commit(self, revision: str) -> str | None:
        """The hub knows converted data by a short name too."""
        revision = revision.replace("~", "refs/convert/")
        return self.branches.get(revision, revision if revision in self.commits else None)


def oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def note(self) -> None:
        said = self.headers.get("Authorization")
        self.server.asked.append((self.command, self.path, said, self.headers.get("Range")))

    def end(self, status: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def end_with_file(self, content: bytes, etag: str, **headers: str) -> None:
        """The whole of a file, or the range that is asked for."""
        headers = {"ETag": f'"{etag}"', "Accept-Ranges": "bytes", **headers}
        found = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not found:
            return self.end(200, content, **headers)
        first, last = found.groups()
        begin = int(first) if first else len(content) - int(last)
        end = min(int(last) + 1 if first and last else len(content), len(content))
        if begin >= len(content):
            return self.end(416, Content_Range=f"bytes */{len(content)}")
        headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(content)}"
        self.end(206, content[begin:end], **headers)

    def log_message(self, *_) -> None:
        pass


class Cdn(Handler):
    """Serves content by its SHA-256 to whoever has a signature, for reading and not for looking."""

    def do_GET(self) -> None:
        self.note()
        url = urlsplit(self.path)
        content = self.server.contents.get(url.path.lstrip("/"))
        if content is None or parse_qs(url.query).get("Signature") != ["signed"]:
            return self.end(403, b"<Error>SignatureDoesNotMatch Signature=signed</Error>")
        self.end_with_file(content, "of-the-cdn")

    def do_HEAD(self) -> None:
        self.note()
        self.end(403)


class Front(Handler):
    """The hub itself."""

    def do_GET(self) -> None:
        self.note()
        if self.server.throttled > 0:
            self.server.throttled -= 1
            return self.end(429, b"slow down", **self.server.throttled_headers)
        url = urlsplit(self.path)
        if found := re.fullmatch(r"/api/resolve-cache/(\w+)", url.path):
            content = self.server.contents[found[1]]
            return self.end_with_file(content, found[1])
        route = r"(/api)?/datasets/([^/]+/[^/]+)(?:/(revision|tree|resolve)/([^/]+)(?:/(.*))?)?"
        found = re.fullmatch(route, url.path)
        if not found:
            return self.end(404)
        api, name, action, revision, path = found.groups()
        repository = self.server.repositories.get(name)
        if self.denied(repository):
            return
        revision = unquote(revision or "main")
        commit = repository.commit(revision)
        if commit is None:
            return self.fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files, path = repository.commits[commit], unquote(path or "")
        if action == "resolve" and not api:
            return self.resolve(files, path, commit)
        if action == "tree" and api:
            return self.tree(files, path, url)
        self.json({"id": name, "sha": commit})

    do_HEAD = do_GET

    def denied(self, repository: Repository | None) -> bool:
        """What the hub answers to those who may not read: it does not say what there is."""
        said = self.headers.get("Authorization")
        if said not in (None, f"Bearer {TOKEN}"):
            self.fail(401, None, "Invalid credentials in Authorization header")
        elif repository is None or (repository.private and said is None):
            self.fail(404 if said else 401, "RepoNotFound", "Repository not found")
        elif repository.gated:
            self.fail(403 if said else 401, "GatedRepo", "Access to this dataset is restricted.")
        else:
            return False
        return True

    def fail(self, status: int, code: str | None, message: str) -> None:
        code = {"X-Error-Code": code} if code else {}
        content = json.dumps({"error": message}).encode()
        self.end(status, content, **code, **{"X-Error-Message": message})

    def json(self, found: object, **headers: str) -> None:
        self.end(200, json.dumps(found).encode(), Content_Type="application/json", **headers)

    def resolve(self, files: dict[str, bytes], path: str, commit: str) -> None:
        content = files.get(path)
        if content is None:
            return self.fail(404, "EntryNotFound", "Entry not found")
        headers = {"X-Repo-Commit": commit}
        if not path.endswith(LARGE):
            # On the same host, by a relative address.
            self.server.contents[oid(content)] = content
            headers["X-Linked-ETag"] = f'"{oid(content)}"'
            location = f"/api/resolve-cache/{oid(content)}?{quote(path)}="
            return self.end(307, Location=location, **headers)
        digest = sha256(content)
        self.server.contents[digest] = content
        headers |= {"X-Linked-ETag": f'"{digest}"', "X-Linked-Size": str(len(content))}
        location = f"{self.server.cdn}/{digest}?Signature=signed"
        self.end(302, b"Found. Redirecting", Location=location, **headers)

    def tree(self, files: dict[str, bytes], folder: str, url) -> None:
        below = f"{folder}/" if folder else ""
        inside = {path: content for path, content in files.items() if path.startswith(below)}
        if folder and not inside:
            return self.fail(404, "EntryNotFound", f"{folder} does not exist")
        query = parse_qs(url.query)
        is_recursive = query.get("recursive", [""])[0].lower() in ("true", "1")
        entries = {}
        for path, content in sorted(inside.items()):
            parts = path.split("/")
            for depth in range(below.count("/") + 1, len(parts)):
                name = "/".join(parts[:depth])
                entries[name] = {"type": "directory", "path": name, "size": 0, "oid": "0" * 40}
            entries[path] = described(path, content)
        if not is_recursive:
            entries = {
                path: entry for path, entry in entries.items() if "/" not in path[len(below) :]
            }
        first = int(query.get("cursor", ["0"])[0])
        page = [entries[path] for path in sorted(entries)][first : first + PAGE]
        link = {}
        if first + PAGE < len(entries):
            recursive = query.get("recursive", ["false"])[0]
            following = f"?recursive={recursive}&cursor={first + PAGE}"
            link["Link"] = f'<{self.server.address}{url.path}{following}>; rel="next"'
        self.json(page, **link)


def described(path: str, content: bytes) -> dict:
    entry = {"type": "file", "path": path, "size": len(content), "oid": oid(content)}
    if path.endswith(LARGE):
        pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize %d\n"
        pointer %= (sha256(content).encode(), len(content))
        entry["oid"] = oid(pointer)
        large = {"oid": sha256(content), "size": len(content), "pointerSize": len(pointer)}
        entry["lfs"] = large
    return entry


class Hub(AbstractContextManager):
    """The hub and its CDN, which see who asks what: method, path, token, range."""

    def __init__(self):
        self.cdn = ThreadingHTTPServer(("127.0.0.1", 0), Cdn)
        self.front = ThreadingHTTPServer(("127.0.0.1", 0), Front)
        for server in (self.cdn, self.front):
            server.asked, server.address = [], f"http://127.0.0.1:{server.server_address[1]}"
            threading.Thread(target=server.serve_forever, daemon=True).start()
        self.front.cdn, self.front.throttled = self.cdn.address, 0
        self.front.throttled_headers = {"Retry-After": "0"}
        self.front.repositories = {}
        self.front.contents = self.cdn.contents = {}

    @property
    def endpoint(self) -> str:
        return self.front.address

    def repository(self, name: str, **settings) -> Repository:
        return self.front.repositories.setdefault(name, Repository(**settings))

    def asked(self) -> list[tuple[str, str, str | None, str | None]]:
        """What the hub itself was asked since the last call."""
        asked, self.front.asked = self.front.asked, []
        return asked

    def environment(self, token: str | None = TOKEN, **more: str) -> dict[str, str]:
        """For processes that are to read from this hub."""
        return {
            "HF_HUB_OFFLINE": "0",
            "HF_ENDPOINT": self.endpoint,
            "HF_TOKEN": token or "",
            "HF_HOME": "/nonexistent",
            **more,
        }

    def __exit__(self, *_) -> None:
        for server in (self.front, self.cdn):
            server.shutdown()
            server.server_close()
