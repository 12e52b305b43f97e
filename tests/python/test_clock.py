"""A clock that jumps, as clocks do when they are set: processes are started with libfaketime, which
shifts the time of day and leaves the time that only passes alone.
"""

from pathlib import Path

import pytest
import superbatch
from cluster import Cluster
from test_delivery import opened, pool, rows  # noqa: F401
from test_end_to_end import (  # noqa: F401
    STEPS,
    choices,
    inputs,
    service,
    spec,
    train,
    undisturbed,
)

LIBRARY = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)


class Clock:
    """The clock of all processes that are started with its environment."""

    def __init__(self, folder: Path):
        if LIBRARY is None:
            pytest.skip("NOT TESTED: a clock that jumps (apt-get install faketime)")
        self.file = folder / "clock"
        self.set("+0d")
        self.environment = {
            "LD_PRELOAD": str(LIBRARY),
            "FAKETIME_TIMESTAMP_FILE": str(self.file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }

    def set(self, offset: str) -> None:
        # Replaced at once: processes read it all the time.
        new = self.file.with_suffix(".new")
        new.write_text(offset + "\n")
        new.rename(self.file)


def test_steps_are_the_same_while_the_clock_jumps(inputs, tmp_path, undisturbed):
    clock = Clock(tmp_path)
    with Cluster(tmp_path, workers=2, environment=clock.environment) as cluster:
        run = superbatch.connect(cluster.address).open_run(spec(inputs, "jumping"))
        trained = train(run, inputs, end=1)
        for step, offset in ((1, "-1d"), (2, "+2d"), (3, "-400d")):
            clock.set(offset)
            trained += train(run, inputs, start=step, end=step + 1)
        assert trained == undisturbed[0]
        assert choices(run) == undisturbed[1]
        times = [run.receipt(step).summary.committed_unix_ms for step in range(STEPS)]
        assert max(times) - min(times) > 86_400_000, "the clock did jump"


def test_tickets_of_a_worker_whose_clock_is_wrong_cost_a_fallback(tmp_path, pool):
    clock = Clock(tmp_path)
    with Cluster(tmp_path, workers=1) as cluster:
        expected = rows(opened(cluster, pool, "coordinator"), 0, "_superbatch_id", "image")
        cluster.workers.pop().kill()
        cluster.environment = clock.environment
        clock.set("+1d")
        worker = cluster.start_worker("tomorrow")
        run = opened(cluster, pool, "direct")
        assert rows(run, 0, "_superbatch_id", "image") == expected
        assert cluster.coordinator.metric("superbatch_direct_fallbacks_total", cause="asked") > 0
        assert worker.metric("superbatch_tickets_total", outcome="TICKET_REFUSED") > 0
        clock.set("+0d")
        before = worker.metric("superbatch_tickets_total", outcome="ok")
        rows(run, 1, "_superbatch_id", "image")
        # A ticket is counted after the last of its rows is sent.
        worker.wait_for("superbatch_tickets_total", lambda count: count > before, outcome="ok")
