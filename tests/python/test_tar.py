"""WebDataset tars, written with Python's tarfile and read in place by the real binary, from files
and from S3.
"""

import io
import json
import random
import subprocess
import tarfile
from pathlib import Path

import numpy
import pyarrow.parquet
import pytest
import superbatch
from cluster import BINARY, DEADLINE_SECONDS, Cluster
from s3_store import BUCKET, credentials, remote, store
from test_end_to_end import inputs, phase, reason, service, spec

STEPS = 4
COLUMNS = ["__key__", "json[kind]", "json[number]"]
FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def write_shard(path: Path, records: list[dict], key, form: int) -> None:
    """As img2dataset writes one: image, caption and metadata under one key."""
    with tarfile.open(path, "w", format=form) as archive:
        for number, record in enumerate(records):
            meta = {"caption": record["caption"], "kind": record["kind"], "number": number}
            add(archive, f"{key(number)}.png", record["png"])
            add(archive, f"{key(number)}.txt", record["caption"].encode())
            add(archive, f"{key(number)}.json", json.dumps(meta).encode())


@pytest.fixture(scope="module")
def tars(inputs) -> Path:
    """Three shards in three formats; keys repeat between the first two, and are long in the
    third.
    """
    folder = inputs / "tars"
    folder.mkdir()
    records = pyarrow.parquet.read_table(inputs / "pool").to_pylist()
    keys = (lambda n: f"{n:09d}", lambda n: f"{n:09d}", lambda n: f"{'süb ' * 40}/{n:09d}")
    for number, (key, form) in enumerate(zip(keys, reversed(FORMATS), strict=True)):
        form = tarfile.PAX_FORMAT if number == 2 else form
        write_shard(
            folder / f"{number:05d}.tar", records[number * 256 : (number + 1) * 256], key, form
        )
    # Beside the first shard lies what img2dataset leaves there.
    pyarrow.parquet.write_table(
        pyarrow.table({"key": ["000000000"], "status": ["success"]}), folder / "00000.parquet"
    )
    (folder / "00000_stats.json").write_text("{}")
    return folder


def rows(folder: Path) -> dict[str, tuple]:
    """By id, what tarfile reads: image, caption, key, kind, number."""
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as archive:
            contents = {member.name: archive.extractfile(member).read() for member in archive}
        keys = [name.removesuffix(".png") for name in contents if name.endswith(".png")]
        for row, key in enumerate(keys):
            meta = json.loads(contents[f"{key}.json"])
            caption = contents[f"{key}.txt"].decode()
            found[f"{path.name}#{row}"] = (
                contents[f"{key}.png"],
                caption,
                key,
                meta["kind"],
                str(meta["number"]),
            )
    return found


def served(run: superbatch.Run, steps: int = STEPS) -> dict[str, tuple]:
    found = {}
    for step in range(steps):
        batch = run.select(step, rank=0, world_size=1)
        names = ["image", "caption", *COLUMNS]
        values = zip(*(batch[name].to_pylist() for name in names), strict=True)
        found.update(zip(batch["_superbatch_id"].to_pylist(), values, strict=True))
    return found


@pytest.fixture(scope="module")
def settings(tars) -> dict:
    return {
        "sources": [tars.as_uri()],
        "columns": COLUMNS,
        "lag": superbatch.at_most(8),
        "max_ahead": 1,
        "phases": [phase(policy="uniform", super_batch_size=192, sub_batch_size=192, n_chunks=1)],
    }


def test_an_epoch_of_tars_serves_every_sample_as_tarfile_reads_it(inputs, tars, service, settings):
    run = superbatch.connect(service.address).open_run(spec(inputs, "tars", epochs=1, **settings))
    expected = rows(tars)
    assert len(expected) == 768
    assert served(run) == expected
    with pytest.raises(superbatch.EndOfData):
        run.select(STEPS, rank=0, world_size=1)


