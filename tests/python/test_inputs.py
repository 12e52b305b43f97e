"""Data sets as people have them: odd names, failed downloads, neighbours that are no data. Every
served row is compared with pyarrow.
"""

import os
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import superbatch
from cluster import Cluster
from s3_store import BUCKET, command, credentials, remote, store  # noqa: F401
from test_end_to_end import inputs, phase, reason, service, spec  # noqa: F401
from test_tar import index

NAMES = (
    "train 0",
    "lang=zh%3AHans/0",
    "é你~#%?[x]/a+b&c=d;e,f",
    "(1) 'quoted' {0}",
    "_split=0/part-0",
)


@pytest.fixture(scope="module")
def table(inputs) -> pyarrow.Table:  # noqa: F811
    return pyarrow.parquet.read_table(inputs / "pool")


def uniform(**changes) -> superbatch.Phase:
    return phase(
        policy="uniform", n_chunks=1, **{"super_batch_size": 32, "sub_batch_size": 32, **changes}
    )


def serves(run: superbatch.Run, shards: dict[str, pyarrow.Table], steps: int) -> None:
    """Each row that is served is the one that its id names."""
    seen = set()
    for step in range(steps):
        batch = run.select(step, rank=0, world_size=1)
        columns = (batch[name].to_pylist() for name in ("_superbatch_id", "image", "caption"))
        for identity, image, caption in zip(*columns, strict=True):
            shard, row = identity.rsplit("#", 1)
            row = shards[shard].slice(int(row), 1).to_pylist()[0]
            assert (image, caption) == (row["png"], row["caption"]), identity
            seen.add(shard)
    assert seen == set(shards)


def write_odd(folder: Path, table: pyarrow.Table) -> dict[str, pyarrow.Table]:
    shards = {}
    for number, name in enumerate(NAMES):
        path = folder / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        part = table.slice(number * 32, 32)
        pyarrow.parquet.write_table(part, path, row_group_size=8)
        shards[f"{name}.parquet"] = part
    return shards


@pytest.fixture(scope="module")
def odd(inputs, table) -> tuple[Path, dict]:  # noqa: F811
    folder = inputs / "odd names & signs"
    return folder, write_odd(folder, table)


def test_names_with_any_sign_are_read_from_files(inputs, service, odd):  # noqa: F811
    folder, shards = odd
    run = superbatch.connect(service.address).open_run(
        spec(inputs, "odd", sources=[folder.as_uri()], phases=[uniform()], epochs=1)
    )
    serves(run, shards, len(NAMES))


def test_names_with_any_sign_are_read_from_s3(inputs, store, odd, tmp_path):  # noqa: F811
    folder, shards = odd
    for path in folder.rglob("*.parquet"):
        store.client.upload_file(str(path), BUCKET, f"odd/{path.relative_to(folder).as_posix()}")
    with Cluster(tmp_path, environment=credentials(store.port)) as cluster:
        asked = remote(
            "odd",
            sources=[f"s3://{BUCKET}/odd"],
            phases=[uniform()],
            epochs=1,
            reference=None,
            learner=None,
        )
        serves(superbatch.connect(cluster.address).open_run(asked), shards, len(NAMES))


def test_a_key_that_no_path_can_name_is_told_at_once(store, table, tmp_path):  # noqa: F811
    """S3 takes any key; a listing that holds such a one cannot be read in part."""
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    for folder, key in (("double", "a//b.parquet"), ("dots", "../b.parquet")):
        for name in ("a.parquet", key):
            store.client.upload_file(str(tmp_path / "a.parquet"), BUCKET, f"{folder}/{name}")
        ended = command(
            store.port, "index", f"s3://{BUCKET}/{folder}", "--state", (tmp_path / "state").as_uri()
        )
        assert ended.returncode != 0 and key in ended.stderr and "cannot list" in ended.stderr, (
            ended.stderr
        )
        # What is named one by one is read all the same.
        ended = command(
            store.port,
            "index",
            f"s3://{BUCKET}/{folder}/a.parquet",
            "--state",
            (tmp_path / "state").as_uri(),
        )
        assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("name", NAMES)
def test_one_file_is_read_by_its_uri(inputs, service, odd, name):  # noqa: F811
    folder, shards = odd
    path = folder / f"{name}.parquet"
    run = superbatch.connect(service.address).open_run(
        spec(
            inputs,
            f"one-{NAMES.index(name)}",
            sources=[path.as_uri()],
            phases=[uniform()],
            epochs=1,
        )
    )
    serves(run, {path.name: shards[f"{name}.parquet"]}, 1)


