"""More of what is refused by the real binary: each with its reason, the values that a program may
want, and what to do.
"""

import shutil

import grpc
import pyarrow
import pyarrow.parquet
import pytest
import superbatch
from cluster import Cluster
from safetensors.torch import load_file
from test_end_to_end import inputs, phase, reason, service, spec, train, weights  # noqa: F401
from test_grpc_plain import SELECTION, Plain, error_info, plain  # noqa: F401

from examples.demo import tiny

MESSAGE_BYTES_MAX = 8 << 20


def refused(ask, wanted: str, says: str = "", **metadata: str) -> superbatch.Error:
    """`ask` fails for this reason; the message holds `says`, and the metadata these values."""
    with pytest.raises(superbatch.Error) as caught:
        ask()
    error = caught.value
    assert reason(caught) == wanted, error
    assert says in str(error), error
    assert metadata.items() <= error.metadata.items(), error.metadata
    return error


def opening(service, asked: superbatch.RunSpec):
    return lambda: superbatch.connect(service.address).open_run(asked)


def changed(inputs, folder, column: str, values) -> str:
    """The URI of a copy of the data whose second shard has other `values` in a column."""
    shutil.copytree(inputs / "pool", folder)
    path = sorted(folder.iterdir())[1]
    table = pyarrow.parquet.read_table(path)
    table = table.set_column(table.schema.get_field_index(column), column, values(table))
    pyarrow.parquet.write_table(table, path, row_group_size=64)
    return folder.as_uri()


# ------------------------------------------------------------------------------------------------------------
# data


def test_sources_that_do_not_fit_together(inputs, service, tmp_path):
    numbers = lambda table: pyarrow.array(range(table.num_rows))  # noqa: E731
    mixed = changed(inputs, tmp_path / "mixed", "kind", numbers)
    # A column that nobody asks for may differ.
    run = superbatch.connect(service.address).open_run(spec(inputs, "mixed", sources=[mixed]))
    assert len(run.select(0, rank=0, world_size=1)) == 24
    asked = spec(inputs, "mixed-asked", sources=[mixed], columns=["kind"])
    refused(
        opening(service, asked),
        "SCHEMA_MISMATCH",
        source=mixed,
        column="kind",
        shard="00001.parquet",
    )

    captions = changed(inputs, tmp_path / "captions", "caption", numbers)
    error = refused(
        opening(service, spec(inputs, "captions", sources=[captions])),
        "SCHEMA_MISMATCH",
        column="caption",
    )
    assert error.metadata["shard"].endswith("00001.parquet") and "Int64" in str(error)

    whole = tmp_path / "whole"
    whole.mkdir()
    table = pyarrow.parquet.read_table(inputs / "pool")
    table = table.set_column(table.schema.get_field_index("kind"), "kind", numbers(table))
    pyarrow.parquet.write_table(table, whole / "a.parquet", row_group_size=64)
    both = [(inputs / "pool").as_uri(), whole.as_uri()]
    refused(
        opening(service, spec(inputs, "both", sources=both, columns=["kind"])),
        "SCHEMA_MISMATCH",
        "Utf8",
        source=whole.as_uri(),
        column="kind",
    )


def test_a_column_that_is_not_there_is_answered_with_those_that_are(inputs, service):
    asked = spec(inputs, "column", columns=["kind", "colour"])
    error = refused(opening(service, asked), "COLUMN_NOT_FOUND", column="colour")
    assert set(error.metadata["available"].split(", ")) == {
        "key",
        "png",
        "caption",
        "kind",
        "split",
    }
    for column in ("image", "caption", "_superbatch_id"):
        refused(
            opening(service, spec(inputs, "taken", columns=[column])),
            "RUN_SPEC_IMPOSSIBLE",
            column,
            field="columns[0]",
        )


def test_a_super_batch_is_at_most_the_data(inputs, service):
    uniform = {"policy": "uniform", "n_chunks": 1}
    asked = spec(inputs, "larger", phases=[phase(super_batch_size=769, **uniform)])
    refused(
        opening(service, asked), "DATASET_TOO_SMALL", "super_batch_size", rows="768", needed="769"
    )
    run = superbatch.connect(service.address).open_run(
        spec(inputs, "largest", phases=[phase(super_batch_size=768, **uniform)], epochs=1)
    )
    assert run.dataset.steps_total == 1
    assert len(run.select(0, rank=0, world_size=1)) == 24
    refused(lambda: run.select(1, rank=0, world_size=1), "END_OF_DATA", "epochs", step="1")


