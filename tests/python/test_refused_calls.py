"""Calls of an open run that are refused: steps, pushes and messages that do not belong."""

import pytest
import superbatch
from cluster import Cluster
from grpc_apart import Refused
from refusal import opening, refused
from safetensors.torch import load_file
from test_end_to_end import inputs, phase, reason, service, spec, weights  # noqa: F401
from test_grpc_plain import SELECTION, error_info, plain  # noqa: F401

MESSAGE_BYTES_MAX = 8 << 20


def test_stragglers_of_a_trainer_that_was_restarted(inputs, service):
    client = superbatch.connect(service.address)
    old = client.open_run(spec(inputs, "restarted"), incarnation="old")
    old.select(0, rank=0, world_size=2)
    refused(
        lambda: old.select(0, rank=1, world_size=3),
        "WORLD_SIZE_CONFLICT",
        "2 ranks",
        rank="1",
        step="0",
    )
    refused(lambda: old.select(0, rank=3, world_size=2), "RANK_OUT_OF_RANGE", rank="3")
    new = client.open_run(spec(inputs, "restarted"), incarnation="new")
    assert len(new.select(0, rank=2, world_size=3)) == 8
    refused(lambda: old.select(0, rank=1, world_size=2), "WORLD_SIZE_CONFLICT", "'new'", rank="1")


def test_steps_beyond_what_may_be_asked_for(inputs, service):
    run = superbatch.connect(service.address).open_run(spec(inputs, "ahead", max_ahead=3))
    refused(
        lambda: run.select(3, rank=0, world_size=1),
        "STEP_BEYOND_AHEAD",
        "max_ahead",
        step="3",
        newest_allowed="2",
    )
    assert len(run.select(1, rank=0, world_size=1)) == 24
    refused(lambda: run.receipt(77), "STEP_NOT_COMMITTED", step="77")


def test_a_closed_run_serves_its_receipts_alone(inputs, service):
    client = superbatch.connect(service.address)
    run = client.open_run(spec(inputs, "closed"))
    ids = run.select(0, rank=0, world_size=1)["_superbatch_id"].to_pylist()
    run.close()
    for ask in (
        lambda: run.select(0, rank=0, world_size=1),
        lambda: run.rewind(0, mode="replay"),
        lambda: run.append_phases([phase(from_step=9)]),
        lambda: (run.push_weights(weights(inputs, 0), step=0), run.flush()),
    ):
        refused(ask, "RUN_CLOSED")
    assert sorted(row.id for row in run.receipt(0).chosen) == sorted(ids)
    assert [known.state for known in client.list_runs() if known.run_id == "closed"] == ["closed"]


def test_weights_that_nobody_brings(inputs, service):
    learner = superbatch.Learner(model_uri=(inputs / "learner").as_uri(), first_push=True)
    run = superbatch.connect(service.address).open_run(
        spec(
            inputs, "unpushed", learner=learner, need_deadline_seconds=0.5, stall_grace_seconds=0.0
        )
    )
    # Its only rank stands still, and no push is on its way: no deadline needs to pass.
    refused(lambda: run.select(0, rank=0, world_size=1), "WEIGHTS_MISSING", "step -1", step="0")
    run.push_weights(weights(inputs, 0), step=0)
    run.flush()
    refused(
        lambda: run.select(0, rank=0, world_size=1),
        "NEED_DEADLINE",
        "that of step 0 is here",
        step="0",
    )
    run.push_weights(weights(inputs, 0), step=-1)
    run.flush()
    assert run.select(0, rank=0, world_size=1).receipt.learner.step == -1

    # Of two ranks one stands still: the other might push yet, until the deadline.
    run = superbatch.connect(service.address).open_run(
        spec(inputs, "unpushed-by-two", learner=learner, need_deadline_seconds=0.1)
    )
    refused(lambda: run.select(0, rank=0, world_size=2), "NEED_DEADLINE", "step -1", step="0")


