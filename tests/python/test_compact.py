"""`superbatch state compact`: receipts of old steps go into packs, and are read there by all."""

import json
import shutil
import signal
from pathlib import Path

import pyarrow.parquet
import pytest
import superbatch
from cluster import Cluster
from commands import fails, prints
from commands import run as command
from pages import get
from test_end_to_end import inputs, reason, spec, train  # noqa: F401

#: Three packs of four steps, of which the last is left alone while the run goes on: twice its
#: `max_ahead` of 2 steps stay at least.
STEPS, PACK, KEPT = 12, 4, 3
PACKED = 8
RUN = "looked-at"


class State:
    """The state's files, and the commands on it."""

    def __init__(self, folder: Path):
        self.folder = folder / "state"
        self.option = ("--state", self.folder.as_uri())

    def compact(self, *more: str, pack: int = PACK) -> str:
        small = ("--pack", pack, "--keep-last", KEPT)
        return prints("state", "compact", RUN, *small, *more, *self.option)

    def check(self) -> str:
        return prints("state", "check", RUN, *self.option)

    def wrong(self, *what) -> str:
        """All that a command says that finds something wrong."""
        ended = command("state", *what, *self.option)
        assert ended.returncode == 1 and not ended.stdout, ended
        return ended.stderr

    def receipts(self) -> list[Path]:
        """Receipts in files of their own, by step."""
        found = (self.folder / "runs" / RUN / "receipts").glob("*/*/*.parquet")
        return sorted(found, key=lambda path: int(path.parent.name))

    def packs(self) -> list[Path]:
        return sorted((self.folder / "runs" / RUN / "receipts" / "packed").glob("*.parquet"))

    def shown(self) -> dict[int, dict]:
        lines = prints("receipts", RUN, "--last", 1000, "--json", *self.option).splitlines()
        return {line["summary"]["step"]: line for line in map(json.loads, lines)}


@pytest.fixture(scope="module")
def trained(inputs, tmp_path_factory) -> Path:  # noqa: F811
    """The state of a run of a few steps, whose service no longer runs."""
    folder = tmp_path_factory.mktemp("trained")
    with Cluster(folder) as cluster:
        train(superbatch.connect(cluster.address).open_run(spec(inputs, RUN)), inputs, end=STEPS)
    return folder / "state"


@pytest.fixture
def cluster(trained, tmp_path):
    """A service on a copy of that state."""
    shutil.copytree(trained, tmp_path / "state")
    with Cluster(tmp_path) as cluster:
        yield cluster


@pytest.fixture
def state(tmp_path) -> State:
    return State(tmp_path)


@pytest.fixture
def run(inputs, cluster) -> superbatch.Run:  # noqa: F811
    """A run of a few steps, on a service that runs."""
    return superbatch.connect(cluster.address).open_run(spec(inputs, RUN))


def batch(run: superbatch.Run, step: int) -> list:
    columns = ["_superbatch_id", "_superbatch_score", "caption"]
    served = run.select(step, rank=0, world_size=1)
    return [served[column].to_pylist() for column in columns]


def test_packed_receipts_are_read_by_everything_and_beside_the_service(
    inputs,  # noqa: F811
    run,
    cluster,
    state,
):
    known = [run.receipt(step) for step in range(STEPS)]
    listed, shown = state.shown(), batch(run, 1)
    page = cluster.coordinator.page_address
    of_page = get(page, f"/api/runs/{RUN}/steps/2")
    timeline = get(page, f"/api/runs/{RUN}/timeline")["batch_score"][:STEPS]
    files = state.receipts()

    said = state.compact("--dry-run")
    assert f"would pack {PACKED} receipts" in said and "at least 2 files" in said
    assert state.receipts()[:STEPS] == files[:STEPS] and not state.packs()
    before = sum(path.stat().st_size for path in files[:PACKED])
    said = state.compact()
    assert f"packed {PACKED} receipts of {before} bytes into 2 files" in said, said
    assert f"deleted {PACKED} objects, {before} bytes" in said
    assert len(state.packs()) == 2 and state.receipts()[: STEPS - PACKED] == files[PACKED:STEPS]
    assert sum(path.stat().st_size for path in state.packs()) < before
    assert not files[1].parent.exists(), "no empty folders"

    assert [run.receipt(step) for step in range(STEPS)] == known
    now = state.shown()
    assert {step: now[step] for step in listed} == listed
    assert batch(run, 1) == shown, "a step asked for again"
    assert get(page, f"/api/runs/{RUN}/steps/2") == of_page
    assert get(page, f"/api/runs/{RUN}/timeline")["batch_score"][:STEPS] == timeline
    assert f"({PACKED} of them in 2 packs)" in state.check()
    # Nothing is left to do.
    assert "packed 0 receipts" in state.compact() and "deleted 0 objects" in state.compact()
    packs = state.packs()
    prints("state", "gc", RUN, *state.option)
    assert state.packs() == packs

    # A coordinator that never saw the receipts in files of their own.
    cluster.coordinator.kill()
    cluster.start_coordinator("again")
    again = superbatch.connect(cluster.address).open_run(spec(inputs, RUN))
    assert again.next_step >= STEPS
    assert [again.receipt(step) for step in range(STEPS)] == known
    assert batch(again, 1) == shown
    same = prints("replay", RUN, "--step", 2, "--json", *state.option)
    assert json.loads(same)["same_draw"], same


