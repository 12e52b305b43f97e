"""Data, models and state on S3, through the real binary against a real S3 server: races, takeovers,
and stores that fail.
"""

from concurrent.futures import ThreadPoolExecutor

import pytest
import superbatch
from cluster import DEADLINE_SECONDS, Cluster, Process
from s3_store import (  # noqa: F401
    BUCKET,
    answer,
    command,
    coordinator,
    credentials,
    proxy,
    receipts_by_command,
    remote,
    store,
)
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
    assert told and all(f"http://127.0.0.1:1/{BUCKET}/state" in line for line in told), (
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
