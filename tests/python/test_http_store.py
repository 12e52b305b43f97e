"""Data on a plain web server: files by their names, read by ranges."""

import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import superbatch
from cluster import Process

from examples.demo import tiny


class Files(BaseHTTPRequestHandler):
    """Serves the files of `server.folder`, whole or by range, as object stores' web fronts do."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers.get("Range")))
        path = self.server.folder / self.path.lstrip("/")
        if not path.is_file():
            return self.end(404, b"")
        content, last = path.read_bytes(), path.stat().st_mtime
        headers = {
            "Last-Modified": self.date_time_string(last),
            "ETag": f'"{last}-{len(content)}"',
            "Accept-Ranges": "bytes",
        }
        found = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not found:
            return self.end(200, content, **headers)
        first, end = found.groups()
        begin = int(first) if first else len(content) - int(end)
        until = min(int(end) + 1 if first and end else len(content), len(content))
        headers["Content-Range"] = f"bytes {begin}-{until - 1}/{len(content)}"
        self.end(206, content[begin:until], **headers)

    do_HEAD = do_GET

    def do_PROPFIND(self) -> None:
        self.end(405, b"")

    def end(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def files(tmp_path) -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Files)
    server.folder, server.asked = tmp_path, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def service(tmp_path) -> Iterator[Process]:
    process = Process(
        tmp_path,
        "web",
        "serve",
        {
            "listen": "127.0.0.1:0",
            "metrics_listen": "127.0.0.1:0",
            "page_listen": None,
            "state": (tmp_path / "state").as_uri(),
            "storage": {"options": {"allow_http": True}},
        },
    )
    yield process
    process.stop()


def opened(service: Process, run_id: str, sources: list[str]) -> superbatch.Run:
    phase = superbatch.Phase(policy="uniform", super_batch_size=64, sub_batch_size=32)
    spec = superbatch.RunSpec(run_id=run_id, sources=sources, phases=[phase], seed=3)
    return superbatch.connect(service.address).open_run(spec)


def rows(run: superbatch.Run) -> list:
    batches = [run.select(step, rank=0, world_size=1) for step in range(3)]
    return [(batch["caption"].to_pylist(), batch["image"].to_pylist()) for batch in batches]


def shards(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.parquet"))


def test_files_of_a_web_server_give_what_files_give(tmp_path, files, service):
    pool = tiny.write_dataset(tmp_path / "pool", rows=256)
    web = f"http://127.0.0.1:{files.server_address[1]}/pool"
    names = shards(pool)
    expected = rows(opened(service, "files", [(pool / name).as_uri() for name in names]))
    assert rows(opened(service, "web", [f"{web}/{name}" for name in names])) == expected
    whole = [path for path, asked in files.asked if path.endswith(".parquet") and not asked]
    assert len(whole) <= len(names), "rows are read by range; names are looked up once"


def test_what_is_not_there_or_cannot_be_listed_is_refused_by_name(tmp_path, files, service):
    tiny.write_dataset(tmp_path / "pool", rows=64)
    web = f"http://127.0.0.1:{files.server_address[1]}/pool"
    with pytest.raises(superbatch.Error, match=r"there is nothing at .*absent\.parquet"):
        opened(service, "absent", [f"{web}/absent.parquet"])
    with pytest.raises(superbatch.Error, match="does not list .*/pool; name its files") as caught:
        opened(service, "listed", [web])
    assert caught.value.reason == "INVALID_ARGUMENT", "a reason that is not tried again"