def test_joint_selection_reads_tars_from_s3_as_from_files(
    inputs, tars, service, store, settings, tmp_path
):
    changes = {**settings, "phases": [phase()]}
    local = superbatch.connect(service.address).open_run(spec(inputs, "joint-tars", **changes))
    expected = served(local)
    assert len(expected) == STEPS * 24
    known = rows(tars)
    assert all(known[row] == values for row, values in expected.items())
    store.upload(inputs)
    state = f"s3://{BUCKET}/state-of-tars"
    with Cluster(tmp_path, workers=2, state=state, environment=credentials(store.port)) as cluster:
        changes["sources"] = [f"s3://{BUCKET}/tars/{{00000..00002}}.tar"]
        run = superbatch.connect(cluster.address).open_run(remote("joint-tars", **changes))
        assert served(run) == expected
        assert [r.id for r in run.receipt(1).chosen] == [r.id for r in local.receipt(1).chosen]
        assert len(store.keys("state-of-tars/tar-indexes/")) == 3


def test_two_workers_find_the_holes_of_a_tar_as_one_does(inputs, settings, tmp_path):
    (tmp_path / "bad").mkdir()
    records = pyarrow.parquet.read_table(inputs / "pool").to_pylist()[:256]
    records[5]["png"] = b"no picture"
    # Both workers read of the one block.
    path, key = tmp_path / "bad" / "00000.tar", (lambda number: f"{number:09d}")
    write_shard(path, records, key, tarfile.PAX_FORMAT)
    whole = phase(super_batch_size=256)
    changes = {**settings, "sources": [path.parent.as_uri()], "phases": [whole]}
    asked, found = spec(inputs, "holes-of-a-tar", **changes), []
    for workers in (0, 2):
        with Cluster(tmp_path / f"{workers}", workers=workers) as cluster:
            run = superbatch.connect(cluster.address).open_run(asked)
            batch, receipt = run.select(0, rank=0, world_size=1), run.receipt(0)
            served = zip(
                batch["_superbatch_id"].to_pylist(), batch["image"].to_pylist(), strict=True
            )
            assert all(image == records[int(row.split("#")[1])]["png"] for row, image in served)
            holes = [(row.id, row.reason) for row in receipt.bad_rows]
            found.append(([(row.id, row.score) for row in receipt.chosen], holes))
    assert found[0] == found[1] and len(found[0][0]) == 24
    assert found[0][1] == [("00000.tar#5", "image_undecodable")]


def test_a_tar_that_changed_is_refused_by_name(inputs, tars, settings, tmp_path):
    folder = tmp_path / "changing"
    folder.mkdir()
    for path in tars.glob("*.tar"):
        (folder / path.name).write_bytes(path.read_bytes())
    asked = spec(inputs, "changing-tars", **{**settings, "sources": [folder.as_uri()]})
    with Cluster(tmp_path / "cluster") as cluster:
        run = superbatch.connect(cluster.address).open_run(asked)
        first = run.select(0, rank=0, world_size=1)["_superbatch_id"].to_pylist()
        cluster.coordinator.kill()
        for path in folder.glob("*.tar"):
            path.write_bytes(path.read_bytes() + bytes(10240))
        cluster.start_coordinator("again")
        run = superbatch.connect(cluster.address).open_run(asked)
        with pytest.raises(superbatch.Error) as caught:
            run.select(0, rank=0, world_size=1)
        assert reason(caught) == "DATASET_CHANGED" and ".tar" in str(caught.value)
        assert sorted(row.id for row in run.receipt(0).chosen) == sorted(first)


def index(state: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [BINARY, "index", *arguments, "--state", state.as_uri(), "--json"],
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
    )


