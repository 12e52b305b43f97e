"""A process that is told to stop: it says so, lets its calls finish, writes what is left, and has
ended in the stated time, whatever does not answer.
"""

import json
import os
import signal
import urllib.error
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic

import pytest
import superbatch
from cluster import DEADLINE_SECONDS, Cluster, Process
from pausable import way_to
from test_end_to_end import inputs, phase, spec, weights
from test_grpc_plain import HEALTH, SELECTION, Plain

GRACE_SECONDS = 1.0
#: What docs/configuration.md states, and what a busy machine may take beyond it.
REST_SECONDS, SLACK_SECONDS = 6.0, 5.0


@contextmanager
def coordinator(folder: Path, **settings):
    """A coordinator with a short grace period and an audit log."""
    process = Process(
        folder,
        "coordinator",
        "serve",
        {
            "listen": "127.0.0.1:0",
            "metrics_listen": "127.0.0.1:0",
            "page_listen": None,
            "state": (folder / "state").as_uri(),
            "audit": {"file": str(folder / "coordinator.audit")},
            "coordinator": {"grace_seconds": GRACE_SECONDS},
            **settings,
        },
    )
    try:
        yield process
    finally:
        process.stop()


def uniform(inputs: Path, run_id: str) -> superbatch.RunSpec:
    phases = [phase(policy="uniform", n_chunks=1)]
    return spec(inputs, run_id, phases=phases, reference=None, learner=None)


def readiness(process: Process) -> int:
    address = process.metrics_address.replace("/metrics", "/readyz")
    try:
        return urllib.request.urlopen(address, timeout=DEADLINE_SECONDS).status
    except urllib.error.HTTPError as error:
        return error.code


def ends(process: Process) -> int:
    """How it ends, in time."""
    return process.process.wait(GRACE_SECONDS + REST_SECONDS + SLACK_SECONDS)


def fill(pipe: Path) -> None:
    """Whoever writes to it next waits. The writer's own descriptor is left as it is."""
    full = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
    for piece in (b"x" * 4096, b"x"):
        with suppress(BlockingIOError):
            while os.write(full, piece):
                pass
    os.close(full)


def test_a_call_that_does_not_end_is_let_go_after_the_grace_period(inputs, tmp_path):
    with coordinator(tmp_path) as process, Plain(process.address) as plain:
        watch = plain.call(HEALTH, "Watch", service=SELECTION)
        assert next(watch).status == 1, "SERVING"
        with way_to(process.address, limit=1 << 15) as way:
            run = superbatch.connect(way.address, retry_attempts=1).open_run(spec(inputs, "stuck"))
            run.select(0, rank=0, world_size=1)
            run.push_weights(weights(inputs, 0), step=0)
            assert way.holds.wait(DEADLINE_SECONDS), "the push has stopped on its way"
            assert readiness(process) == 200
            begun = monotonic()
            process.process.send_signal(signal.SIGTERM)
            assert next(watch).status == 2, "NOT_SERVING"
            assert readiness(process) == 503
            assert ends(process) == 0
            assert monotonic() - begun >= GRACE_SECONDS, "the push had its time"
    log = process.log.read_text()
    places = [log.find(words) for words in ("draining", "calls were still open")]
    assert -1 not in places and places == sorted(places), log
    audited = [json.loads(line) for line in (tmp_path / "coordinator.audit").open()]
    assert [(line["what"], line["run"]) for line in audited] == [("open", "stuck")]


@pytest.mark.parametrize(("stuck", "code"), [("log", 1), ("audit", 0)])
def test_a_process_ends_in_time_though_what_it_writes_to_hangs(inputs, tmp_path, stuck, code):
    """A disk, a terminal or a log driver that takes nothing more."""
    pipe = tmp_path / f"coordinator.{stuck}"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
    try:
        with coordinator(tmp_path) as process, Plain(process.address) as plain:
            watch = plain.call(HEALTH, "Watch", service=SELECTION)
            assert next(watch).status == 1, "SERVING"
            fill(pipe)
            if stuck == "audit":
                # It has a line that it cannot write.
                superbatch.connect(process.address).open_run(uniform(inputs, "noted"))
            process.process.send_signal(signal.SIGTERM)
            assert next(watch).status == 2, "NOT_SERVING"
            assert ends(process) == code
        if stuck == "audit":
            assert "the audit log's disk does not answer" in process.log.read_text()
    finally:
        os.close(reader)


def test_a_worker_ends_in_time_though_its_coordinator_does_not_answer(tmp_path):
    brief = {"SUPERBATCH_COORDINATOR__GRACE_SECONDS": str(GRACE_SECONDS)}
    with Cluster(tmp_path, workers=1, environment=brief) as cluster:
        (worker,), coordinator = cluster.workers, cluster.coordinator
        coordinator.process.send_signal(signal.SIGSTOP)
        try:
            worker.process.send_signal(signal.SIGTERM)
            assert ends(worker) == 0
        finally:
            coordinator.process.send_signal(signal.SIGCONT)
        assert "draining" in worker.log.read_text()
