"""Data sets whose images lie beside the rows, by path: they serve what the same images in Parquet
do, on files and on S3, and read no more of them than a step needs.
"""

import json
import subprocess
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import superbatch
from cluster import BINARY, Cluster, Process
from s3_store import BUCKET, credentials, remote, store
from test_end_to_end import (
    STEPS,
    choices,
    inputs,
    phase,
    reason,
    service,
    spec,
    train,
)
from test_tar import index

ROWS, BLOCK = 3000, 1024


def write(folder: Path, rows: pyarrow.Table, paths: list[str]) -> Path:
    """`rows.parquet` of paths in one row group, beside `images/`."""
    (folder / "rows").mkdir(parents=True)
    for path, image in zip(paths, rows["png"].to_pylist(), strict=True):
        at = folder / "images" / path
        at.parent.mkdir(parents=True, exist_ok=True)
        at.write_bytes(image)
    table = pyarrow.table({"file_name": paths, "caption": rows["caption"]})
    pyarrow.parquet.write_table(table, folder / "rows" / "0.parquet", row_group_size=len(rows))
    return folder


@pytest.fixture(scope="module")
def pool(inputs) -> Path:
    """3,000 rows: `beside` by path, `within` the same as bytes, in blocks of the same size."""
    table = pyarrow.parquet.read_table(inputs / "pool")
    rows = pyarrow.concat_tables([table] * 4).slice(0, ROWS)
    captions = [f"{text} {row % 9}" for row, text in enumerate(rows["caption"].to_pylist())]
    rows = rows.set_column(rows.schema.get_field_index("caption"), "caption", [captions])
    folder = inputs / "by path"
    write(folder / "beside", rows, [f"./{row % 7}/a é#{row}.png" for row in range(ROWS)])
    (folder / "within").mkdir()
    within = rows.select(["png", "caption"])
    pyarrow.parquet.write_table(within, folder / "within" / "0.parquet", row_group_size=BLOCK)
    return folder


def beside(folder: Path, **changes) -> superbatch.Source:
    return superbatch.Source(
        **{"uri": folder / "rows" / "0.parquet", "image_root": folder / "images", **changes}
    )


def uniform(**changes) -> superbatch.Phase:
    return phase(
        policy="uniform", n_chunks=1, **{"super_batch_size": 96, "sub_batch_size": 90, **changes}
    )


def settings(policy: str, source: superbatch.Source) -> dict:
    """Of a run whose shards are called alike whether images lie beside them or not."""
    return {
        "sources": [source],
        "phases": [uniform() if policy == "uniform" else phase()],
        "lag": superbatch.at_most(8),
        "max_ahead": 1,
        "window_blocks": 2,
    }


def served(run: superbatch.Run, steps: int = STEPS) -> list:
    names = ("_superbatch_id", "caption", "image")
    batches = (run.select(step, rank=0, world_size=1) for step in range(steps))
    return [
        list(zip(*(batch[name].to_pylist() for name in names), strict=True)) for batch in batches
    ]


def hashes(run: superbatch.Run) -> list:
    return [[row.content_hash for row in run.receipt(step).chosen] for step in range(STEPS)]


@pytest.mark.parametrize("policy", ["uniform", "joint"])
def test_paths_serve_what_bytes_do(inputs, service, pool, tmp_path, policy):
    client = superbatch.connect(service.address)
    within = superbatch.Source(uri=pool / "within" / "0.parquet")
    asked = spec(inputs, f"within-{policy}", **settings(policy, within))
    run = client.open_run(asked)
    expected = served(run), choices(run), hashes(run)
    asked = spec(inputs, f"beside-{policy}", **settings(policy, beside(pool / "beside")))
    run = client.open_run(asked)
    assert (served(run), choices(run), hashes(run)) == expected
    with Cluster(tmp_path, workers=2) as cluster:
        run = superbatch.connect(cluster.address).open_run(asked)
        assert (served(run), choices(run), hashes(run)) == expected
        # From the receipt, to a trainer with two ranks, after a crash.
        cluster.coordinator.kill()
        cluster.start_coordinator("again")
        for worker in cluster.workers:
            worker.kill()
        cluster.workers = [cluster.start_worker("fresh")]
        cluster.coordinator.wait_for("superbatch_workers", lambda count: count == 1)
        run = superbatch.connect(cluster.address).open_run(asked, incarnation="again")
        ranks = [run.select(1, rank=rank, world_size=2) for rank in range(2)]
        images = [image for batch in ranks for image in batch["image"].to_pylist()]
        assert sorted(images) == sorted(row[2] for row in expected[0][1])


