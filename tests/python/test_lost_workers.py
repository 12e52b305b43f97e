"""Workers that die or leave in the middle of a slice: nothing but time is lost, and what was thrown
away is accounted.

A stopped worker (SIGSTOP) surely has its slice open; then it is killed. No weights are pushed:
every step is scored with the initial ones as soon as a rank stands still for it, which is how a
step that is embedded by the reference is held and let go.
"""

import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import superbatch
from cluster import DEADLINE_SECONDS, Cluster, Process
from test_end_to_end import STEPS, choices, inputs, phase, service, spec  # noqa: F401

from examples.demo import tiny

STAGES = "superbatch_stage_duration_seconds_count"
RESCORED = "superbatch_slices_rescored_total"
SLICE_ROWS = 32


@pytest.fixture(scope="module")
def pool(tmp_path_factory) -> Path:
    """Data whose blocks are as large as a slice of three."""
    return tiny.write_dataset(
        tmp_path_factory.mktemp("blocks") / "pool", rows=768, row_group_rows=SLICE_ROWS
    )


def asked(inputs, pool: Path, run_id: str) -> superbatch.RunSpec:
    """Blocks are scanned one after the other: every slice is one that nobody has embedded yet. One
    step is made ahead.
    """
    return spec(
        inputs,
        run_id,
        sources=[pool.as_uri()],
        phases=[phase(super_batch_size=3 * SLICE_ROWS)],
        window_blocks=1,
        max_ahead=2,
        fallback="serve_flagged",
        stall_grace_seconds=0.0,
    )


def select(run: superbatch.Run, step: int) -> list[str]:
    return run.select(step, rank=0, world_size=1)["_superbatch_id"].to_pylist()


@pytest.fixture(scope="module")
def undisturbed(inputs, pool, service) -> tuple[list, list, list]:
    """Of a run on one worker: ids by step, choices, and costs."""
    run = superbatch.connect(service.address).open_run(asked(inputs, pool, "undisturbed-blocks"))
    return [select(run, step) for step in range(STEPS)], choices(run), costs(run)


def costs(run: superbatch.Run) -> list:
    return [run.receipt(step).summary.cost for step in range(STEPS)]


@pytest.fixture
def cluster(tmp_path):
    with Cluster(tmp_path, workers=3) as cluster:
        yield cluster
        for worker in cluster.workers:
            if worker.process.poll() is None:
                worker.process.send_signal(signal.SIGCONT)


@pytest.fixture
def threads():
    with ThreadPoolExecutor() as threads:
        yield threads


def slices(workers: list[Process], stage: str, count: int) -> None:
    """Waits until each worker has ended `stage` of so many slices."""
    for worker in workers:
        worker.wait_for(STAGES, lambda ended: ended == count, stage=stage)


def hold_step_two(run: superbatch.Run, cluster: Cluster) -> None:
    """Decides steps 0 and 1. Step 2 is read and embedded by the reference on every worker, and no
    rank needs it yet.
    """
    for step in range(2):
        select(run, step)
    slices(cluster.workers, "embed_reference", 3)
    slices(cluster.workers, "embed_learner", 2)


def goes_on_as(undisturbed, run: superbatch.Run, cluster: Cluster) -> list:
    """All steps are those of the undisturbed run, and what they cost is the same in receipts, run
    and metrics. The costs.
    """
    assert [select(run, step) for step in range(STEPS)] == undisturbed[0]
    assert choices(run) == undisturbed[1]
    run.close()
    spent, accounts = costs(run), run.get_run().accounts
    for kind in ("reference", "learner", "selection", "discarded"):
        assert accounts[f"{kind}_flops"] == pytest.approx(
            sum(cost[f"{kind}_flops"] for cost in spent)
        ), kind
    counted = cluster.coordinator.metric("superbatch_flops_total", stage="discarded")
    assert counted == pytest.approx(accounts.discarded_flops, abs=1)
    return spent


def scored_once(spent: list, undisturbed) -> None:
    """Nothing that had come was had again, so nothing was thrown away."""
    for kind in ("reference_flops", "learner_flops"):
        assert [cost[kind] for cost in spent] == pytest.approx(
            [cost[kind] for cost in undisturbed[2]]
        ), kind
    assert [cost.discarded_flops for cost in spent] == [0] * STEPS