def test_a_shard_that_changed_after_its_step_was_chosen(inputs, tmp_path):
    shutil.copytree(inputs / "pool", tmp_path / "pool")
    asked = spec(inputs, "changed", sources=[(tmp_path / "pool").as_uri()])
    with Cluster(tmp_path / "service") as cluster:
        run = superbatch.connect(cluster.address).open_run(asked)
        first = run.select(0, rank=0, world_size=1)["_superbatch_id"].to_pylist()
        cluster.coordinator.kill()
        for path in (tmp_path / "pool").iterdir():
            table = pyarrow.parquet.read_table(path)
            captions = pyarrow.array(["another caption"] * table.num_rows)
            table = table.set_column(table.schema.get_field_index("caption"), "caption", captions)
            pyarrow.parquet.write_table(table, path, row_group_size=64)
        cluster.start_coordinator("again")
        run = superbatch.connect(cluster.address).open_run(asked)
        error = refused(lambda: run.select(0, rank=0, world_size=1), "DATASET_CHANGED")
        assert error.metadata["shard"].endswith(".parquet")
        assert sorted(row.id for row in run.receipt(0).chosen) == sorted(first), (
            "the receipt is there as before"
        )


def test_too_few_rows_that_can_be_used(inputs, service, tmp_path):
    table = pyarrow.parquet.read_table(inputs / "pool")
    broken = pyarrow.array([b"no picture"] * table.num_rows, pyarrow.binary())
    table = table.set_column(table.schema.get_field_index("png"), "png", broken)
    (tmp_path / "bad").mkdir()
    pyarrow.parquet.write_table(table, tmp_path / "bad" / "a.parquet", row_group_size=64)
    for policy in ("joint", "uniform"):
        asked = spec(
            inputs,
            f"bad-{policy}",
            sources=[(tmp_path / "bad").as_uri()],
            phases=[phase(policy=policy)],
        )
        run = superbatch.connect(service.address).open_run(asked)
        error = refused(
            lambda: run.select(0, rank=0, world_size=1),
            "TOO_MANY_BAD_ROWS",
            "sub_batch_size",
            candidates="96",
            holes="96",
        )
        assert "a.parquet" in str(error) and "IMAGE" in str(error), "it names a row and why"
        refused(
            lambda: run.receipt(0),
            "STEP_NOT_COMMITTED",
            "in generation 0",
            step="0",
            generation="0",
        )


def test_a_run_with_too_many_bad_rows_fails_in_one_way(inputs, service, tmp_path):
    table = pyarrow.parquet.read_table(inputs / "pool").slice(0, 96)
    images = table.column("png").to_pylist()
    images = pyarrow.array(
        [b"no picture" if row % 2 else image for row, image in enumerate(images)], pyarrow.binary()
    )
    table = table.set_column(table.schema.get_field_index("png"), "png", images)
    (tmp_path / "bad").mkdir()
    pyarrow.parquet.write_table(table, tmp_path / "bad" / "a.parquet", row_group_size=64)
    easy = phase(criterion="easy", super_batch_size=96)
    # Nothing is judged before 1,000 candidates, of which 100 may be bad: 48 are in each step.
    asked = spec(
        inputs, "half-bad", sources=[(tmp_path / "bad").as_uri()], phases=[easy], max_ahead=1
    )
    run = superbatch.connect(service.address).open_run(asked)
    for step in range(2):
        run.select(step, rank=0, world_size=1)
    for step in (2, 3, 2):
        error = refused(
            lambda: run.select(step, rank=0, world_size=1), "RUN_FAILED", "max_bad_row_share"
        )
        assert "a.parquet" in str(error) and "144 of 288 candidates" in str(error)
    assert "a.parquet" in run.get_run().failure


def test_uris_that_the_operator_does_not_allow(inputs, tmp_path):
    pool, learner, reference = (
        (inputs / name).as_uri() for name in ("pool", "learner", "reference")
    )
    allowed = {"SUPERBATCH_STORAGE__ALLOW_URIS": f"[{pool}]"}
    phases = [phase(policy="uniform", n_chunks=1)]
    with Cluster(tmp_path, environment=allowed) as cluster:
        uniform = {"phases": phases, "reference": None, "learner": None}
        assert (
            superbatch.connect(cluster.address)
            .open_run(spec(inputs, "allowed", **uniform))
            .dataset.dataset_rows
            == 768
        )
        refused(
            opening(cluster, spec(inputs, "model")),
            "URI_NOT_ALLOWED",
            "storage.allow_uris",
            uri=reference,
        )
        for uri in (learner, f"{pool}/../learner", f"{pool}-2", "s3://elsewhere/pool"):
            refused(
                opening(cluster, spec(inputs, "data", sources=[uri], **uniform)),
                "URI_NOT_ALLOWED",
                uri=uri,
            )


