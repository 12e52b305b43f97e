"""Data sets on the Hugging Face hub: read in place, at one commit, with a token that stays there.

The hub itself is out of reach of tests. What stands for it is asked by the hub's own client first.
"""

import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import superbatch
from cluster import DEADLINE_SECONDS, Process
from commands import run as command
from hub import TOKEN, Hub, oid, sha256

from examples.demo import tiny

ROWS = 256

#: Prints what the hub's own client finds. It reads its endpoint and token when it is imported.
CLIENT = """
import json, sys
from huggingface_hub import HfFileSystem
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

fs = HfFileSystem()
root, gated, missing = sys.argv[1:]
found = {"globbed": fs.glob(f"{root}/**/*.parquet"), "listed": sorted(fs.find(root))}
found["sizes"] = {path: fs.size(path) for path in found["listed"]}
found["lfs"] = {path: (fs.info(path)["lfs"] or {}).get("sha256") for path in found["listed"]}
found["oids"] = {path: fs.info(path)["blob_id"] for path in found["listed"]}
with fs.open(found["globbed"][0], block_size=512) as file:
    file.seek(-8, 2)
    found["end"] = file.read(8).hex()
with fs.open(found["listed"][-1], "r") as file:
    found["text"] = file.read()
for name, kind, path in (
    ("gated", GatedRepoError, gated), ("missing", RepositoryNotFoundError, missing)
):
    try:
        fs._api.dataset_info(path)
    except kind as error:
        found[name] = error.response.status_code
print(json.dumps(found))
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as hub:
        yield hub


def serve(folder: Path, hub: Hub, name: str = "hub", token: str | None = TOKEN, **storage):
    settings = {
        "listen": "127.0.0.1:0",
        "metrics_listen": "127.0.0.1:0",
        "page_listen": None,
        "state": (folder / "state").as_uri(),
        "storage": {"options": {"allow_http": True}, **storage},
    }
    return Process(folder, name, "serve", settings, hub.environment(token))


@pytest.fixture
def service(tmp_path, hub) -> Iterator[Process]:
    process = serve(tmp_path, hub)
    yield process
    process.stop()


def opened(service: Process, run_id: str, *sources, **phase) -> superbatch.Run:
    phase = superbatch.Phase(policy="uniform", super_batch_size=64, sub_batch_size=32, **phase)
    spec = superbatch.RunSpec(run_id=run_id, sources=list(sources), phases=[phase], seed=3)
    return superbatch.connect(service.address).open_run(spec)


def refused(service: Process, run_id: str, *sources) -> superbatch.Error:
    with pytest.raises(superbatch.Error) as caught:
        opened(service, run_id, *sources)
    return caught.value


def rows(run: superbatch.Run, steps=range(3)) -> list:
    batches = [run.select(step, rank=0, world_size=1) for step in steps]
    return [(batch["caption"].to_pylist(), batch["image"].to_pylist()) for batch in batches]


def pool(folder: Path, seed: int = 0, **settings) -> Path:
    return tiny.write_dataset(folder, rows=ROWS, seed=seed, **settings)


@pytest.mark.parametrize(("token", "revision"), [(None, "refs/pr/1"), (TOKEN, "refs%2Fpr%2F1")])
def test_the_server_is_what_the_hubs_own_client_expects(tmp_path, hub, token, revision):
    folder = pool(tmp_path / "pool", shards=4)
    (folder / "deep").mkdir()
    (folder / "00003.parquet").rename(folder / "deep" / "00003.parquet")
    (folder / "note.txt").write_text("small")
    hub.repository("o/n").push_folder(folder, branch="refs/pr/1")
    hub.repository("o/gated", gated=True)
    root = f"datasets/o/n@{revision}/data"
    environment = hub.environment(token, PATH="/usr/bin")
    ended = subprocess.run(
        [sys.executable, "-c", CLIENT, root, "o/gated", "o/none"],
        env=environment if token else {**environment, "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"},
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
    )
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    content = {
        f"{root}/{path.relative_to(folder).as_posix()}": path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    large = {path for path in content if path.endswith(".parquet")}
    assert found["globbed"] == sorted(large) and found["listed"] == sorted(content)
    assert found["sizes"] == {path: len(bytes_) for path, bytes_ in content.items()}
    for path, bytes_ in content.items():
        assert found["lfs"][path] == (sha256(bytes_) if path in large else None)
        assert path in large or found["oids"][path] == oid(bytes_)
    assert bytes.fromhex(found["end"]) == content[found["globbed"][0]][-8:]
    assert found["text"] == "small"
    assert (found["gated"], found["missing"]) == ((403, 404) if token else (401, 401))
    assert any("cursor=" in path for _, path, _, _ in hub.asked()), "it asked for a second page"
    assert hub.cdn.asked and not any(said for _, _, said, _ in hub.cdn.asked)


def test_a_run_stays_at_its_commit_though_the_branch_moves(tmp_path, hub):
    first, second = pool(tmp_path / "first"), pool(tmp_path / "second", seed=1)
    data = hub.repository("o/n")
    commit = data.push_folder(first)
    source = "hf://datasets/o/n/data/*.parquet"
    service = serve(tmp_path, hub)
    try:
        expected = rows(opened(service, "files", first.as_uri()), range(4))
        assert rows(opened(service, "hub", source), range(2)) == expected[:2]
        data.push_folder(second)
        assert rows(opened(service, "hub", source), range(3)) == expected[:3]
    finally:
        service.stop()
    service = serve(tmp_path, hub, "resumed")
    try:
        # Steps that were chosen before are read again, and a new one follows them.
        assert rows(opened(service, "hub", source), range(4)) == expected
        later = rows(opened(service, "later", source), range(4))
        assert later == rows(opened(service, "second", second.as_uri()), range(4))
        held = f"hf://datasets/o/n@{commit}/data"
        assert rows(opened(service, "held", held), range(4)) == expected
    finally:
        service.stop()
    manifests = [path.read_text() for path in (tmp_path / "state" / "manifests").iterdir()]
    assert any(held in text for text in manifests)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    told = [path for path in files if TOKEN.encode() in path.read_bytes()]
    assert told == [], "the token is in no log and no state"
    assert hub.cdn.asked and not any(said for _, _, said, _ in hub.cdn.asked)
    assert all(said == f"Bearer {TOKEN}" for _, _, said, _ in hub.asked())


def records(folder: Path) -> list[dict]:
    return pyarrow.parquet.read_table(folder).to_pylist()


def tars(folder: Path, count: int) -> Path:
    """The pool's rows as tars."""
    each, found = ROWS // count, records(pool(folder / "of"))
    folder = folder / "tars"
    folder.mkdir()
    for number in range(count):
        with tarfile.open(folder / f"{number:05d}.tar", "w") as archive:
            for row in found[number * each : (number + 1) * each]:
                for name, content in (("png", row["png"]), ("txt", row["caption"].encode())):
                    member = tarfile.TarInfo(f"{row['key']}.{name}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return folder


def test_tars_by_range_of_names_lists_and_converted_data(tmp_path, hub, service):
    folder = tars(tmp_path, count=32)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    hub.repository("o/tars").push(files, branch="v1.0")
    expected = rows(opened(service, "files", folder.as_uri()))
    hub.asked()
    many = opened(service, "many", "hf://datasets/o/tars@v1.0/{00000..00031}.tar")
    looks = [path for method, path, _, _ in hub.asked() if method == "HEAD"]
    assert looks == [], "many names are found by listing their folder"
    assert rows(many) == expected
    lines = "\n".join(f"hf://datasets/o/tars@v1.0/{number:05d}.tar" for number in range(32))
    (tmp_path / "list.txt").write_text(lines)
    assert rows(opened(service, "list", (tmp_path / "list.txt").as_uri())) == expected
    error = refused(service, "absent", "hf://datasets/o/tars@v1.0/{00000..00032}.tar")
    assert error.reason == "DATASET_EMPTY" and "00032.tar" in str(error)

    converted = pool(tmp_path / "converted")
    hub.repository("o/n").push_folder(converted, at="default/train", branch="refs/convert/parquet")
    expected = rows(opened(service, "converted", converted.as_uri()))
    for number, source in enumerate(
        [
            "hf://datasets/o/n@~parquet/**/*.parquet",
            "hf://datasets/o/n@refs/convert/parquet/default/train",
            "hf://datasets/o/n@refs%2Fconvert%2Fparquet/default/train/{00000..00001}.parquet",
        ]
    ):
        assert rows(opened(service, f"converted-{number}", source)) == expected


def test_rows_are_kept_and_scored_by_files_of_the_hub(tmp_path, hub, service):
    folder, ids = pool(tmp_path / "pool"), tmp_path / "ids.parquet"
    keys = [row["key"] for row in records(folder)][::2]
    pyarrow.parquet.write_table(pyarrow.table({"key": keys, "score": range(len(keys))}), ids)
    files = {f"data/{path.name}": path.read_bytes() for path in folder.iterdir()}
    data = hub.repository("o/n")
    data.push({**files, "ids.parquet": ids.read_bytes()})
    rule = superbatch.ScoreColumn(name="score", at_least=10.0)

    def run(run_id: str, uri: str, beside: str) -> superbatch.Run:
        source = superbatch.Source(uri=uri, allow=beside, scores=beside, id_column="key")
        return opened(service, run_id, source, score_columns=[rule])

    expected = rows(run("files", folder.as_uri(), ids.as_uri()), range(2))
    of_hub = run("hub", "hf://datasets/o/n/data", "hf://datasets/o/n/ids.parquet")
    # The files beside the data are those of the commit too.
    data.push({**files, "ids.parquet": b"moved"})
    assert rows(of_hub, range(2)) == expected


def test_images_by_path_are_those_of_the_commit(tmp_path, hub):
    found = records(pool(tmp_path / "pool"))
    paths = [f"{row['key']}.png" for row in found]
    captions = [row["caption"] for row in found]
    beside = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"file_name": paths, "caption": captions}), beside)
    data = hub.repository("o/n")
    images = {f"images/{path}": row["png"] for path, row in zip(paths, found, strict=True)}
    commit = data.push(images)
    service = serve(tmp_path, hub)

    def source(root: str) -> superbatch.Source:
        return superbatch.Source(uri=beside, image_root=root)

    try:
        run = opened(service, "hub", source("hf://datasets/o/n/images"))
        data.push(dict.fromkeys(images, b"moved"))
        pairs = {(row["caption"], row["png"]) for row in found}
        for captions, pictures in rows(run, range(4)):
            assert pairs.issuperset(zip(captions, pictures, strict=True))
        error = refused(service, "owner", source("hf://datasets/o"))
        assert error.reason == "INVALID_ARGUMENT" and "names no data set" in str(error)
        # No hole, which would be kept. Steps ahead may have their images already.
        del data.commits[commit]
        with pytest.raises(superbatch.Error) as caught:
            rows(run, range(4, 40))
        assert caught.value.reason == "DATASET_CHANGED" and "no such commit" in str(caught.value)
    finally:
        service.stop()
    manifests = [path.read_text() for path in (tmp_path / "state" / "manifests").iterdir()]
    assert any(f"hf://datasets/o/n@{commit}/images" in text for text in manifests)