def test_pushes_that_do_not_belong(inputs, service):
    client = superbatch.connect(service.address)

    def push(run: superbatch.Run, step: int, **settings):
        tensors = load_file(inputs / "learner/model.safetensors")
        parts = [
            (name, tensor, tensor.shape, [0] * tensor.dim()) for name, tensor in tensors.items()
        ]
        return lambda: (
            run.push_parts(parts, step=step, expected_parts=len(parts), **settings),
            run.flush(),
        )

    rare = client.open_run(spec(inputs, "rare", push_every_steps=2))
    refused(push(rare, 0), "PUSH_OFF_CADENCE", "the next is due after step 1", step="0")
    refused(push(rare, -1), "PUSH_OFF_CADENCE", "first_push", step="-1")
    push(rare, 1, push_id="mine")()
    push(rare, 1, push_id="mine")()
    assert (
        'push published already run="rare" step=1 version=1' in service.coordinator.log.read_text()
    )
    refused(push(rare, 1, push_id="other"), "PUSH_CONFLICT", push_id="mine")
    assert rare.get_run().learner.version == 1


def test_a_push_over_the_limit(inputs, tmp_path):
    with Cluster(
        tmp_path, environment={"SUPERBATCH_COORDINATOR__PUSH_BYTES_MAX": "1000"}
    ) as cluster:
        run = superbatch.connect(cluster.address).open_run(spec(inputs, "heavy"))

        def push():
            run.push_weights(weights(inputs, 0), step=0)
            run.flush()

        error = refused(push, "MESSAGE_TOO_LARGE", "coordinator.push_bytes_max")
        assert error.metadata["tensor"] in weights(inputs, 0)
        assert run.get_run().learner.version == 0, "the old version serves on"


# -------------------------------------------------------------------------------------- what no
# client of ours would send


def failed(call) -> Refused:
    with pytest.raises(Refused) as caught:
        list(call())
    return caught.value


def test_a_message_over_the_limit_is_refused_with_its_reason(inputs, service, plain):
    superbatch.connect(service.address).open_run(spec(inputs, "large"))
    error = failed(lambda: [plain.call(SELECTION, "GetRun", run_id="x" * (MESSAGE_BYTES_MAX + 1))])
    assert error.code == "RESOURCE_EXHAUSTED", error
    assert error_info(error).reason == "MESSAGE_TOO_LARGE"
    start = plain.message("superbatch.v1.PushStart", run_id="large", step=0, push_id="p")
    large = plain.message("superbatch.v1.PushWeightsRequest", data=bytes(MESSAGE_BYTES_MAX + 1))
    requests = [plain.message("superbatch.v1.PushWeightsRequest", start=start), large]
    error = failed(lambda: [plain.call(SELECTION, "PushWeights", requests)])
    assert error.code == "RESOURCE_EXHAUSTED", error
    assert error_info(error).reason == "MESSAGE_TOO_LARGE"
    # The service is as it was.
    assert plain.call(SELECTION, "GetRun", run_id="large").run.summary.run_id == "large"


def test_requests_out_of_order_are_refused_by_field(inputs, service, plain):
    superbatch.connect(service.address).open_run(spec(inputs, "odd"))
    request = plain.message("superbatch.v1.PushWeightsRequest", data=b"1234")
    error = failed(lambda: [plain.call(SELECTION, "PushWeights", [request])])
    assert error_info(error).metadata["field"] == "start"
    for fields, field in [
        ({"resume_offset": 1 << 40}, "resume_offset"),
        ({"generation": 7}, "generation"),
    ]:
        error = failed(
            lambda: plain.call(SELECTION, "SelectBatch", run_id="odd", world_size=1, **fields)
        )
        assert error_info(error).metadata["field"] == field
    error = failed(lambda: plain.call(SELECTION, "SelectBatch", run_id="odd", world_size=0))
    assert error_info(error).reason == "WORLD_SIZE_INVALID"
