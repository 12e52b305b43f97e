"""Traces of steps, as a collector receives them from real processes."""

import json
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest
import superbatch
from cluster import Cluster, Process
from secured import Authority
from test_end_to_end import STEPS, choices, inputs, service, spec, train, undisturbed  # noqa: F401

ENDPOINT = "SUPERBATCH_TRACES__OTLP_ENDPOINT"
COORDINATOR, WORKER = "superbatch-coordinator", "superbatch-worker"


class Span(NamedTuple):
    process: str
    trace: str
    id: str
    parent: str
    name: str
    status: int
    attributes: dict


class Collector:
    """Takes OTLP over gRPC in a process of its own, with TLS if it has a certificate."""

    def __init__(self, folder: Path, certificate: tuple[str, ...] = ()):
        self.file = folder / "spans.jsonl"
        script = Path(__file__).with_name("otlp_collector.py")
        self.process = subprocess.Popen(
            [sys.executable, script, self.file, *certificate],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.endpoint = self.process.stdout.readline().strip()
        assert self.endpoint, "the collector did not come up; its error is above"

    def __enter__(self) -> "Collector":
        return self

    def __exit__(self, *_) -> None:
        self.process.communicate()
        assert self.process.returncode == 0

    @property
    def spans(self) -> list[Span]:
        """All that were received so far."""
        return [Span(**json.loads(line)) for line in self.file.read_text().splitlines()]


def of_trace(spans: list[Span], trace: str) -> dict[str, list[Span]]:
    """By name."""
    named: dict[str, list[Span]] = {}
    for span in spans:
        if span.trace == trace:
            named.setdefault(span.name, []).append(span)
    return named


def only(spans: list[Span]) -> Span:
    (span,) = spans
    return span


def parents(spans: list[Span]) -> Counter:
    return Counter(span.parent for span in spans)


def test_a_step_is_one_trace_across_processes(inputs, tmp_path, undisturbed):
    with Collector(tmp_path) as collector:
        with Cluster(tmp_path, workers=2, environment={ENDPOINT: collector.endpoint}) as cluster:
            run = superbatch.connect(cluster.address).open_run(spec(inputs, "traced"))
            assert train(run, inputs) == undisturbed[0]
            summaries = [run.receipt(step).summary for step in range(STEPS)]
            processes = [cluster.coordinator, *cluster.workers]
        # Every process has exported what it had, and ended well.
        assert [process.process.returncode for process in processes] == [0, 0, 0]
        log = "".join(process.log.read_text() for process in processes)
        assert "could not be exported" not in log and "step{" not in log
        spans = collector.spans
    traces = {summary.trace_id for summary in summaries}
    assert len(traces) == STEPS
    for step, summary in enumerate(summaries):
        named = of_trace(spans, summary.trace_id)
        root = only(named["step"])
        assert (root.id, root.parent, root.process) == (summary.span_id, "", COORDINATOR)
        said = {key: root.attributes[key] for key in ("run", "generation", "step")}
        assert said == {"run": "traced", "generation": 0, "step": step}
        stages = ["plan", "slice", "wait_weights", "embed_learner", "select", "rows", "commit"]
        for stage in [*stages, "serve"]:
            assert parents(named[stage]) == {root.id: len(named[stage])}, stage
            assert {span.process for span in named[stage]} == {COORDINATOR}, stage
        # A batch that was asked for ahead may be asked for again when it is needed.
        assert {span.attributes["rank"] for span in named["serve"]} == {0}
        assert all(span.attributes["waited_seconds"] >= 0 for span in named["serve"])
        # Each worker's call is below its slice, over the network.
        slices, scores = named["slice"], named["score"]
        assert parents(scores) == Counter(span.id for span in slices) and len(slices) == 2
        assert sum(span.attributes["rows"] for span in slices) == 96
        for stage in ["survey", "learner", "send_rows"]:
            assert parents(named[stage]) == Counter(span.id for span in scores), stage
            assert {span.process for span in named[stage]} == {WORKER}, stage
    # The service may have ended in the middle of a step ahead.
    assert {span.status for span in spans if span.trace in traces} == {0}


def test_an_embedded_worker_is_traced_and_the_collector_verified(inputs, tmp_path):
    authority = Authority(tmp_path, "collector")
    with Collector(tmp_path, authority.sign("collector")) as collector:
        environment = {ENDPOINT: collector.endpoint, "SUPERBATCH_TLS__CA": str(authority.ca)}
        with Cluster(tmp_path / "known", environment=environment) as cluster:
            run = superbatch.connect(cluster.address).open_run(spec(inputs, "embedded"))
            train(run, inputs, end=1)
            summary = run.receipt(0).summary
        named = of_trace(collector.spans, summary.trace_id)
        assert only(named["score"]).parent == only(named["slice"]).id
        assert only(named["survey"]).parent == only(named["score"]).id
        assert {span.process for span in collector.spans} == {COORDINATOR}
        known = len(collector.spans)
        environment["SUPERBATCH_TLS__CA"] = str(Authority(tmp_path, "other").ca)
        with Cluster(tmp_path / "unknown", environment=environment) as cluster:
            run = superbatch.connect(cluster.address).open_run(spec(inputs, "embedded"))
            train(run, inputs, end=1)
            failed = cluster.coordinator
            failed.wait_for("superbatch_trace_spans_total", bool, outcome="failed")
        assert len(collector.spans) == known
        assert failed.log.read_text().count("traces cannot be exported") == 1


@pytest.fixture
def silent():
    """A port at which connections are taken and never answered."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        yield listener


def endpoint(listener: socket.socket) -> str:
    return f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_a_silent_collector_costs_no_step(inputs, tmp_path, undisturbed, silent):
    with Cluster(tmp_path, environment={ENDPOINT: endpoint(silent)}) as cluster:
        run = superbatch.connect(cluster.address).open_run(spec(inputs, "silent"))
        assert train(run, inputs) == undisturbed[0]
        assert choices(run) == undisturbed[1]
        cluster.coordinator.wait_for("superbatch_trace_spans_total", bool, outcome="failed")
    silent.accept()[0].close()
    assert cluster.coordinator.process.returncode == 0
    assert "steps go on without them" in cluster.coordinator.log.read_text()


def test_without_an_endpoint_nothing_is_traced(inputs, tmp_path, silent):
    """The standard's own variable alone turns nothing on."""
    environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint(silent)}
    with Cluster(tmp_path, environment=environment) as cluster:
        run = superbatch.connect(cluster.address).open_run(spec(inputs, "untraced"))
        train(run, inputs, end=2)
        summary = run.receipt(1).summary
        assert (summary.trace_id, summary.span_id) == ("", "")
        coordinator: Process = cluster.coordinator
        assert coordinator.metric("superbatch_trace_spans_total") == 0
    with pytest.raises(BlockingIOError):
        silent.accept()