def test_what_is_denied_says_what_to_do(tmp_path, hub, service):
    hub.repository("o/gated", gated=True)
    hub.repository("o/private", private=True).push_folder(pool(tmp_path / "pool"))
    hub.repository("o/n").push({"README.md": b"no data"})
    for number, (source, says) in enumerate(
        {
            "hf://datasets/o/gated": "must accept its terms first",
            "hf://datasets/o/none/data": "there is no",
            "hf://datasets/o/n@gone/data": "has no branch, tag or commit 'gone'",
            "hf://o/model/data": "names a model of the hub",
            "hf://datasets/o": "names no data set",
        }.items()
    ):
        error = refused(service, f"denied-{number}", source)
        assert error.reason == "INVALID_ARGUMENT" and says in str(error), error
        assert TOKEN not in str(error)
    error = refused(service, "empty", "hf://datasets/o/n")
    assert error.reason == "DATASET_EMPTY" and "README.md" in str(error)
    assert len(rows(opened(service, "private", "hf://datasets/o/private"))) == 3
    for name, token, says in (
        ("nobody", None, "set HF_TOKEN"),
        ("wrong", "hf_revoked", "the hub does not know the token"),
    ):
        other = serve(tmp_path, hub, name, token)
        try:
            error = refused(other, name, "hf://datasets/o/private")
            assert error.reason == "INVALID_ARGUMENT" and says in str(error), error
        finally:
            other.stop()
    assert "hf_revoked" not in (tmp_path / "wrong.log").read_text()


