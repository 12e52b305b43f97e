"""The coordinator killed at every write of its state, and writes whose outcome stays unknown: no
step is decided twice.
"""

import re
from concurrent.futures import ThreadPoolExecutor
from time import monotonic, sleep

import pytest
import superbatch
from chaos.weather import Weather
from cluster import DEADLINE_SECONDS
from s3_store import BUCKET, coordinator, proxy, remote, store  # noqa: F401
from test_end_to_end import STEPS, choices, inputs, service, spec, train, undisturbed  # noqa: F401

# Of a run's life: what it is, who owns it, a snapshot, its publication, and a step that was scored
# with it.
WRITES = ("run.json", "owner/1", "snapshots/", "pushes/0/0", "receipts/0/2/")
#: The last step of these writes.
LAST = 2


@pytest.mark.parametrize(
    ("write", "moment"),
    [
        ("run.json", "hold_answer"),
        ("owner/1", "hold"),
        ("owner/1", "hold_answer"),
        ("snapshots/", "hold"),
        ("pushes/0/0", "hold"),
        ("pushes/0/0", "hold_answer"),
        ("receipts/0/2/", "hold"),
        ("receipts/0/2/", "hold_answer"),
    ],
)
def test_a_coordinator_killed_while_it_writes(
    inputs, store, proxy, tmp_path, undisturbed, write, moment
):
    """Before its write arrived, or after that and before it knew. The write that was on its way
    arrives late.
    """
    state = f"s3://{BUCKET}/{tmp_path.name}"
    between = proxy(**{moment: f"/runs/killed/{write}"})
    first = coordinator(tmp_path, "first", between.port, state)
    try:
        client = superbatch.connect(first.address, retry_attempts=1)
        with ThreadPoolExecutor() as threads:
            training = threads.submit(lambda: train(client.open_run(remote("killed")), inputs))
            assert between.held.wait(DEADLINE_SECONDS)
            first.kill()
            assert isinstance(training.exception(DEADLINE_SECONDS), superbatch.Unavailable)
        second = coordinator(tmp_path, "second", store.port, state)
        try:
            run = superbatch.connect(second.address).open_run(
                remote("killed"), incarnation="second"
            )
            assert train(run, inputs, end=LAST + 1) == undisturbed[0][: LAST + 1]
            assert choices(run, LAST + 1) == undisturbed[1][: LAST + 1]
            known = [run.receipt(step) for step in range(LAST + 1)]
            between.release.set()
            between.stop()
            assert [run.receipt(step) for step in range(LAST + 1)] == known
            assert run.get_run().learner.version == LAST + 1
        finally:
            second.stop()
    finally:
        first.stop()


@pytest.mark.parametrize("lose_by", ["end", "500"])
def test_writes_whose_answers_are_lost_are_known_for_our_own(
    inputs, store, proxy, tmp_path, undisturbed, lose_by
):
    """Every object is written once under the eyes of a coordinator that does not learn of it, and
    tries again.
    """
    state = f"s3://{BUCKET}/state-lost-by-{lose_by}"
    losing = proxy(lose=f"/state-lost-by-{lose_by}/", lose_by=lose_by)
    only = coordinator(tmp_path, "only", losing.port, state)
    try:
        run = superbatch.connect(only.address).open_run(remote("lost"))
        assert train(run, inputs) == undisturbed[0]
        assert choices(run) == undisturbed[1]
        assert run.get_run().learner.version == STEPS
    finally:
        only.stop()
    for write in WRITES:
        assert any(f"/runs/lost/{write}" in path for path in losing.lost), (
            f"nothing was lost of {write}"
        )


def test_old_snapshots_go_though_storage_refuses_to_delete_for_a_while(
    inputs, store, tmp_path, undisturbed
):
    """A batch that is consumed is dropped while the snapshots that its step made old are still
    being deleted.
    """
    state = "state-of-deletes"
    weather = Weather(store.port)
    only = coordinator(tmp_path, "only", weather.port, f"s3://{BUCKET}/{state}", snapshots_kept=1)
    try:
        # One by one, or several by one request.
        weather.refused = re.compile(r"^DELETE .*/snapshots/|^POST .*\?delete")
        run = superbatch.connect(only.address).open_run(remote("deleting"))
        steps = 3 * STEPS
        assert train(run, inputs, end=steps)[:STEPS] == undisturbed[0]
        assert weather.done["refuse"] > 0
        assert len(store.keys(f"{state}/runs/deleting/snapshots/")) >= steps
        weather.refused = None
        train(run, inputs, start=steps, end=steps + 2)
        until = monotonic() + DEADLINE_SECONDS
        # The steps prepared ahead need two, and a third may be on its way out.
        while len(left := store.keys(f"{state}/runs/deleting/snapshots/")) > 3:
            assert monotonic() < until, left
            sleep(0.02)
    finally:
        only.stop()
        weather.stop()