def test_rows_come_on_each_way(inputs, pool, tmp_path):
    asked = spec(inputs, "through", **settings("joint", beside(pool / "beside")))
    asked = replace(asked, micro_batch_rows=8)
    with Cluster(tmp_path, workers=2) as cluster:
        client = superbatch.connect(cluster.address)
        through, direct, located = (
            client.open_run(replace(asked, run_id=way, delivery=way))
            for way in ("coordinator", "direct", "locators")
        )
        expected = served(through, 2)
        assert served(direct, 2) == expected
        assert cluster.coordinator.metric("superbatch_direct_fallbacks_total") == 0
        for step, rows in enumerate(expected):
            batch = located.select(step, rank=0, world_size=1)
            assert "image" not in batch.record_batch.schema.names
            columns = ("_superbatch_id", "caption", "_superbatch_image_uri")
            found = list(zip(*(batch[name].to_pylist() for name in columns), strict=True))
            root = (pool / "beside" / "images").as_uri()
            assert all(uri.startswith(root + "/") for _, _, uri in found)
            images = pool / "beside" / "images"
            read = [(images / uri[len(root) + 1 :]).read_bytes() for _, _, uri in found]
            assert [(*row[:2], image) for row, image in zip(found, read, strict=True)] == rows
            assert batch["_superbatch_row_group"].to_pylist() == [None] * len(rows)
            assert batch["_superbatch_image_offset"].to_pylist() == [None] * len(rows)


def test_a_step_reads_few_images_of_a_large_row_group(inputs, pool, tmp_path):
    asked = spec(inputs, "few", **settings("uniform", beside(pool / "beside")))
    with Cluster(tmp_path) as cluster:
        run = superbatch.connect(cluster.address).open_run(asked)
        count = lambda: cluster.coordinator.metric(
            "superbatch_object_store_requests_total", operation="get", outcome="ok"
        )
        before = count()
        served(run, 2)
        # What is served: no step is made ahead. And facts, footers, columns of three blocks.
        assert 2 * 90 <= count() - before < 2 * 90 + 60


def test_images_on_s3_give_what_files_give(inputs, service, pool, store, tmp_path):
    def upload(path: Path) -> None:
        key = f"by-path/{path.relative_to(pool / 'beside').as_posix()}"
        store.client.put_object(Bucket=BUCKET, Key=key, Body=path.read_bytes())

    files = [path for path in sorted((pool / "beside").rglob("*")) if path.is_file()]
    with ThreadPoolExecutor(16) as threads:
        list(threads.map(upload, files))
    root = f"s3://{BUCKET}/by-path"
    source = superbatch.Source(uri=f"{root}/rows/0.parquet", image_root=f"{root}/images")
    local = spec(inputs, "s3-files", **settings("joint", beside(pool / "beside")))
    run = superbatch.connect(service.address).open_run(local)
    expected = served(run), choices(run), hashes(run)
    with Cluster(tmp_path, workers=2, environment=credentials(store.port)) as cluster:
        asked = remote("s3-by-path", **settings("joint", source))
        run = superbatch.connect(cluster.address).open_run(asked)
        assert (served(run), choices(run), hashes(run)) == expected
        assert (
            sum(
                worker.metric("superbatch_object_store_requests_total", operation="get")
                for worker in cluster.workers
            )
            > STEPS * 96
        )


@pytest.fixture
def small(inputs, tmp_path) -> Path:
    """64 rows of which some have no image, each for another reason."""
    rows = pyarrow.parquet.read_table(inputs / "pool").slice(0, 64)
    folder = write(tmp_path / "small", rows, [f"{row}.png" for row in range(64)])
    (folder / "images" / "3.png").unlink()
    (folder / "images" / "5.png").write_bytes(b"no picture")
    (folder / "secret.png").write_bytes((folder / "images" / "0.png").read_bytes())
    table = pyarrow.parquet.read_table(folder / "rows" / "0.parquet")
    paths = table["file_name"].to_pylist()
    outside = (folder / "secret.png").as_posix()
    for row, path in {7: "../secret.png", 9: outside, 11: "https://x.org/a.png", 13: None}.items():
        paths[row] = path
    table = table.set_column(0, "file_name", pyarrow.array(paths, pyarrow.string()))
    pyarrow.parquet.write_table(table, folder / "rows" / "0.parquet")
    return folder