def test_a_run_is_rewound_and_forked_at_packed_steps(inputs, run, cluster, state):  # noqa: F811
    ids = [[row.id for row in run.receipt(step).chosen] for step in range(STEPS)]
    state.compact()
    # Not further back: the pushes after that step would have to be repeated.
    assert run.rewind(3, mode="replay") == 1
    assert [row.id for row in run.receipt(3).chosen] == ids[3]
    assert sorted(batch(run, 3)[0]) == sorted(ids[3])
    client = superbatch.connect(cluster.address)
    at = superbatch.Fork(run_id=RUN, step=5)
    fork = client.open_run(spec(inputs, "fork", fork_of=at))
    assert fork.next_step == 5
    assert [[row.id for row in fork.receipt(step).chosen] for step in range(5)] == ids[:5]
    assert sorted(batch(fork, 3)[0]) == sorted(ids[3])

    served = batch(run, 3)[0]
    assert run.rewind(3, mode="reselect") == 2
    with pytest.raises(superbatch.Error) as caught:
        run.receipt(4)
    assert reason(caught) == "STEP_NOT_COMMITTED"
    assert [row.id for row in run.receipt(4, generation=0).chosen] == ids[4]
    run = client.open_run(spec(inputs, RUN), incarnation="second")
    assert run.next_step == 3
    anew = train(run, inputs, start=3, end=6)
    assert len(anew) == 3 and anew[0] != served
    assert run.receipt(3).summary.chosen_in_generation == 2
    assert run.receipt(2).summary.chosen_in_generation == 0
    state.check()
    run.close()
    # Of a run that is over, the receipts of all generations go, up to the last step.
    state.compact(pack=1000)
    assert not state.receipts()
    assert [row.id for row in run.receipt(8, generation=0).chosen] == ids[8]
    assert sorted(row.id for row in run.receipt(3).chosen) == sorted(anew[0])
    assert [[row.id for row in fork.receipt(step).chosen] for step in range(5)] == ids[:5]
    state.check()
    lines = prints("runs", "--json", *state.option).splitlines()
    looked_at = next(line for line in map(json.loads, lines) if line["run"] == RUN)
    assert looked_at["state"] == "closed" and looked_at["last_step"] >= 5


def test_damage_of_a_pack_is_named(run, state):
    state.compact()
    pack = state.packs()[1]
    whole = pack.read_bytes()
    for damaged in [whole[:-9], whole[:200] + bytes([whole[200] ^ 1]) + whole[201:]]:
        pack.write_bytes(damaged)
        assert f"{pack.name}: this pack of receipts is damaged" in state.wrong("check", RUN)
        pack.write_bytes(whole)
    # A receipt beside its pack that says something else.
    beside = state.folder / "runs" / RUN / "receipts" / "0" / "1" / "0.parquet"
    beside.parent.mkdir(parents=True)
    shutil.copy(state.receipts()[0], beside)
    small = ("--pack", PACK, "--keep-last", KEPT)
    for said in (state.wrong("check", RUN), state.wrong("compact", RUN, *small)):
        assert "receipts/0/1/0.parquet is not what" in said
    assert beside.exists()


def test_a_pack_is_a_parquet_file_of_all_its_receipts(run, state):
    state.compact()
    table = pyarrow.parquet.read_table(state.packs()[0].parent)
    assert table["step"].to_pylist() == list(range(PACKED))
    for step, chosen in zip(table["step"].to_pylist(), table["chosen"].to_pylist(), strict=True):
        expected = [(row.id, row.score) for row in run.receipt(step).chosen]
        assert [(row["id"], row["score"]) for row in chosen] == expected
    summaries = [json.loads(text) for text in table["summary"].to_pylist()]
    assert [summary["policy"] for summary in summaries] == ["joint"] * PACKED


def test_builds_that_know_no_packs_are_kept_out(inputs, run, cluster, state):  # noqa: F811
    def fact() -> dict:
        return json.loads((state.folder / "runs" / RUN / "run.json").read_text())

    opened_with = fact()
    at = superbatch.Fork(run_id=RUN, step=5)
    fork = superbatch.connect(cluster.address).open_run(spec(inputs, "fork", fork_of=at))
    # The copied state of the run has had an owner before.
    folders = [state.folder / "runs" / known / "owner" for known in (RUN, "fork")]
    owners = [sorted(folder.iterdir()) for folder in folders]
    for owner in (known[-1] for known in owners):
        known = json.loads(owner.read_text())
        assert known.pop("reads_packs") is True
        owner.write_text(json.dumps(known))
    said = fails("state", "compact", RUN, "--pack", PACK, "--keep-last", KEPT, *state.option)
    assert cluster.address in said and "older build" in said, said
    assert fact() == opened_with and not state.packs(), "nothing was changed"

    # It hangs, and answers no health check. It has lost the run and its fork when it wakes.
    cluster.coordinator.process.send_signal(signal.SIGSTOP)
    try:
        assert f"packed {PACKED} receipts" in state.compact()
    finally:
        cluster.coordinator.process.send_signal(signal.SIGCONT)
    assert fact() == opened_with | {"format": 3}
    assert [len(list(folder.iterdir())) for folder in folders] == [
        len(known) + 1 for known in owners
    ]
    # A coordinator of this build takes them back.
    assert run.receipt(1).summary.step == fork.receipt(1).summary.step == 1
    assert state.check().startswith("ok: ")
