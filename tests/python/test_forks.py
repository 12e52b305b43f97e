"""Forks: a run that goes on from another run's history."""

import json

import pytest
import superbatch
from cluster import Cluster
from commands import prints
from test_end_to_end import inputs, phase, reason, spec, train  # noqa: F401

#: Steps of the other run, and the first step of its forks.
STEPS, AT = 6, 4


def chosen(run: superbatch.Run, step: int) -> list[str]:
    return [row.id for row in run.receipt(step).chosen]


def forked(inputs, run_id: str, step: int = AT, of: str = "first", **changes) -> superbatch.RunSpec:
    return spec(inputs, run_id, fork_of=superbatch.Fork(run_id=of, step=step), **changes)


@pytest.fixture
def cluster(inputs, tmp_path):  # noqa: F811
    with Cluster(tmp_path) as cluster:
        first = superbatch.connect(cluster.address).open_run(spec(inputs, "first"))
        train(first, inputs, end=STEPS)
        yield cluster


def test_a_fork_goes_on_where_it_left_the_other_run(inputs, cluster, tmp_path):  # noqa: F811
    client = superbatch.connect(cluster.address)
    first = client.open_run(spec(inputs, "first"))
    scanned = sum(first.receipt(step).summary.cost.candidates_scanned for step in range(AT))
    fork = client.open_run(forked(inputs, "fork"))
    assert fork.next_step == AT and fork.missing_pushes(AT) == []
    assert fork.get_run().candidates_scanned >= scanned
    old = fork.receipt(1)
    assert old.summary.run_id == "first" and old.chosen == first.receipt(1).chosen
    served = fork.select(1, rank=0, world_size=1)
    assert sorted(served["_superbatch_id"].to_pylist()) == sorted(chosen(first, 1))
    # With the same spec and weights it goes the same way, by receipts of its own.
    train(fork, inputs, start=AT, end=STEPS)
    assert [chosen(fork, step) for step in range(STEPS)] == [
        chosen(first, step) for step in range(STEPS)
    ]
    assert fork.receipt(AT).summary.run_id == "fork"

    # A fork of the fork takes another way, and what it comes from is not touched.
    other = [phase(), phase(from_step=5, criterion="hard")]
    second = client.open_run(forked(inputs, "second", step=5, of="fork", phases=other))
    train(second, inputs, start=5, end=STEPS)
    assert chosen(second, AT) == chosen(fork, AT)
    assert second.receipt(5).summary.criterion == "hard"
    assert fork.receipt(5).summary.criterion == "learnability"

    # All of it is known after a restart, and on the command line.
    cluster.coordinator.kill()
    cluster.start_coordinator("again")
    second = superbatch.connect(cluster.address).open_run(
        forked(inputs, "second", step=5, of="fork", phases=other)
    )
    assert second.next_step >= STEPS and chosen(second, 0) == chosen(first_of(cluster, inputs), 0)
    state = ["--state", (tmp_path / "state").as_uri()]
    # A step ahead of the trainer may be decided too.
    lines = prints("receipts", "second", "--last", second.next_step, "--json", *state).splitlines()
    runs = [json.loads(line)["summary"]["run_id"] for line in lines]
    assert runs[:STEPS] == ["first"] * AT + ["fork", "second"]
    own = f"ok: {second.next_step - 5} receipts"
    assert prints("state", "check", "second", *state).startswith(own)


def first_of(cluster, inputs) -> superbatch.Run:  # noqa: F811
    return superbatch.connect(cluster.address).open_run(spec(inputs, "first"))


def test_a_fork_that_cannot_be_is_refused(inputs, cluster):  # noqa: F811
    client = superbatch.connect(cluster.address)
    for refused, why, field in [
        (forked(inputs, "a", step=100 * STEPS), "STEP_NOT_COMMITTED", None),
        (forked(inputs, "b", of="none"), "RUN_NOT_FOUND", None),
        (forked(inputs, "c", seed=77), "RUN_SPEC_CONFLICT", "seed"),
        (
            forked(inputs, "d", phases=[phase(criterion="hard")]),
            "RUN_SPEC_CONFLICT",
            "phases[0].criterion",
        ),
    ]:
        with pytest.raises(superbatch.Error) as caught:
            client.open_run(refused)
        assert reason(caught) == why and caught.value.metadata.get("field") == field
    assert [run.run_id for run in client.list_runs()] == ["first"]


def test_a_fork_rewinds_into_the_other_runs_steps(inputs, cluster):  # noqa: F811
    client = superbatch.connect(cluster.address)
    fork = client.open_run(forked(inputs, "fork"))
    before = [chosen(fork, step) for step in range(AT)]
    fork.rewind(2, mode="reselect")
    fork = client.open_run(forked(inputs, "fork"))
    assert fork.next_step == 2 and chosen(fork, 1) == before[1]
    # The weights of that time are not the fork's: the trainer brings those of its checkpoint.
    assert fork.missing_pushes(2) == [0, 1]
    with pytest.raises(superbatch.Error) as caught:
        fork.receipt(3)
    assert reason(caught) == "STEP_NOT_COMMITTED"


def test_a_fork_has_the_reference_of_its_phases(inputs, cluster):  # noqa: F811
    # Step 4 and those after it are scored with the weights after steps 2 and later, against those
    # of step 0.
    own = [phase(policy="uniform"), phase(from_step=2, reference_step=0)]
    client = superbatch.connect(cluster.address)
    first = client.open_run(spec(inputs, "own", phases=own, reference=None, loss="softmax"))
    train(first, inputs, end=STEPS)
    changes = {"phases": own, "reference": None, "loss": "softmax", "fallback": "uniform"}
    fork = client.open_run(forked(inputs, "fork", of="own", **changes))
    train(fork, inputs, start=AT, end=STEPS)
    for step in range(AT, STEPS):
        summary = fork.receipt(step).summary
        assert summary.mode == "normal"
        assert summary.reference_digest == first.receipt(step).summary.reference_digest
        assert chosen(fork, step) == chosen(first, step)


def test_a_fork_of_a_rolled_back_run_is_scored_as_that_run_was(
    inputs,  # noqa: F811
    cluster,
    tmp_path,
):
    client = superbatch.connect(cluster.address)
    client.open_run(spec(inputs, "first")).roll_back_weights(1)
    fork = client.open_run(forked(inputs, "fork"))
    assert fork.missing_pushes(AT) == []
    fork.select(AT, rank=0, world_size=1)
    # Under exact(1) the push after step 2 is due, and the one after step 0 serves for it.
    learner = fork.receipt(AT).summary.learner
    assert (learner.version, learner.step) == (1, 0)
    assert fork.receipt(AT).summary.mode == "stale"
    assert [kept.replaced_by for kept in fork.weights()] == [1, 1, None]

    # Only the weights of version 1 were copied, and they serve for all: none is lost, and the run
    # is left with them once it is over.
    state = ["--state", (tmp_path / "state").as_uri()]
    assert prints("state", "check", "fork", *state).startswith("ok: ")
    fork.close()
    assert "snapshots/" not in prints("state", "gc", "fork", *state)
    assert prints("state", "check", "fork", *state).endswith(" 1 weights files\n")
