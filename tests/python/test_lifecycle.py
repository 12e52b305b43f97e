"""What a run goes through in a long life, on the real binary: restarts, rewinds, memory limits, old
weights, models that change.
"""

import resource
import shutil
import subprocess
from pathlib import Path

import pytest
import superbatch
from cluster import BINARY, DEADLINE_SECONDS, Cluster, Process
from safetensors.torch import load_file
from test_end_to_end import inputs, phase, reason, service, spec, train, weights  # noqa: F401

LONG_SECONDS = 3600.0


@pytest.fixture
def serve(tmp_path):
    """Starts coordinators with settings of their own on one state."""
    started = []

    def start(**settings) -> Process:
        coordinator = Process(
            tmp_path,
            f"coordinator-{len(started)}",
            "serve",
            {
                "listen": "127.0.0.1:0",
                "metrics_listen": "127.0.0.1:0",
                "page_listen": None,
                "state": (tmp_path / "state").as_uri(),
                "coordinator": settings,
            },
        )
        started.append(coordinator)
        return coordinator

    yield start
    for coordinator in started:
        coordinator.stop()


def uniform(**changes) -> superbatch.Phase:
    return phase(policy="uniform", super_batch_size=48, sub_batch_size=24, n_chunks=1, **changes)


def snapshots(folder: Path, run_id: str) -> set[str]:
    return {
        path.name
        for path in (folder / "state" / "runs" / run_id / "snapshots").glob("*.safetensors")
    }


def test_a_straggler_is_refused_after_a_restart_too(inputs, serve):
    first = serve()
    old = superbatch.connect(first.address).open_run(
        spec(inputs, "stragglers", phases=[uniform()]), incarnation="old"
    )
    old.select(0, rank=0, world_size=1)
    new = superbatch.connect(first.address).open_run(
        spec(inputs, "stragglers", phases=[uniform()]), incarnation="new"
    )
    new.select(1, rank=0, world_size=1)
    first.kill()
    second = serve()
    client = superbatch.connect(second.address)
    zombie = client.open_run(spec(inputs, "stragglers", phases=[uniform()]), incarnation="old")
    with pytest.raises(superbatch.Error, match="straggler") as caught:
        zombie.select(1, rank=0, world_size=1)
    assert reason(caught) == "WORLD_SIZE_CONFLICT"
    living = client.open_run(spec(inputs, "stragglers", phases=[uniform()]), incarnation="new")
    assert len(living.select(2, rank=0, world_size=1)) == 24


def test_prefetch_does_not_widen_its_own_window(inputs, service):
    run = superbatch.connect(service.address).open_run(
        spec(inputs, "ahead", phases=[uniform()], max_ahead=2)
    )
    for step in (0, 1):
        run.select(step, rank=0, world_size=1, intent="prefetch")
    with pytest.raises(superbatch.Error) as caught:
        run.select(2, rank=0, world_size=1, intent="prefetch")
    assert reason(caught) == "STEP_BEYOND_AHEAD" and caught.value.metadata["newest_allowed"] == "1"
    run.select(1, rank=0, world_size=1)
    assert len(run.select(2, rank=0, world_size=1, intent="prefetch")) == 24


def test_a_receipt_of_a_replayed_step_is_found_in_both_generations(inputs, service):
    client = superbatch.connect(service.address)
    run = client.open_run(spec(inputs, "replayed"))
    ids = train(run, inputs)
    run.rewind(1, mode="replay")
    run = client.open_run(spec(inputs, "replayed"))
    for generation in (0, 1, None):
        receipt = run.receipt(2, generation=generation)
        assert sorted(row.id for row in receipt.chosen) == sorted(ids[2])
        summary = receipt.summary
        assert (summary.generation, summary.chosen_in_generation) == (
            1 if generation is None else generation,
            0,
        )