def test_a_folder_may_be_called_as_a_file(table, tmp_path):
    (tmp_path / "pool.parquet").mkdir()
    pyarrow.parquet.write_table(table, tmp_path / "pool.parquet" / "part-0.parquet")
    (tmp_path / "pool.parquet" / "_SUCCESS").touch()
    ended = index(tmp_path / "state", (tmp_path / "pool.parquet").as_uri())
    assert ended.returncode == 0 and '"rows":768' in ended.stdout, ended.stderr


def test_a_fragment_or_a_query_is_refused_and_not_dropped(table, tmp_path):
    (tmp_path / "pool").mkdir()
    pyarrow.parquet.write_table(table, tmp_path / "pool" / "a.parquet")
    for tail, says in (("#clean", "%23clean"), ("?versionId=3", "query")):
        ended = index(tmp_path / "state", f"{(tmp_path / 'pool').as_uri()}{tail}")
        assert ended.returncode != 0 and says in ended.stderr, ended.stderr


def test_neighbours_that_no_uri_can_name_are_left_out(table, tmp_path):
    pool = tmp_path / "pool"
    pool.mkdir()
    pyarrow.parquet.write_table(table, pool / "a.parquet")
    (pool / "Icon\r").touch()
    (pool / os.fsdecode(b"caf\xe9.parquet")).touch()
    (pool / "loop").symlink_to(pool)
    os.mkfifo(pool / "pipe.parquet")
    ended = index(pool / "state", pool.as_uri())
    assert ended.returncode == 0 and '"shards":1' in ended.stdout, ended.stderr
    assert "left out" in ended.stderr and "Icon" in ended.stderr
    # The state inside the data's folder holds Parquet files by now, and is no data.
    assert index(pool / "state", pool.as_uri()).stdout == ended.stdout


def test_failed_downloads_are_no_bad_rows(inputs, service, table, tmp_path):  # noqa: F811
    """As img2dataset's Parquet writer leaves them: rows with a status and without an image."""
    failed = [row % 4 == 0 for row in range(table.num_rows)]
    images = [
        None if gone else image
        for gone, image in zip(failed, table["png"].to_pylist(), strict=True)
    ]
    part = table.set_column(
        table.schema.get_field_index("png"), "png", pyarrow.array(images, pyarrow.binary())
    )
    status = pyarrow.array(["failed_to_download" if gone else "success" for gone in failed])
    part = part.append_column("status", status)
    (tmp_path / "pool").mkdir()
    pyarrow.parquet.write_table(part, tmp_path / "pool" / "00000.parquet", row_group_size=100)
    source = (tmp_path / "pool").as_uri()
    ended = index(tmp_path / "state", source)
    assert '"without_image":192' in ended.stdout, ended.stderr
    steps = 12
    asked = spec(
        inputs,
        "img2dataset",
        sources=[source],
        epochs=2,
        max_ahead=1,
        max_bad_row_share=0.01,
        phases=[uniform(super_batch_size=128, sub_batch_size=64)],
    )
    run = superbatch.connect(service.address).open_run(asked)
    serves(run, {"00000.parquet": table}, steps)
    receipts = [run.receipt(step) for step in range(steps)]
    listed = [str(row.reason).lower() for receipt in receipts for row in receipt.bad_rows]
    assert len(listed) > 100 and all("image_null" in reason for reason in listed)
    assert run.get_run().accounts.bad_rows == 0


def with_bad(table: pyarrow.Table, is_bad: Callable[[int], bool]) -> pyarrow.Table:
    """The table with pictures that are none."""
    images = [
        b"no picture" if is_bad(row) else image
        for row, image in enumerate(table["png"].to_pylist())
    ]
    column = pyarrow.array(images, pyarrow.binary())
    return table.set_column(table.schema.get_field_index("png"), "png", column)


