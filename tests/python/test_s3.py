"""Data, models and state on S3, through the real binary against a real S3 server: races, takeovers,
and stores that fail.
"""

import json
import os
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection, HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
import pytest
import superbatch
from cluster import BINARY, DEADLINE_SECONDS, Cluster, Process
from test_end_to_end import (  # noqa: F401
    STEPS,
    choices,
    inputs,
    phase,
    reason,
    service,
    spec,
    train,
    undisturbed,
    weights,
)

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


def test_data_models_and_state_on_s3_give_what_files_give(inputs, store, tmp_path, undisturbed):
    state = f"s3://{BUCKET}/state-of-two"
    with Cluster(tmp_path, workers=2, state=state, environment=credentials(store.port)) as cluster:
        run = superbatch.connect(cluster.address).open_run(remote("remote"))
        assert train(run, inputs) == undisturbed[0]
        assert choices(run) == undisturbed[1]
        assert cluster.coordinator.metric("superbatch_object_store_requests_total") > 0
    keys = store.keys("state-of-two/runs/remote/receipts/")
    assert {
        f"state-of-two/runs/remote/receipts/0/{step}/0.parquet" for step in range(STEPS)
    } <= set(keys)
    assert not store.keys("state-of-two/probe/")
    # What was prepared ahead may have been committed, too.
    shown = receipts_by_command(store.port, "remote", state)[:STEPS]
    assert [[row["id"] for row in receipt["chosen"]] for receipt in shown] == [
        [row[0] for row in step] for step in undisturbed[1]
    ]
    assert [receipt["summary"]["learner"]["step"] for receipt in shown] == [-1, -1, 0, 1]


def test_of_two_coordinators_one_owns_a_run_until_it_dies(inputs, store, tmp_path, undisturbed):
    state = f"s3://{BUCKET}/state-of-rivals"
    rivals = [coordinator(tmp_path, f"rival-{number}", store.port, state) for number in range(2)]

    def open_run(rival: Process):
        try:
            return superbatch.connect(rival.address).open_run(remote("raced"))
        except superbatch.Error as error:
            return error

    try:
        with ThreadPoolExecutor() as threads:
            opened = list(threads.map(open_run, rivals))
        refused = [answer for answer in opened if isinstance(answer, superbatch.Error)]
        assert len(refused) == 1, opened
        loser = opened.index(refused[0])
        owner, heir = rivals[1 - loser], rivals[loser]
        assert refused[0].reason == "NOT_OWNER"
        assert refused[0].metadata["owner"] == owner.address
        run = opened[1 - loser]
        first = train(run, inputs, end=2)
        known = [run.receipt(step) for step in range(2)]
        with pytest.raises(superbatch.Error) as caught:
            superbatch.connect(heir.address).get_run("raced")
        assert reason(caught) == "NOT_OWNER" and owner.address in str(caught.value)

        owner.kill()
        run = superbatch.connect(heir.address).open_run(remote("raced"))
        assert run.next_step >= 2
        assert [run.receipt(step) for step in range(2)] == known
        assert [
            run.select(step, rank=0, world_size=1)["_superbatch_id"].to_pylist()
            for step in range(2)
        ] == first
        assert first + train(run, inputs, start=2) == undisturbed[0]
        assert choices(run) == undisturbed[1]
        shown = receipts_by_command(store.port, "raced", state)
        assert [[row["id"] for row in receipt["chosen"]] for receipt in shown[:2]] == [
            [row.id for row in receipt.chosen] for receipt in known
        ]

        rivals.append(coordinator(tmp_path, "late", store.port, state))
        late = open_run(rivals[-1])
        assert isinstance(late, superbatch.Error) and late.reason == "NOT_OWNER", late
        assert late.metadata["owner"] == heir.address
    finally:
        for rival in rivals:
            rival.stop()