def test_phases_are_part_of_what_a_run_is_and_appended_ones_are_held_to_the_limits(inputs, serve):
    client = superbatch.connect(serve(super_batch_size_max=96, sub_batch_size_max=96).address)
    two = [uniform(), phase(from_step=3)]
    run = client.open_run(spec(inputs, "phased", phases=two))
    with pytest.raises(superbatch.Error) as caught:
        client.open_run(spec(inputs, "phased", phases=two[:1]))
    assert reason(caught) == "RUN_SPEC_CONFLICT" and caught.value.metadata["field"] == "phases[1]"
    with pytest.raises(superbatch.Error) as caught:
        run.append_phases([phase(from_step=5, super_batch_size=97)])
    assert (
        reason(caught) == "RUN_SPEC_IMPOSSIBLE"
        and caught.value.metadata["field"] == "phases[2].super_batch_size"
    )
    with pytest.raises(superbatch.Error, match="limit of 96") as caught:
        client.open_run(spec(inputs, "vast", phases=[phase(super_batch_size=10**7)]))
    assert (
        reason(caught) == "RUN_SPEC_IMPOSSIBLE"
        and caught.value.metadata["field"] == "phases[0].super_batch_size"
    )
    run.append_phases([uniform(from_step=4)])
    assert len(client.open_run(spec(inputs, "phased", phases=two)).get_run().spec.phases) == 3


def test_more_runs_than_fit_are_open_in_turn(inputs, serve):
    coordinator = serve(max_runs=1)
    client = superbatch.connect(coordinator.address, retry_attempts=1)
    runs = [
        client.open_run(spec(inputs, name, phases=[uniform()]))
        for name in ("first", "second", "third")
    ]
    assert coordinator.metric("superbatch_open_runs") == 1
    log = coordinator.log.read_text()
    assert all(words in log for words in ("run opened", "run put to sleep")) and "third" in log
    runs[0].close()
    assert client.get_run("first").summary.state == "closed"
    assert [client.get_run(name).summary.state for name in ("second", "third")] == ["open", "open"]


def test_the_log_names_the_run_and_the_end_of_the_data_is_no_warning(inputs, serve):
    coordinator = serve()
    run = superbatch.connect(coordinator.address).open_run(spec(inputs, "logged", epochs=1))
    assert len(train(run, inputs, end=None)) == run.dataset.steps_total
    log = coordinator.log.read_text()
    published = [line for line in log.splitlines() if "weights published" in line]
    assert published and all('run="logged"' in line for line in published)
    assert " WARN " not in log, log


def test_batches_in_hand_are_bounded_and_read_again(inputs, serve):
    coordinator = serve(ready_bytes_max=1)
    client = superbatch.connect(coordinator.address)
    ranks = [client.open_run(spec(inputs, "memory", phases=[uniform()])) for _ in range(2)]
    # Rank 1 stays away: nothing is consumed by all.
    alone = [
        ranks[0].select(step, rank=0, world_size=2)["_superbatch_id"].to_pylist()
        for step in range(6)
    ]
    assert coordinator.metric("superbatch_ready_batches") <= 3, (
        "the last one, and at most max_ahead that are being prepared"
    )
    late = [
        ranks[1].select(step, rank=1, world_size=2)["_superbatch_id"].to_pylist()
        for step in range(6)
    ]
    for step in range(6):
        chosen = [row.id for row in ranks[0].receipt(step).chosen]
        assert sorted(alone[step] + late[step]) == sorted(chosen)


def test_a_step_has_the_wait_of_its_slowest_rank(inputs, serve):
    coordinator = serve()
    client = superbatch.connect(coordinator.address)
    ranks = [client.open_run(spec(inputs, "waits", phases=[uniform()])) for _ in range(2)]
    for step in range(3):
        for rank, run in enumerate(ranks):
            run.select(step, rank=rank, world_size=2)
    waits, of_steps = "superbatch_trainer_wait_seconds", "superbatch_step_wait_seconds"
    assert coordinator.metric(f"{waits}_count") == 6
    # Both ranks have consumed steps 0 and 1; who knows whether step 2 is trained on.
    assert coordinator.metric(f"{of_steps}_count") == 2
    assert 0 < coordinator.metric(f"{of_steps}_sum") <= coordinator.metric(f"{waits}_sum")
    assert coordinator.metric("superbatch_runtime_threads") > 0
    assert coordinator.metric("superbatch_runtime_busy_seconds_total") > 0


