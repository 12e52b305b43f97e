"""A real S3 server (moto), a proxy before it whose faults are scripted, and processes that use
it.
"""

import json
import os
import re
import subprocess
import sys
import threading
from http.client import HTTPConnection, HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
import pytest
import superbatch
from cluster import BINARY, DEADLINE_SECONDS, Process
from test_end_to_end import inputs, reason, spec  # noqa: F401

BUCKET = "superbatch"


class Store:
    """A real S3 server in a process of its own, with one bucket."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        said = []
        for line in self.process.stderr:
            said.append(line)
            if found := re.search(r"http://127\.0\.0\.1:(\d+)", line):
                self.port = int(found.group(1))
                break
        else:
            raise AssertionError("the S3 server did not come up:\n" + "".join(said))
        # Its access log would fill the pipe.
        threading.Thread(target=self.process.stderr.read, daemon=True).start()
        self.client = boto3.client(
            "s3",
            endpoint_url=f"http://127.0.0.1:{self.port}",
            region_name="us-east-1",
            aws_access_key_id="test",
            aws_secret_access_key="test",
        )
        self.client.create_bucket(Bucket=BUCKET)

    def upload(self, folder: Path) -> None:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.client.upload_file(str(path), BUCKET, path.relative_to(folder).as_posix())

    def keys(self, prefix: str) -> list[str]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        return [item["Key"] for page in pages for item in page.get("Contents", [])]

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


class Proxy(ThreadingHTTPServer):
    """Stands before a store and passes requests on, without the headers `dropped`. What it does to
    PUTs whose path matches:

    hold: waits for `release` before it passes them on. hold_answer: waits after that.
    lose: the first of each path is passed on and its answer lost: the connection ends, or
    (`lose_by="500"`) an error comes.

    It remembers which ranges of objects were asked for.
    """

    daemon_threads = True

    def __init__(
        self,
        port: int,
        dropped: tuple[str, ...] = (),
        hold: str | None = None,
        hold_answer: str | None = None,
        lose: str | None = None,
        lose_by: str = "end",
    ):
        self.store_port, self.dropped, self.lose_by = port, dropped, lose_by
        self.hold, self.hold_answer, self.lose = hold, hold_answer, lose
        self.held, self.release, self.lost = threading.Event(), threading.Event(), set()
        self.ranges: list[tuple[str, str]] = []
        super().__init__(("127.0.0.1", 0), PassOn)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def port(self) -> int:
        return self.server_address[1]

    def wait(self) -> None:
        self.held.set()
        assert self.release.wait(DEADLINE_SECONDS)

    def stop(self) -> None:
        self.release.set()
        self.shutdown()
        self.server_close()


class PassOn(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Head and body of an answer leave together.
    wbufsize = 1 << 16

    def concerns(self, pattern: str | None) -> bool:
        return self.command == "PUT" and bool(pattern) and bool(re.search(pattern, self.path))

    def pass_on(self) -> None:
        body, proxy = self.rfile.read(int(self.headers.get("Content-Length", 0))), self.server
        if self.concerns(proxy.hold):
            proxy.wait()
        if self.command == "GET" and "Range" in self.headers:
            proxy.ranges.append((self.path, self.headers["Range"]))
        upstream = HTTPConnection("127.0.0.1", proxy.store_port)
        headers = {
            name: value for name, value in self.headers.items() if name.lower() not in proxy.dropped
        }
        upstream.request(self.command, self.path, body, headers)
        answer = upstream.getresponse()
        content = answer.read()
        upstream.close()
        if self.concerns(proxy.hold_answer):
            proxy.wait()
        try:
            if self.concerns(proxy.lose) and self.path not in proxy.lost:
                proxy.lost.add(self.path)
                self.lose_answer()
            else:
                self.answer(answer, content)
        except ConnectionError:
            # Whoever asked has gone.
            self.close_connection = True

    def lose_answer(self) -> None:
        self.close_connection = True
        if self.server.lose_by == "500":
            self.send_response(500)
            self.send_header("Content-Length", "0")
            self.end_headers()

    def answer(self, answer: HTTPResponse, content: bytes) -> None:
        self.send_response(answer.status)
        # A HEAD's length is the object's; nothing follows it.
        length = (
            answer.getheader("Content-Length", "0") if self.command == "HEAD" else str(len(content))
        )
        for name, value in answer.getheaders():
            if name.lower() not in ("connection", "content-length", "transfer-encoding"):
                self.send_header(name, value)
        self.send_header("Content-Length", length)
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = pass_on

    def log_message(self, *_) -> None:
        pass


@pytest.fixture(scope="module")
def store(inputs):
    store = Store()
    store.upload(inputs)
    yield store
    store.stop()


@pytest.fixture
def proxy(store):
    """Makes proxies before the store."""
    made = []

    def make(**settings) -> Proxy:
        made.append(Proxy(store.port, **settings))
        return made[-1]

    yield make
    for one in made:
        one.stop()


def credentials(port: int) -> dict[str, str]:
    """How a deployment tells processes where S3 is and who they are."""
    return {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT": f"http://127.0.0.1:{port}",
        "AWS_ALLOW_HTTP": "true",
    }


def remote(run_id: str, **changes) -> superbatch.RunSpec:
    """The local tests' run, with everything that it reads in the bucket."""
    learner = f"s3://{BUCKET}/learner"
    return spec(
        Path("/"),
        run_id,
        **{
            "sources": [f"s3://{BUCKET}/pool"],
            "reference": f"s3://{BUCKET}/reference",
            "learner": superbatch.Learner(
                model_uri=learner, snapshot_uri=f"{learner}/model.safetensors"
            ),
            **changes,
        },
    )


def command(port: int, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, **credentials(port)}
    return subprocess.run(
        [BINARY, *arguments],
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        env=environment,
    )


def receipts_by_command(port: int, run: str, state: str) -> list[dict]:
    ended = command(port, "receipts", run, "--state", state, "--json")
    assert ended.returncode == 0, ended.stderr
    return [json.loads(line) for line in ended.stdout.splitlines()]


def coordinator(folder: Path, name: str, port: int, state: str, **settings) -> Process:
    return Process(
        folder,
        name,
        "serve",
        {
            "listen": "127.0.0.1:0",
            "metrics_listen": "127.0.0.1:0",
            "page_listen": None,
            "state": state,
            "coordinator": settings,
        },
        credentials(port),
    )


def answer(ask) -> tuple[str, str | None] | None:
    """How a call is refused: the reason, and the owner that it names."""
    try:
        ask()
    except superbatch.Error as error:
        return error.reason, error.metadata.get("owner")
    return None
