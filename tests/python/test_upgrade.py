"""A run goes on after an upgrade of the service, and a build that is too old says so.

SUPERBATCH_OLD_BINARY names the binary of an older build: `make test-upgrade FROM=commit` makes one.
"""

import json
import os
import signal
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from time import monotonic, sleep

import pytest
import superbatch
from chaos.members import reserved_port
from cluster import BINARY, DEADLINE_SECONDS, Cluster, Process
from commands import fails
from refusal import refused
from test_end_to_end import STEPS, choices, inputs, phase, spec, train, weights  # noqa: F401

#: Steps of a trainer whose service is replaced, and those that it has while one process is.
ROLLED, AT_A_TIME = 16, 4

OLDER = os.environ.get("SUPERBATCH_OLD_BINARY")
BUILDS = {"this build": BINARY, "older binary": OLDER}
each_build = pytest.mark.parametrize(
    "older", [pytest.param(binary, id=name) for name, binary in BUILDS.items() if binary]
)

# What a run's facts have gained since the first form of the state.
GAINED = ("files", "dim", "image_tower", "text_flops", "optional_tensors")


def asked(inputs) -> superbatch.RunSpec:
    return spec(inputs, "old", phases=[phase(policy="uniform"), phase(from_step=1)])


def rewrite(folder, change) -> None:
    """Changes run.json, as another build might have written it."""
    path = folder / "state" / "runs" / "old" / "run.json"
    fact = json.loads(path.read_text())
    change(fact)
    path.write_text(json.dumps(fact))


def first_form(fact: dict) -> None:
    del fact["format"]
    for model in ("learner", "reference"):
        for field in GAINED:
            fact[model].pop(field, None)
    # Defaults that an older build did not know.
    del fact["spec"]["stall_grace_seconds"]


@each_build
def test_a_run_of_an_older_build_goes_on(inputs, tmp_path, older):  # noqa: F811
    with Cluster(tmp_path / "new") as cluster:
        run = superbatch.connect(cluster.address).open_run(asked(inputs))
        expected = train(run, inputs), choices(run)
    with Cluster(tmp_path / "old", binary=older) as cluster:
        run = superbatch.connect(cluster.address).open_run(asked(inputs))
        first = train(run, inputs, end=2)
        cluster.coordinator.stop()
        if older == BINARY:
            rewrite(tmp_path / "old", first_form)
        cluster.binary = BINARY
        cluster.start_coordinator("upgraded")
        run = superbatch.connect(cluster.address).open_run(asked(inputs))
        assert run.next_step >= 2
        assert (first + train(run, inputs, start=2), choices(run)) == expected
        assert len(expected[0]) == STEPS


def test_a_run_of_a_newer_build_is_refused_by_name(inputs, tmp_path):  # noqa: F811
    with Cluster(tmp_path) as cluster:
        superbatch.connect(cluster.address).open_run(asked(inputs))
        cluster.coordinator.stop()
        rewrite(tmp_path, lambda fact: fact.update(format=99, spec={"unheard": "of"}))
        cluster.start_coordinator("old")
        client = superbatch.connect(cluster.address)
        says = "runs/old has state of form 99"
        refused(lambda: client.open_run(asked(inputs)), "UNIMPLEMENTED", says)
        state = (tmp_path / "state").as_uri()
        assert says in fails("receipts", "old", "--state", state)


class Rolling(ExitStack):
    """A coordinator at an address of its own, as a deployment's has one, with workers. What is
    started from now on is of the build `binary`.
    """

    def __init__(self, folder: Path, binary: Path):
        super().__init__()
        self.binary = binary
        self.folder, self.state = folder, (folder / "state").as_uri()
        self.held, self.port = reserved_port()
        self.callback(self.held.close)

    def start(self, name: str, command: str, **settings: object) -> Process:
        config = {"state": self.state, **settings}
        process = Process(self.folder, name, command, config, binary=self.binary)
        self.callback(process.stop)
        return process

    def start_coordinator(self, name: str) -> Process:
        return self.start(
            name,
            "serve",
            listen=f"127.0.0.1:{self.port}",
            metrics_listen="127.0.0.1:0",
            page_listen=None,
            coordinator={"workers_embedded": False},
        )

    def start_worker(self, name: str) -> Process:
        role = {
            "coordinator": f"http://127.0.0.1:{self.port}",
            "listen": "127.0.0.1:0",
            "metrics_listen": "127.0.0.1:0",
        }
        return self.start(name, "worker", worker={"threads": 1}, worker_role=role)


class Trainer:
    """Trains in a thread, on as many steps as it is let."""

    def __init__(self, run: superbatch.Run, inputs: Path, threads: ThreadPoolExecutor):
        self.run, self.inputs = run, inputs
        self.ids: list[list[str]] = []
        self.allowed, self.steps = threading.Semaphore(0), 0
        self.done: Future = threads.submit(self.train)

    def train(self) -> None:
        batches = iter(self.run.batches(rank=0, world_size=1, start_step=0, end_step=ROLLED))
        for _ in range(ROLLED):
            self.allowed.acquire()
            batch = next(batches)
            self.ids.append(batch["_superbatch_id"].to_pylist())
            self.run.push_weights(weights(self.inputs, batch.step), step=batch.step)
        self.run.flush()

    def let(self, steps: int) -> None:
        self.steps += steps
        self.allowed.release(steps)

    def wait(self) -> None:
        until = monotonic() + DEADLINE_SECONDS
        while len(self.ids) < self.steps:
            if self.done.done():
                self.done.result()
            assert monotonic() < until, f"{len(self.ids)} of {self.steps} steps"
            sleep(0.02)


@each_build
def test_a_rolling_replacement_changes_no_choice(inputs, tmp_path, older):  # noqa: F811
    """As an upgrade goes: a new worker comes before an old one leaves, and a new coordinator takes
    the old one's place, under a trainer that goes on.
    """
    with Cluster(tmp_path / "calm") as cluster:
        run = superbatch.connect(cluster.address).open_run(asked(inputs))
        expected = train(run, inputs, end=ROLLED), choices(run, ROLLED)
    with Rolling(tmp_path / "rolled", older) as rolling, ThreadPoolExecutor() as threads:
        coordinator = rolling.start_coordinator("coordinator")
        workers = [rolling.start_worker(f"worker-{number}") for number in range(2)]
        coordinator.wait_for("superbatch_workers", lambda count: count == 2)
        run = superbatch.connect(coordinator.address).open_run(asked(inputs))
        trainer = Trainer(run, inputs, threads)

        def leave(process: Process) -> None:
            trainer.let(AT_A_TIME)
            process.process.send_signal(signal.SIGTERM)
            assert process.process.wait(DEADLINE_SECONDS) == 0

        try:
            trainer.let(AT_A_TIME)
            trainer.wait()
            rolling.binary = BINARY
            for number, old in enumerate(workers):
                rolling.start_worker(f"new-worker-{number}")
                coordinator.wait_for("superbatch_workers", lambda count: count == 3)
                leave(old)
                coordinator.wait_for("superbatch_workers", lambda count: count == 2)
                trainer.wait()
            leave(coordinator)
            coordinator = rolling.start_coordinator("new-coordinator")
            coordinator.wait_for("superbatch_workers", lambda count: count == 2)
            trainer.wait()
            trainer.done.result(DEADLINE_SECONDS)
        finally:
            # So that a failure does not wait for the trainer.
            trainer.let(ROLLED)
        assert (trainer.ids, choices(run, ROLLED)) == expected
        assert run.missing_pushes(ROLLED) == [], "each step has its push"