BAD = {
    3: ("image_missing", "3.png"),
    5: ("image_undecodable", ""),
    7: ("image_path_invalid", "leads out of image_root"),
    9: ("image_path_invalid", "is absolute"),
    11: ("image_path_invalid", "is a URL"),
    13: ("image_null", "the image is null"),
}


@pytest.mark.parametrize("policy", ["uniform", "joint"])
def test_rows_without_their_image_are_holes(inputs, tmp_path, small, policy):
    sizes = {"super_batch_size": 64, "sub_batch_size": 48}
    asked = {
        **settings(policy, beside(small)),
        "phases": [uniform(**sizes) if policy == "uniform" else phase(**sizes)],
        "epochs": 2,
        "max_bad_row_share": 0.2,
    }
    with Cluster(tmp_path) as cluster:
        client = superbatch.connect(cluster.address)
        # The second run finds the reference's holes where they are kept.
        for run_id in ("first", "second"):
            run = client.open_run(spec(inputs, run_id, **asked))
            for rows in served(run, 2):
                found = {int(row[0].rsplit("#", 1)[1]): row[2] for row in rows}
                assert len(found) == 48 and not found.keys() & BAD.keys()
                for row, image in found.items():
                    assert image == (small / "images" / f"{row}.png").read_bytes()
            holes = [row for step in range(2) for row in run.receipt(step).bad_rows]
            for hole in holes:
                why, says = BAD[int(hole.id.rsplit("#", 1)[1])]
                assert hole.reason == why and says in hole.detail, hole
            # A uniform step looks at the rows that it serves, and at those in place of bad ones.
            assert len(holes) == 2 * len(BAD) if policy == "joint" else holes
        counted = cluster.coordinator.metric(
            "superbatch_skipped_total", reason="IMAGE_PATH_INVALID"
        )
        assert counted >= 2 * sum(hole.reason == "image_path_invalid" for hole in holes) > 0


def test_a_picture_that_changed_is_refused_by_its_row(inputs, tmp_path, small):
    with Cluster(tmp_path) as cluster:
        asked = spec(inputs, "changed", **settings("uniform", beside(small)))
        asked = replace(asked, phases=[uniform(super_batch_size=64, sub_batch_size=32)])
        first = served(superbatch.connect(cluster.address).open_run(asked), 1)[0]
        cluster.coordinator.kill()
        row = int(first[0][0].rsplit("#", 1)[1])
        picture = small / "images" / f"{row}.png"
        image = picture.read_bytes()
        other = (small / "images" / f"{0 if row else 1}.png").read_bytes()
        assert image != other
        for content in (other, None, image):
            if content is None:
                picture.unlink()
            else:
                picture.write_bytes(content)
            cluster.start_coordinator("again")
            run = superbatch.connect(cluster.address).open_run(asked, incarnation="again")
            if content == image:
                # Put back, the step is served as it was.
                assert served(run, 1)[0] == first
            else:
                with pytest.raises(superbatch.Error) as caught:
                    run.select(0, rank=0, world_size=1)
                assert reason(caught) == "ROW_CHANGED"
                assert f"#{row}" in str(caught.value)
            cluster.coordinator.kill()


def test_a_struct_of_bytes_and_path_has_its_images_by_either(inputs, service, tmp_path):
    """As Hugging Face datasets writes a data set that it has not embedded, but for some rows."""
    rows = pyarrow.parquet.read_table(inputs / "pool").slice(0, 64)
    folder = write(tmp_path / "struct", rows, [f"{row}.png" for row in range(64)])
    images = [
        {"bytes": image if row % 4 == 0 else None, "path": f"{row}.png"}
        for row, image in enumerate(rows["png"].to_pylist())
    ]
    for row in range(0, 64, 4):
        # Bytes win, so what lies at the path does not matter.
        (folder / "images" / f"{row}.png").unlink()
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    features = {"info": {"features": {"image": {"_type": "Image"}}}}
    table = pyarrow.table({"image": pyarrow.array(images, kind), "caption": rows["caption"]})
    table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    pyarrow.parquet.write_table(table, folder / "rows" / "0.parquet")
    asked = settings("uniform", beside(folder))
    asked["phases"] = [uniform(super_batch_size=64, sub_batch_size=64)]
    run = superbatch.connect(service.address).open_run(spec(inputs, "struct", **asked))
    found = {int(row[0].rsplit("#", 1)[1]): row[2] for row in served(run, 1)[0]}
    assert found == dict(enumerate(rows["png"].to_pylist()))