@pytest.mark.parametrize("form", FORMATS)
def test_members_lie_where_tarfile_says(tmp_path, form):
    """Names of every length and alphabet, links, folders and members of no sample, in each format
    that tarfile writes.
    """
    rng, data = random.Random(form), tmp_path / "data"
    data.mkdir()
    with tarfile.open(data / "0.tar", "w", format=form) as archive:
        for number in range(300):
            letters = "abc-_ 012" if form == tarfile.USTAR_FORMAT else "aé你-_ %#?012"
            depth = rng.randint(0, 3)
            folders = "/".join(
                "".join(rng.choices(letters, k=rng.randint(1, 40))).strip() + "x"
                for _ in range(depth)
            )
            name = f"{folders}/{number}" if folders else str(number)
            for field in rng.sample(["jpg", "txt", "json", "Seg.PNG", "cls"], k=rng.randint(1, 5)):
                add(
                    archive,
                    f"{name}.{field}",
                    rng.randbytes(rng.choice([0, 1, 511, 512, 513, 4000])),
                )
            if number % 7 == 0:
                extra = tarfile.TarInfo(f"folder{number}")
                extra.type = rng.choice(
                    [tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE]
                )
                extra.linkname = "0.jpg" if extra.type in (tarfile.SYMTYPE, tarfile.LNKTYPE) else ""
                archive.addfile(extra)
                add(archive, f"{name}-folder/.hidden.jpg", b"x")
                add(archive, "README", b"of no sample")
        add(archive, "last.jpg", b"i")
        add(archive, "last.txt", b"t")
    ended = index(tmp_path / "state", data.as_uri())
    assert ended.returncode == 0, ended.stderr
    [kept] = (tmp_path / "state" / "tar-indexes").iterdir()
    table = pyarrow.parquet.read_table(kept).to_pylist()
    found = [(row["key"], row["field"], row["offset"], row["length"]) for row in table]
    expected = []
    with tarfile.open(data / "0.tar") as archive:
        for member in archive:
            folder, _, name = member.name.rpartition("/")
            key, dot, field = name.partition(".")
            if member.isfile() and key and dot:
                expected.append(
                    (
                        f"{folder}/{key}" if folder else key,
                        field.lower(),
                        member.offset_data,
                        member.size,
                    )
                )
    assert found == expected


def test_what_cannot_be_read_is_refused_with_the_reason(tars, tmp_path):
    for mode, says in (("w:gz", "compressed with gzip"), ("w:xz", "compressed with xz")):
        data = tmp_path / mode[2:]
        data.mkdir()
        with tarfile.open(data / "0.tar", mode) as archive:
            add(archive, "0.jpg", b"i" * 2000)
        ended = index(tmp_path / "state", data.as_uri())
        assert ended.returncode != 0 and says in ended.stderr and "0.tar" in ended.stderr
    data = tmp_path / "cut"
    data.mkdir()
    whole = (tars / "00000.tar").read_bytes()
    with tarfile.open(tars / "00000.tar") as archive:
        cut = archive.getmembers()[380].offset_data - 300
    (data / "0.tar").write_bytes(whole[:cut])
    ended = index(tmp_path / "state", data.as_uri())
    assert ended.returncode == 0, ended.stderr
    [source] = json.loads(ended.stdout)["sources"]
    # 380 members are 126 samples, and an image and a caption of the next.
    assert (source["rows"], source["left_out"]) == (127, 0)
    assert "0.tar: it ends in the middle" in source["flaws"][0]
    # A failed upload, and a cut at a member's border.
    (data / "1.tar").touch()
    with tarfile.open(tars / "00000.tar") as archive:
        (data / "2.tar").write_bytes(whole[: archive.getmembers()[381].offset])
    ended = index(tmp_path / "state", data.as_uri())
    [source] = json.loads(ended.stdout)["sources"]
    assert source["rows"] == 127 + 127
    assert [flaw.split(",")[0] for flaw in source["flaws"][1:]] == [
        "1.tar: it is empty",
        "2.tar: it has no end mark",
    ]