def test_redirects_are_followed_to_allowed_hosts_alone(tmp_path, hub):
    folder = pool(tmp_path / "pool")
    hub.repository("o/n").push_folder(folder)
    service = serve(tmp_path, hub, allow_uris=["hf://datasets/o/n"])
    try:
        error = refused(service, "away", "hf://datasets/o/n@main/data")
    finally:
        service.stop()
    assert hub.cdn.address in str(error) and "storage.allow_uris" in str(error)
    assert error.reason == "INVALID_ARGUMENT" and hub.cdn.asked == []
    log = (tmp_path / "hub.log").read_text()
    assert "Signature=" not in str(error) + log
    service = serve(tmp_path, hub, allow_uris=["hf://datasets/o/n", hub.cdn.address])
    try:
        assert len(rows(opened(service, "allowed", "hf://datasets/o/n@main/data"))) == 3
        error = refused(service, "other", "hf://datasets/o/other")
        assert error.reason == "URI_NOT_ALLOWED"
    finally:
        service.stop()


def test_a_hub_that_asks_to_wait_is_asked_again(tmp_path, hub, service):
    folder = pool(tmp_path / "pool")
    hub.repository("o/n").push_folder(folder)
    expected = rows(opened(service, "files", folder.as_uri()))
    hub.front.throttled = 2
    run = opened(service, "hub", "hf://datasets/o/n/data")
    assert hub.front.throttled == 0
    hub.front.throttled_headers = {"RateLimit": '"resolvers";r=0;t=1'}
    hub.front.throttled = 2
    assert rows(run) == expected
    assert hub.front.throttled == 0
    assert "429 Too Many Requests" in (tmp_path / "hub.log").read_text()


def test_an_environment_without_the_hub_is_obeyed(tmp_path, hub):
    data, state = "hf://datasets/o/n/data", (tmp_path / "state").as_uri()
    for arguments, variables, says in (
        (["index", data, "--state", state], {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
        (["index", data, "--state", state], {}, "storage.options.allow_http"),
        (["check-config"], {"SUPERBATCH_STATE": data}, "which is only read"),
    ):
        ended = command(*arguments, env={**os.environ, **hub.environment(**variables)})
        assert ended.returncode == 1 and says in ended.stderr, ended.stderr
    assert hub.asked() == []