def test_embeddings_ahead_and_a_replay_know_the_root(inputs, pool, tmp_path):
    source = beside(pool / "beside")
    with Cluster(tmp_path) as cluster:
        command = [BINARY, "embed", "--model", inputs / "reference", "--state", cluster.state]
        command += ["--sources", source.uri.as_uri(), "--image-root", source.image_root.as_uri()]
        ended = subprocess.run([*map(str, command), "--json"], capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        made = json.loads(ended.stdout)
        assert (made["rows"], made["blocks"], made["faults"]) == (ROWS, 3, 0)
        asked = {**settings("joint", source), "lag": superbatch.exact(1), "epochs": 1}
        run = superbatch.connect(cluster.address).open_run(spec(inputs, "ahead", **asked))
        train(run, inputs)
        assert cluster.coordinator.metric("superbatch_reference_rows_computed_total") == 0
        assert run.receipt(0).summary.dataset_manifest == made["manifest"]
        row = run.receipt(0).chosen[0]
        page = cluster.coordinator.page_address
        address = f"{page}/api/runs/ahead/pictures/0.0.{row.row}"
        with urllib.request.urlopen(address, timeout=30) as answer:
            assert answer.read().startswith(b"\xff\xd8"), "a JPEG"
    command = [BINARY, "replay", "ahead", "--step", "2", "--state", tmp_path / "state", "--json"]
    ended = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout)
    assert told["same_draw"] and told["losses_differ_by"] == 0


def test_what_cannot_be_read_is_refused_with_the_cure(inputs, service, pool, small):
    client, here = superbatch.connect(service.address), pool / "beside"
    urls = pyarrow.table({"image": ["https://x.org/a.jpg"], "caption": ["a"]})
    (small / "urls").mkdir()
    pyarrow.parquet.write_table(urls, small / "urls" / "0.parquet")
    for source, wanted, says in (
        (superbatch.Source(uri=here / "rows"), "SCHEMA_MISMATCH", "image_root"),
        (beside(here, image_root=here), "DATASET_EMPTY", "image_root"),
        (beside(here, image_root="images"), "INVALID_ARGUMENT", "image_root"),
        (beside(here, uri=pool / "within"), "COLUMN_NOT_FOUND", "image"),
        (superbatch.Source(uri=small / "urls"), "SCHEMA_MISMATCH", "img2dataset"),
        (beside(small, uri=small / "urls"), "SCHEMA_MISMATCH", "img2dataset"),
        (beside(here, image_root=f"{here.as_uri()}/../images"), "URI_NOT_ALLOWED", "images"),
    ):
        with pytest.raises(superbatch.Error) as caught:
            client.open_run(spec(inputs, "refused", sources=[source], phases=[uniform()]))
        assert (reason(caught), says in str(caught.value)) == (wanted, True), caught.value


def test_the_allow_list_holds_for_the_root(inputs, pool, tmp_path):
    allowed = [(pool / "beside" / "rows").as_uri(), (pool / "beside" / "images" / "0").as_uri()]
    config = {
        "listen": "127.0.0.1:0",
        "metrics_listen": "127.0.0.1:0",
        "page_listen": None,
        "state": (tmp_path / "state").as_uri(),
        "storage": {"allow_uris": allowed},
    }
    process = Process(tmp_path, "strict", "serve", config)
    try:
        asked = spec(inputs, "strict", **settings("uniform", beside(pool / "beside")))
        asked = replace(asked, reference=None, learner=None)
        with pytest.raises(superbatch.Error) as caught:
            superbatch.connect(process.address).open_run(asked)
        assert reason(caught) == "URI_NOT_ALLOWED" and "/images" in str(caught.value)
    finally:
        process.stop()


def test_index_says_where_the_images_lie(pool, tmp_path):
    source, root = (pool / "beside" / "rows").as_uri(), (pool / "beside" / "images").as_uri()
    ended = index(tmp_path / "state", source, "--image-root", root)
    told = json.loads(ended.stdout)["sources"][0]
    assert (told["rows"], told["blocks"], told["image_root"]) == (ROWS, 3, root)
    assert told["image_column"] == "file_name"
    refused = index(tmp_path / "state", source)
    assert refused.returncode != 0 and "--image-root" in refused.stderr