def test_datacomp_shards_are_read_by_their_uids(inputs, service, tmp_path):
    """As its resharder writes them: names of 8 digits, `sizes.json` and `meta.json` beside them,
    and keys that count how often a uid came. Its lists of uids are sorted pairs of 64 bits.
    """
    rng, folder = random.Random(7), tmp_path / "shards"
    folder.mkdir()
    records = pyarrow.parquet.read_table(inputs / "pool").to_pylist()[:300]
    uids = [f"{rng.getrandbits(128):032x}" for _ in range(150)]
    allowed = sorted(rng.sample(uids, 72))
    expected, sizes = {}, {}
    for shard in range(2):
        name = f"{shard:08d}.tar"
        sizes[name] = 150
        with tarfile.open(folder / name, "w") as archive:
            for row in range(150):
                number = shard * 150 + row
                record, uid = records[number], uids[number // 2]
                key, meta = f"{uid}-{number % 2}", {"uid": uid, "sha256": "0" * 64}
                add(archive, f"{key}.png", record["png"])
                add(archive, f"{key}.txt", record["caption"].encode())
                add(archive, f"{key}.json", json.dumps(meta).encode())
                if uid in allowed:
                    served = (record["png"], record["caption"], key, uid)
                    expected[f"{name}#{row}"] = served
    (folder / "sizes.json").write_text(json.dumps(sizes))
    form = {"output_shard_count": 2, "output_shard_format": "{:08d}.tar"}
    (folder / "meta.json").write_text(json.dumps(form))
    halves = [(int(uid[:16], 16), int(uid[16:], 16)) for uid in allowed]
    numpy.save(tmp_path / "subset.npy", numpy.array(halves, numpy.dtype("u8,u8")))
    columns = ["__key__", "json[uid]"]
    asked = spec(
        inputs,
        "datacomp",
        sources=[superbatch.Source(uri=folder, allow=tmp_path / "subset.npy")],
        columns=columns,
        epochs=1,
        lag=superbatch.at_most(8),
        max_ahead=1,
        phases=[phase(policy="uniform", super_batch_size=48, sub_batch_size=48, n_chunks=1)],
    )
    run = superbatch.connect(service.address).open_run(asked)
    assert run.dataset.steps_total == 3 and len(expected) == 144
    found = {}
    for step in range(3):
        batch = run.select(step, rank=0, world_size=1)
        values = [batch[name].to_pylist() for name in ["image", "caption", *columns]]
        ids = batch["_superbatch_id"].to_pylist()
        found.update(zip(ids, zip(*values, strict=True), strict=True))
    assert found == expected


def test_a_run_over_a_cut_tar_is_served_again_after_a_kill(inputs, tars, settings, tmp_path):
    folder = tmp_path / "cut"
    folder.mkdir()
    with tarfile.open(tars / "00000.tar") as archive:
        # The JSON of sample 126.
        cut = archive.getmembers()[380].offset_data - 300
    (folder / "00000.tar").write_bytes((tars / "00000.tar").read_bytes()[:cut])
    (folder / "00001.tar").write_bytes((tars / "00001.tar").read_bytes())
    known = rows(tars)
    expected = {f"{shard}#{row}": known[f"{shard}#{row}"] for shard, row in whole_rows()}
    image, caption, key, *_ = known["00000.tar#126"]
    expected["00000.tar#126"] = (image, caption, key, None, None)
    all_rows = phase(policy="uniform", super_batch_size=383, sub_batch_size=383, n_chunks=1)
    changes = {**settings, "sources": [folder.as_uri()], "phases": [all_rows]}
    asked = spec(inputs, "cut-tars", **changes)
    with Cluster(tmp_path / "cluster") as cluster:
        run = superbatch.connect(cluster.address).open_run(asked)
        assert served(run, steps=1) == expected
        cluster.coordinator.kill()
        cluster.start_coordinator("again")
        run = superbatch.connect(cluster.address).open_run(asked)
        assert served(run, steps=1) == expected


def whole_rows():
    """The rows of a shard that is cut in sample 126, without that one, and of a whole one."""
    yield from (("00000.tar", row) for row in range(126))
    yield from (("00001.tar", row) for row in range(256))
