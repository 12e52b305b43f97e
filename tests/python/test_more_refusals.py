"""More of what is refused by the real binary: each with its reason, the values that a program may
want, and what to do.
"""

import shutil

import numpy
import pyarrow
import pyarrow.parquet
import superbatch
from cluster import Cluster
from refusal import opening, refused
from test_end_to_end import inputs, phase, service, spec  # noqa: F401

from examples.demo import tiny


def changed(inputs, folder, column: str, values) -> str:
    """The URI of a copy of the data whose second shard has other `values` in a column."""
    shutil.copytree(inputs / "pool", folder)
    path = sorted(folder.iterdir())[1]
    table = pyarrow.parquet.read_table(path)
    table = table.set_column(table.schema.get_field_index(column), column, values(table))
    pyarrow.parquet.write_table(table, path, row_group_size=64)
    return folder.as_uri()


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


def test_a_shard_that_is_gone_is_refused_by_name_until_it_is_back(inputs, tmp_path):
    shutil.copytree(inputs / "pool", tmp_path / "pool")
    asked = spec(inputs, "gone", sources=[(tmp_path / "pool").as_uri()])
    with Cluster(tmp_path / "service") as cluster:
        run = superbatch.connect(cluster.address).open_run(asked)
        first = run.select(0, rank=0, world_size=1)["_superbatch_id"].to_pylist()
        cluster.coordinator.kill()
        shards = sorted((tmp_path / "pool").iterdir())
        for path in shards:
            path.rename(tmp_path / path.name)
        cluster.start_coordinator("again")
        run = superbatch.connect(cluster.address).open_run(asked)
        error = refused(
            lambda: run.select(0, rank=0, world_size=1), "DATASET_CHANGED", "it is gone"
        )
        assert error.metadata["shard"].endswith(".parquet")
        for path in shards:
            (tmp_path / path.name).rename(path)
        assert run.select(0, rank=0, world_size=1)["_superbatch_id"].to_pylist() == first


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


def test_a_rotten_shard_is_named_once_by_steps_that_read_what_they_serve(inputs, tmp_path):
    shutil.copytree(inputs / "pool", tmp_path / "pool")
    random = numpy.random.default_rng(3)
    for number, path in enumerate(sorted((tmp_path / "pool").iterdir())):
        table = pyarrow.parquet.read_table(path)
        table = table.append_column("value", pyarrow.array(random.random(table.num_rows)))
        if number == 1:
            images = pyarrow.array([b"no picture"] * table.num_rows, pyarrow.binary())
            table = table.set_column(table.schema.get_field_index("png"), "png", images)
        pyarrow.parquet.write_table(table, path, row_group_size=64)
    # All rows are candidates of each step, and about 100 are read.
    sizes = {"super_batch_size": 768, "sub_batch_size": 48, "n_chunks": 1}
    column = {"criterion": "column", "score_columns": [superbatch.ScoreColumn(name="value")]}
    phases = {
        "rotten-uniform": phase(policy="uniform", **sizes),
        "rotten-column": phase(policy="top_k", **sizes, **column),
    }
    with Cluster(tmp_path / "service") as cluster:
        for name, asked in phases.items():
            asked = spec(
                inputs,
                name,
                sources=[(tmp_path / "pool").as_uri()],
                phases=[asked],
                lag=superbatch.at_most(8),
                max_ahead=1,
            )
            run = superbatch.connect(cluster.address).open_run(asked)
            for step in range(2):
                run.select(step, rank=0, world_size=1)
            assert 48 < run.receipt(0).summary.cost.candidates_scanned < 384
            lines = cluster.coordinator.log.read_text().splitlines()
            told = [line for line in lines if "most rows of a shard" in line and name in line]
            assert len(told) == 1 and "00001.parquet" in told[0]
        assert cluster.coordinator.metric("superbatch_rotten_shards_total") == 2


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


def test_a_model_without_a_bias_needs_one_for_the_sigmoid_loss(inputs, service, tmp_path):
    clip = tiny.write_clip(tmp_path / "clip").as_uri()
    learner = superbatch.Learner(model_uri=clip, random_seed=0)
    refused(opening(service, spec(inputs, "unbiased", reference=clip)), "BIAS_MISSING", "reference")
    refused(opening(service, spec(inputs, "unbiased", learner=learner)), "BIAS_MISSING", "learner")
    given = superbatch.Reference(model_uri=clip, logit_bias=-10.0)
    run = superbatch.connect(service.address).open_run(spec(inputs, "biased", reference=given))
    assert run.select(0, rank=0, world_size=1).receipt.reference_bias == -10.0