def test_old_snapshots_go_and_a_rewind_that_needs_them_is_refused(inputs, serve, tmp_path):
    coordinator = serve(snapshots_kept=1)
    client = superbatch.connect(coordinator.address)
    run = client.open_run(spec(inputs, "kept", max_ahead=1))
    for batch in run.batches(rank=0, world_size=1, start_step=0, end_step=6):
        run.push_weights(weights(inputs, batch.step), step=batch.step)
        run.flush()
    # Step 6 is scored with the push of step 4; step 7 with that of step 5.
    until = run.select(6, rank=0, world_size=1)
    assert until.receipt.learner.step == 4
    assert len(snapshots(tmp_path, "kept")) <= 3, (
        "those of steps 4 and 5, and one that is on its way out"
    )
    with pytest.raises(superbatch.Error, match="snapshots_kept") as caught:
        run.rewind(3, mode="reselect")
    assert reason(caught) == "WEIGHTS_MISSING"
    assert run.rewind(3, mode="replay") == 1


def test_a_refused_push_is_not_waited_for(inputs, service):
    run = superbatch.connect(service.address).open_run(
        spec(
            inputs,
            "not-waited",
            lag=superbatch.Lag(exact=0),
            fallback="uniform",
            need_deadline_seconds=LONG_SECONDS,
        )
    )
    run.select(0, rank=0, world_size=1)
    bad = {
        name: tensor * float("nan")
        for name, tensor in load_file(inputs / "learner/model.safetensors").items()
    }
    with pytest.raises(superbatch.WeightsRefused):
        run.push_weights(bad, step=0)
        run.flush()
    assert run.select(1, rank=0, world_size=1).receipt.mode == "uniform"


def test_a_reference_that_was_trained_anew_is_refused(inputs, serve, tmp_path):
    folder = tmp_path / "reference"
    shutil.copytree(inputs / "reference", folder)
    asked = spec(inputs, "retrained", reference=folder.as_uri(), phases=[phase(criterion="easy")])
    first = serve()
    superbatch.connect(first.address).open_run(asked).select(0, rank=0, world_size=1)
    first.stop()
    shutil.copy(inputs / "learner" / "model.safetensors", folder / "model.safetensors")
    run = superbatch.connect(serve().address).open_run(asked)
    assert len(run.select(0, rank=0, world_size=1)) == 24, "what was chosen is served"
    with pytest.raises(superbatch.Error, match="reference") as caught:
        run.select(2, rank=0, world_size=1)
    assert reason(caught) == "MODEL_INVALID"


def test_a_worker_of_another_state_ends_and_says_why(tmp_path):
    with Cluster(tmp_path) as cluster:
        elsewhere = (tmp_path / "elsewhere").as_uri()
        ended = subprocess.run(
            [
                BINARY,
                "worker",
                "--coordinator",
                cluster.address,
                "--listen",
                "127.0.0.1:0",
                "--state",
                elsewhere,
            ],
            capture_output=True,
            text=True,
            timeout=DEADLINE_SECONDS,
        )
        assert ended.returncode == 1
        said = ended.stderr.splitlines()[-2]
        assert (
            said.startswith("superbatch: ")
            and elsewhere in said
            and cluster.state in said
            and "`state`" in said
        )


def test_a_log_tells_of_a_process_from_its_state_to_its_end(tmp_path):
    with Cluster(tmp_path, workers=1) as cluster:
        worker, coordinator = cluster.workers[0], cluster.coordinator
        for process in (worker, coordinator):
            process.stop()
    for process, expected in [
        # A worker leaves while it drains: which of the two it says first is not fixed.
        (worker, ["state opened", "registered", "draining", "stopped"]),
        (worker, ["state opened", "registered", "left the coordinator", "stopped"]),
        (coordinator, ["state opened", "worker registered", "worker left", "draining", "stopped"]),
    ]:
        text = process.log.read_text()
        places = [text.find(line) for line in expected]
        assert -1 not in places and places == sorted(places), text
        assert cluster.state in text and "registered again" not in text


def test_a_file_that_may_not_grow_is_reported(tmp_path):
    """By itself the signal of that limit ends a process without a word."""
    ended = subprocess.run(
        [BINARY, "serve", "--listen", "127.0.0.1:0", "--state", (tmp_path / "state").as_uri()],
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1, 1)),
    )
    assert ended.returncode == 1 and "File too large" in ended.stderr
