"""A Parquet file of one large row group, as pandas and pyarrow write it if they are not told."""

import subprocess
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import superbatch
from cluster import BINARY, DEADLINE_SECONDS, Cluster
from test_embed import embeds
from test_end_to_end import choices, inputs, spec, train  # noqa: F401
from test_tar import index

#: The pool this many times is more than 10,000 rows.
COPIES = 14
STEPS = 2


@pytest.fixture(scope="module")
def table(inputs) -> pyarrow.Table:  # noqa: F811
    pool = pyarrow.parquet.read_table(inputs / "pool")
    return pyarrow.concat_tables([pool] * COPIES)


@pytest.fixture(scope="module")
def data(table, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("large")
    pyarrow.parquet.write_table(table, folder / "0.parquet", row_group_size=len(table))
    return folder


def reference_objects(cluster: Cluster) -> list[Path]:
    folder = superbatch_state(cluster) / "reference"
    return sorted(folder.iterdir()) if folder.is_dir() else []


def superbatch_state(cluster: Cluster) -> Path:
    return Path(cluster.state.removeprefix("file://"))


def test_a_step_embeds_no_more_of_a_large_group_than_it_scores(
    inputs,  # noqa: F811
    table,
    data,
    tmp_path,
):
    asked = spec(inputs, "large", sources=[data.as_uri()])
    with Cluster(tmp_path / "one") as cluster:
        run = superbatch.connect(cluster.address).open_run(asked)
        ids = train(run, inputs, end=STEPS)
        chosen = choices(run, STEPS)
        for step in range(STEPS):
            cost = run.receipt(step).summary.cost
            # Both models have one shape. The whole group would cost a hundred times as much.
            assert 0 < cost.reference_flops < 2 * cost.learner_flops
        assert not reference_objects(cluster), "nothing is kept of a group in part"
        batch = run.select(1, rank=0, world_size=1)
        for row, image in zip(
            batch["_superbatch_id"].to_pylist(), batch["image"].to_pylist(), strict=True
        ):
            assert image == table["png"][int(row.rsplit("#", 1)[1])].as_py(), row
    with Cluster(tmp_path / "two", workers=2) as cluster:
        run = superbatch.connect(cluster.address).open_run(asked)
        assert train(run, inputs, end=STEPS) == ids
        assert choices(run, STEPS) == chosen


def test_a_large_group_that_was_embedded_ahead_is_found(
    inputs,  # noqa: F811
    table,
    data,
    tmp_path,
):
    with Cluster(tmp_path) as cluster:
        made = embeds(cluster.state, inputs / "reference", data)
        assert (made["blocks"], made["rows"]) == (1, len(table))
        assert len(reference_objects(cluster)) == 1
        asked = spec(inputs, "ahead", sources=[data.as_uri()])
        run = superbatch.connect(cluster.address).open_run(asked)
        train(run, inputs, end=STEPS)
        for step in range(STEPS):
            cost = run.receipt(step).summary.cost
            assert cost.reference_flops == 0 and cost.learner_flops > 0


def test_indexing_tells_of_a_large_group_and_of_the_cure(data, table, tmp_path):
    ended = index(tmp_path / "state", data.as_uri())
    assert f'"block_rows_max":{len(table)}' in ended.stdout, ended.stderr
    assert "0.parquet" in ended.stderr and "row_group_size" in ended.stderr, "the log"

    def text(folder: Path) -> str:
        command = [BINARY, "index", folder.as_uri(), "--state", (tmp_path / "state").as_uri()]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_SECONDS)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    assert f"row groups of up to {len(table)} rows" in text(data)
    small = tmp_path / "small"
    small.mkdir()
    pyarrow.parquet.write_table(table, small / "0.parquet", row_group_size=10_000)
    assert "row groups of up to" not in text(small)