def test_of_two_writers_of_one_receipt_the_first_wins_and_both_serve_its(
    inputs, store, tmp_path, proxy
):
    """The slow writer owned the run when it began to commit; meanwhile another coordinator took the
    run over, because nobody answers at the address that the slow one advertises.
    """
    state = f"s3://{BUCKET}/state-of-writers"
    before = proxy(hold=r"runs/written/receipts/0/0/")
    slow = coordinator(tmp_path, "slow", before.port, state, advertise_address="http://127.0.0.1:1")
    fast = coordinator(tmp_path, "fast", store.port, state)
    try:
        with ThreadPoolExecutor() as threads:
            late = superbatch.connect(slow.address).open_run(remote("written", max_ahead=1))
            waiting = threads.submit(late.select, 0, rank=0, world_size=1)
            assert before.held.wait(DEADLINE_SECONDS)
            run = superbatch.connect(fast.address).open_run(remote("written", max_ahead=1))
            batch = run.select(0, rank=0, world_size=1)
            before.release.set()
            served = waiting.result(DEADLINE_SECONDS)
        assert served.receipt.writer_nonce == batch.receipt.writer_nonce
        assert served["_superbatch_id"].to_pylist() == batch["_superbatch_id"].to_pylist()
        assert late.receipt(0) == run.receipt(0)
        assert len(store.keys("state-of-writers/runs/written/receipts/0/0/")) == 1
        asked = {
            "decide a step": lambda: late.select(1, rank=0, world_size=1),
            "take weights": lambda: (late.push_weights(weights(inputs, 0), step=0), late.flush()),
            "add phases": lambda: late.append_phases([phase(from_step=9)]),
            "open a generation": lambda: late.rewind(0, mode="reselect"),
            "close": late.close,
        }
        assert {what: answer(ask) for what, ask in asked.items()} == dict.fromkeys(
            asked, ("NOT_OWNER", fast.address)
        )
        assert run.get_run().summary.generation == 0
    finally:
        slow.stop()
        fast.stop()


@pytest.mark.parametrize("role", ["serve", "worker"])
def test_a_store_that_overwrites_on_a_conditional_create_is_refused_for_state(store, proxy, role):
    overwriting = proxy(dropped=("if-none-match",))
    state = f"s3://{BUCKET}/state-of-{role}"
    ended = command(overwriting.port, role, "--listen", "127.0.0.1:0", "--state", state)
    assert ended.returncode != 0 and not ended.stdout
    assert "overwrites an object on a conditional create" in ended.stderr and state in ended.stderr
    assert not store.keys(f"state-of-{role}/"), "the probe leaves nothing behind"


def test_unreachable_storage_is_said_with_what_and_where(inputs, tmp_path):
    with Cluster(tmp_path, environment=credentials(1)) as cluster:
        client = superbatch.connect(cluster.address, retry_attempts=1)
        with pytest.raises(superbatch.Unavailable) as caught:
            client.open_run(spec(inputs, "data", sources=[f"s3://{BUCKET}/pool"]))
        assert reason(caught) == "STORAGE_UNREACHABLE"
        assert f"s3://{BUCKET}/pool" in str(caught.value) and "Connection refused" in str(
            caught.value
        )
        # Nothing of it stays: the same run opens once its data can be read.
        assert len(client.open_run(spec(inputs, "data")).select(0, rank=0, world_size=1)) == 24


def test_unreachable_state_ends_a_start_with_what_and_where():
    ended = command(1, "serve", "--listen", "127.0.0.1:0", "--state", f"s3://{BUCKET}/state")
    assert ended.returncode != 0 and not ended.stdout
    said = [line for line in ended.stderr.splitlines() if line.startswith("superbatch: ")]
    assert len(said) == 1 and f"s3://{BUCKET}/state" in said[0]
    assert said[0].count("Connection refused") == 1 and said[0].count("127.0.0.1:1/") == 1, (
        "said once"
    )
    told = [
        line for line in ended.stderr.splitlines() if "WARN" in line and "object storage" in line
    ]
    assert len(told) == 1 and f"http://127.0.0.1:1/{BUCKET}/state" in told[0], (
        "and while it is tried again"
    )


def test_a_bucket_that_is_not_there_fails_at_once_and_by_name(inputs, store, tmp_path):
    with Cluster(tmp_path, environment=credentials(store.port)) as cluster:
        client = superbatch.connect(cluster.address)
        with pytest.raises(superbatch.Error, match="there is no bucket 'nobucket99'") as caught:
            client.open_run(spec(inputs, "nowhere", sources=["s3://nobucket99/data"]))
        assert not isinstance(caught.value, superbatch.Unavailable), "it is not tried again"
        assert (reason(caught), caught.value.metadata["bucket"]) == (
            "INVALID_ARGUMENT",
            "nobucket99",
        )
    ended = command(
        store.port, "serve", "--listen", "127.0.0.1:0", "--state", "s3://nobucket99/state"
    )
    assert ended.returncode != 0 and "there is no bucket 'nobucket99'" in ended.stderr