def test_a_worker_killed_before_it_read_its_slice(inputs, pool, cluster, threads, undisturbed):
    victim, *others = cluster.workers
    run = superbatch.connect(cluster.address).open_run(asked(inputs, pool, "unread"))
    victim.process.send_signal(signal.SIGSTOP)
    waiting = threads.submit(select, run, 0)
    # Of this step and the next, which is prepared.
    slices(others, "embed_reference", 2)
    assert not waiting.done()
    victim.kill()
    assert waiting.result(DEADLINE_SECONDS) == undisturbed[0][0]
    cluster.coordinator.wait_for(RESCORED, lambda count: count == 2)
    cluster.workers.append(cluster.start_worker("another"))
    cluster.coordinator.wait_for("superbatch_workers", lambda count: count == 3)
    scored_once(goes_on_as(undisturbed, run, cluster), undisturbed)
    assert cluster.workers[-1].metric(STAGES, stage="embed_learner") > 0


def test_a_worker_killed_while_the_learner_embeds(inputs, pool, cluster, threads, undisturbed):
    run = superbatch.connect(cluster.address).open_run(asked(inputs, pool, "unlearned"))
    hold_step_two(run, cluster)
    victim, *others = cluster.workers
    victim.process.send_signal(signal.SIGSTOP)
    waiting = threads.submit(select, run, 2)
    slices(others, "embed_learner", 3)
    # The next step has a slice open there, too.
    slices(others, "embed_reference", 4)
    assert not waiting.done() and cluster.coordinator.metric(RESCORED) == 0
    victim.kill()
    assert waiting.result(DEADLINE_SECONDS) == undisturbed[0][2]
    cluster.coordinator.wait_for(RESCORED, lambda count: count == 2)
    # Its reference embeddings had come already and are used.
    scored_once(goes_on_as(undisturbed, run, cluster), undisturbed)


def test_a_worker_killed_after_it_embedded_costs_a_read_and_no_score(
    inputs, pool, cluster, threads, undisturbed
):
    run = superbatch.connect(cluster.address).open_run(asked(inputs, pool, "unsent"))
    hold_step_two(run, cluster)
    slow, victim, other = cluster.workers
    slow.process.send_signal(signal.SIGSTOP)
    waiting = threads.submit(select, run, 2)
    slices([victim, other], "embed_learner", 3)
    slices([victim, other], "embed_reference", 4)
    # The victim's part is done; its rows are not asked for before the slow one's embeddings came.
    victim.kill()
    slow.process.send_signal(signal.SIGCONT)
    assert waiting.result(DEADLINE_SECONDS) == undisturbed[0][2]
    again = (
        slow.metric(STAGES, stage="embed_learner") + other.metric(STAGES, stage="embed_learner") - 6
    )
    assert cluster.coordinator.metric(RESCORED) == again, (
        "counts what was scored again, not what was read again"
    )
    scored_once(goes_on_as(undisturbed, run, cluster), undisturbed)


def test_a_worker_told_to_stop_hands_over_what_it_holds(inputs, pool, tmp_path, undisturbed):
    """A slice that waits for weights may wait for longer than any grace period: it is let go, and
    scored elsewhere.
    """
    with Cluster(
        tmp_path, workers=3, environment={"SUPERBATCH_COORDINATOR__GRACE_SECONDS": "600"}
    ) as cluster:
        run = superbatch.connect(cluster.address).open_run(asked(inputs, pool, "left"))
        hold_step_two(run, cluster)
        leaving = cluster.workers[0].process
        leaving.send_signal(signal.SIGTERM)
        try:
            assert leaving.wait(DEADLINE_SECONDS) == 0
        except subprocess.TimeoutExpired:
            # So that the others need not be waited for, too.
            run.close()
            raise
        cluster.coordinator.wait_for("superbatch_workers", lambda count: count == 2)
        # Two workers would cut blocks differently and embed the one that they share twice.
        cluster.workers.append(cluster.start_worker("another"))
        cluster.coordinator.wait_for("superbatch_workers", lambda count: count == 3)
        scored_once(goes_on_as(undisturbed, run, cluster), undisturbed)


def test_a_step_given_up_by_a_rewind_is_accounted(inputs, pool, tmp_path):
    """What step 2 had cost until then is charged to what is committed after it."""
    with Cluster(tmp_path) as cluster:
        client = superbatch.connect(cluster.address)
        run = client.open_run(asked(inputs, pool, "given-up"))
        for step in range(2):
            select(run, step)
        slices([cluster.coordinator], "embed_reference", 3)
        run.rewind(2, mode="reselect")
        run = client.open_run(asked(inputs, pool, "given-up"), incarnation="again")
        for step in range(2, STEPS):
            select(run, step)
        run.close()
        first, *_, again, last = costs(run)
        # Its blocks were embedded in vain, and their embeddings found again.
        assert (again.reference_flops, last.reference_flops) == (0, first.reference_flops)
        assert first.reference_flops > 0
        assert again.discarded_flops + last.discarded_flops == first.reference_flops
        assert run.get_run().accounts.discarded_flops == first.reference_flops
