"""`superbatch state`: what a run left behind is whole, or it is said what is not; and what nothing
needs goes.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import superbatch
from cluster import BINARY, DEADLINE_SECONDS, Cluster
from test_end_to_end import inputs, phase, spec, train, weights  # noqa: F401
from test_tar import tars  # noqa: F401

#: More than may be decided ahead, so that a step that is gone is a gap.
STEPS = 8


def state(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [BINARY, "state", *arguments, "--state", (folder / "state").as_uri()],
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
    )


@pytest.fixture
def run(inputs, tmp_path) -> superbatch.Run:  # noqa: F811
    """A run of a few steps, on a service that runs."""
    with Cluster(tmp_path) as cluster:
        run = superbatch.connect(cluster.address).open_run(spec(inputs, "looked-at"))
        train(run, inputs, end=STEPS)
        yield run


def files(folder: Path, below: str) -> list[Path]:
    """Files of the run. A name with `#` is an object that is being written, as by a step ahead."""
    found = (folder / "state" / "runs" / "looked-at" / below).rglob("*")
    return sorted(path for path in found if "#" not in path.name and path.is_file())


def checked(folder: Path) -> tuple[int, str]:
    ended = state(folder, "check", "looked-at")
    return ended.returncode, ended.stdout + ended.stderr


def test_a_whole_state_is_said_to_be_whole_and_damage_is_named(run, tmp_path):
    code, said = checked(tmp_path)
    assert code == 0 and said.startswith("ok: ") and f"{STEPS} pushes" in said, said
    receipt, snapshot = files(tmp_path, "receipts/0/1")[0], files(tmp_path, "snapshots")[0]
    whole = {path: path.read_bytes() for path in (receipt, snapshot)}
    for path, damaged in [
        (receipt, whole[receipt][:-9]),
        (snapshot, whole[snapshot][:-1] + bytes([whole[snapshot][-1] ^ 1])),
    ]:
        path.write_bytes(damaged)
        code, said = checked(tmp_path)
        assert code == 1 and path.name in said, said
        path.write_bytes(whole[path])
    receipt.unlink()
    code, said = checked(tmp_path)
    assert code == 1 and "step 1 has no receipt" in said, said
    receipt.write_bytes(whole[receipt])
    push = files(tmp_path, "pushes")[0]
    push.unlink()
    code, said = checked(tmp_path)
    assert code == 1 and "the weights that it names were not published" in said, said


def test_gc_leaves_an_open_run_what_it_needs_and_a_closed_one_its_last_weights(
    run,
    inputs,
    tmp_path,
):
    before = files(tmp_path, "")
    assert state(tmp_path, "gc", "looked-at").stdout == "deleted 0 objects, 0 bytes\n"
    # Steps ahead may be decided meanwhile, which adds files.
    assert set(before) <= set(files(tmp_path, ""))
    run.push_weights(weights(inputs, STEPS), step=STEPS)
    run.close()
    snapshots = files(tmp_path, "snapshots")
    said = state(tmp_path, "gc", "looked-at", "--dry-run").stdout
    assert f"would delete {len(snapshots) - 1} objects" in said
    assert files(tmp_path, "snapshots") == snapshots
    said = state(tmp_path, "gc", "looked-at").stdout
    assert f"deleted {len(snapshots) - 1} objects" in said
    left = files(tmp_path, "snapshots")
    assert [path.name.split(".")[0] for path in left] == [run.get_run().learner.digest]
    assert checked(tmp_path)[0] == 0
    assert len(run.receipt(STEPS - 1).chosen) == 24


def test_a_run_that_is_not_there_is_said(tmp_path):
    ended = state(tmp_path, "check", "nowhere")
    assert ended.returncode == 1 and "there is no run 'nowhere'" in ended.stderr


def test_what_no_run_needs_of_data_sets_goes_once_it_is_old(inputs, tars, tmp_path):  # noqa: F811
    needed, other = tmp_path / "needed", tmp_path / "other"
    for folder in (needed, other):
        shutil.copytree(tars, folder)
    column = superbatch.ScoreColumn(name="number")
    asked = phase(policy="top_k", criterion="column", n_chunks=1, score_columns=[column])
    settings = {"sources": [needed.as_uri()], "phases": [asked], "max_ahead": 1}
    with Cluster(tmp_path) as cluster:
        client = superbatch.connect(cluster.address)
        run = client.open_run(spec(inputs, "reads", lag=superbatch.at_most(8), **settings))
        run.select(0, rank=0, world_size=1)
    command = [BINARY, "index", other.as_uri(), "--state", (tmp_path / "state").as_uri()]
    subprocess.run(command, check=True, timeout=DEADLINE_SECONDS)

    def kept() -> set[Path]:
        return set((tmp_path / "state").glob("tar-indexes/*")) | columns()

    def columns() -> set[Path]:
        return set((tmp_path / "state").glob("score-columns/*"))

    before = kept()
    assert len(before) == 6 + len(columns()) and columns()
    ended = state(tmp_path, "gc-shared")
    assert ended.stdout == "deleted 0 objects, 0 bytes\n" and kept() == before, "all is new"
    for path in before:
        os.utime(path, (0, 0))
    ended = state(tmp_path, "gc-shared", "--dry-run")
    assert "would delete 3 objects" in ended.stdout and kept() == before
    ended = state(tmp_path, "gc-shared")
    assert "deleted 3 objects" in ended.stdout, ended.stderr
    assert len(kept()) == 3 + len(columns()) and kept() < before
    # What stays is what the run reads: nothing is made anew.
    assert state(tmp_path, "check", "reads").returncode == 0
    damaged = sorted(columns())[0]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    ended = state(tmp_path, "check", "reads")
    assert ended.returncode == 1 and damaged.name in ended.stderr


def test_embeddings_that_no_run_needs_go_once_they_are_old(inputs, tmp_path):  # noqa: F811
    def embed(reference: str) -> None:
        command = [BINARY, "embed", "--model", str(inputs / reference)]
        command += ["--sources", (inputs / "pool").as_uri()]
        command += ["--state", (tmp_path / "state").as_uri()]
        subprocess.run(command, check=True, timeout=5 * DEADLINE_SECONDS)

    def kept() -> set[Path]:
        return set((tmp_path / "state" / "reference").iterdir())

    embed("reference")
    needed = kept()
    embed("learner")
    others = kept() - needed
    assert needed and len(others) == len(needed)
    with Cluster(tmp_path) as cluster:
        client = superbatch.connect(cluster.address)
        client.open_run(spec(inputs, "closed")).select(0, rank=0, world_size=1)
        client.close_run("closed")
    for path in kept():
        os.utime(path, (0, 0))
    ended = state(tmp_path, "gc-shared")
    assert f"deleted {len(others)} objects" in ended.stdout, ended.stderr
    assert kept() == needed
    assert state(tmp_path, "check", "closed").returncode == 0
    damaged = sorted(needed)[0]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    ended = state(tmp_path, "check", "closed")
    assert ended.returncode == 1 and damaged.name in ended.stderr