def test_a_step_that_bad_rows_leave_short_says_the_way_that_works(inputs, service, table, tmp_path):
    client, clean = superbatch.connect(service.address), tmp_path / "clean"

    def asked(run_id: str, folder: Path) -> superbatch.RunSpec:
        pyarrow.parquet.write_table(table, folder / "0.parquet", row_group_size=64)
        return spec(inputs, run_id, sources=[folder.as_uri()], max_ahead=1, phases=[uniform()])

    clean.mkdir()
    run = client.open_run(asked("whole", clean))
    ids = [
        run.select(step, rank=0, world_size=1)["_superbatch_id"].to_pylist() for step in range(2)
    ]
    rotten = int(ids[1][0].rsplit("#", 1)[1])
    table = with_bad(table, lambda row: row == rotten)
    (tmp_path / "rotten").mkdir()
    short = asked("short", tmp_path / "rotten")
    run = client.open_run(short)
    assert run.select(0, rank=0, world_size=1)["_superbatch_id"].to_pylist() == ids[0]
    with pytest.raises(superbatch.Error) as caught:
        run.select(1, rank=0, world_size=1)
    assert reason(caught) == "TOO_MANY_BAD_ROWS" and "rewind" in str(caught.value)
    lines = service.coordinator.log.read_text().splitlines()
    told = [line for line in lines if "super_batch_size equals" in line and "short" in line]
    assert len(told) == 1, "it was warned of when the run was opened"
    # What it says works.
    run.rewind(1, mode="reselect")
    run.append_phases([uniform(from_step=1, super_batch_size=40)])
    run = client.open_run(short, incarnation="larger")
    assert len(run.select(1, rank=0, world_size=1)) == 32


def test_candidates_to_spare_replace_bad_rows(inputs, service, table, tmp_path):
    rotten = with_bad(table, lambda row: row % 16 == 0)
    pyarrow.parquet.write_table(rotten, tmp_path / "0.parquet", row_group_size=64)
    asked = spec(
        inputs,
        "to-spare",
        sources=[tmp_path.as_uri()],
        max_bad_row_share=0.5,
        phases=[uniform(super_batch_size=36, sub_batch_size=24)],
    )
    run, steps = superbatch.connect(service.address).open_run(asked), 8
    for step in range(steps):
        ids = run.select(step, rank=0, world_size=1)["_superbatch_id"].to_pylist()
        rows = {int(row.rsplit("#", 1)[1]) for row in ids}
        assert len(rows) == 24 and all(row % 16 for row in rows)
    assert any(run.receipt(step).bad_rows for step in range(steps))
    assert not any(
        "super_batch_size equals" in line and "to-spare" in line
        for line in service.coordinator.log.read_text().splitlines()
    )


@pytest.mark.parametrize("policy", ["uniform", "joint"])
def test_one_rule_for_captions_holds_for_all_policies(inputs, service, table, tmp_path, policy):
    """Null and what is no UTF-8 cost their row; others are served as they are, however long."""
    table = table.slice(0, 96)
    texts = [text.encode() for text in table["caption"].to_pylist()]
    strange = {3: None, 5: b"caf\xe9", 8: b"", 13: b"word " * 20_000, 21: "你好 é 🐈".encode()}
    for row, text in strange.items():
        texts[row] = text
    column = pyarrow.array(texts, pyarrow.binary()).view(pyarrow.string())
    table = table.set_column(table.schema.get_field_index("caption"), "caption", column)
    pyarrow.parquet.write_table(table, tmp_path / "0.parquet", row_group_size=32)
    sizes = {"super_batch_size": 96, "sub_batch_size": 94, "n_chunks": 1}
    asked = spec(
        inputs,
        f"captions-{policy}",
        sources=[tmp_path.as_uri()],
        phases=[phase(policy=policy, **sizes)],
        max_ahead=1,
    )
    run = superbatch.connect(service.address).open_run(asked)
    batch = run.select(0, rank=0, world_size=1)
    rows = [int(row.rsplit("#", 1)[1]) for row in batch["_superbatch_id"].to_pylist()]
    served = dict(zip(rows, batch["caption"].to_pylist(), strict=True))
    good = (row for row in range(96) if row not in (3, 5))
    assert served == {row: texts[row].decode() for row in good}
    holes = {row.id: row.reason for row in run.receipt(0).bad_rows}
    assert holes == {"0.parquet#3": "caption_null", "0.parquet#5": "caption_invalid"}


def test_pictures_of_a_format_that_is_not_decoded_are_refused_by_its_name(
    inputs, service, table, tmp_path
):
    avif = b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf"
    column = pyarrow.array([avif] * len(table), pyarrow.binary())
    table = table.set_column(table.schema.get_field_index("png"), "png", column)
    pyarrow.parquet.write_table(table, tmp_path / "0.parquet", row_group_size=64)
    asked = spec(inputs, "avif", sources=[tmp_path.as_uri()])
    run = superbatch.connect(service.address).open_run(asked)
    with pytest.raises(superbatch.Error, match="but AVIF") as caught:
        run.select(0, rank=0, world_size=1)
    assert reason(caught) == "TOO_MANY_BAD_ROWS"