# ----------------------------------------------------------------------------------------------------------
# models


def test_a_model_without_a_bias_needs_one_for_the_sigmoid_loss(inputs, service, tmp_path):
    clip = tiny.write_clip(tmp_path / "clip").as_uri()
    learner = superbatch.Learner(model_uri=clip, random_seed=0)
    refused(opening(service, spec(inputs, "unbiased", reference=clip)), "BIAS_MISSING", "reference")
    refused(opening(service, spec(inputs, "unbiased", learner=learner)), "BIAS_MISSING", "learner")
    given = superbatch.Reference(model_uri=clip, logit_bias=-10.0)
    run = superbatch.connect(service.address).open_run(spec(inputs, "biased", reference=given))
    assert run.select(0, rank=0, world_size=1).receipt.reference_bias == -10.0


# ----------------------------------------------------------------------------------------------------
# ranks and steps


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


# ----------------------------------------------------------------------------------------------------------
# weights


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


def failed(call) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as caught:
        list(call())
    return caught.value


@pytest.mark.parametrize(
    ("delivery", "feature"), [(2, "DELIVERY_LOCATORS"), (3, "DELIVERY_WORKER_DIRECT")]
)
def test_deliveries_that_are_not_built_are_named(inputs, service, plain, delivery, feature):
    superbatch.connect(service.address).open_run(spec(inputs, "delivery"))
    error = failed(
        lambda: plain.call(
            SELECTION, "SelectBatch", run_id="delivery", world_size=1, delivery=delivery
        )
    )
    assert error.code() == grpc.StatusCode.UNIMPLEMENTED and feature in error.details()
    info = error_info(error)
    assert (info.reason, info.metadata["feature"]) == ("UNIMPLEMENTED", feature)


def test_forks_and_pushes_of_changed_tensors_alone_are_not_built_and_named(inputs, service, plain):
    fork = superbatch.Fork(run_id="other", step=3)
    refused(
        opening(service, spec(inputs, "fork", fork_of=fork)),
        "UNIMPLEMENTED",
        "fork_of",
        feature="fork_of",
    )
    superbatch.connect(service.address).open_run(spec(inputs, "partial"))
    start = plain.message(
        "superbatch.v1.PushStart", run_id="partial", step=0, push_id="p", base_version=0
    )
    request = plain.message("superbatch.v1.PushWeightsRequest", start=start)
    error = failed(lambda: [plain.call(SELECTION, "PushWeights", iter([request]))])
    assert error.code() == grpc.StatusCode.UNIMPLEMENTED
    info = error_info(error)
    assert (info.reason, info.metadata["feature"]) == ("UNIMPLEMENTED", "base_version")


def test_a_message_over_the_limit_is_refused_with_its_reason(inputs, service, plain):
    superbatch.connect(service.address).open_run(spec(inputs, "large"))
    error = failed(lambda: [plain.call(SELECTION, "GetRun", run_id="x" * (MESSAGE_BYTES_MAX + 1))])
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED, error
    assert error_info(error).reason == "MESSAGE_TOO_LARGE"
    start = plain.message("superbatch.v1.PushStart", run_id="large", step=0, push_id="p")
    large = plain.message("superbatch.v1.PushWeightsRequest", data=bytes(MESSAGE_BYTES_MAX + 1))
    requests = [plain.message("superbatch.v1.PushWeightsRequest", start=start), large]
    error = failed(lambda: [plain.call(SELECTION, "PushWeights", iter(requests))])
    assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED, error
    assert error_info(error).reason == "MESSAGE_TOO_LARGE"
    # The service is as it was.
    assert plain.call(SELECTION, "GetRun", run_id="large").run.summary.run_id == "large"


def test_requests_out_of_order_are_refused_by_field(inputs, service, plain):
    superbatch.connect(service.address).open_run(spec(inputs, "odd"))
    request = plain.message("superbatch.v1.PushWeightsRequest", data=b"1234")
    assert (
        error_info(
            failed(lambda: [plain.call(SELECTION, "PushWeights", iter([request]))])
        ).metadata["field"]
        == "start"
    )
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
