"""Replays of runs with phases, references and histories of their own, by the real binary."""

import json
import os
import re
import subprocess
from pathlib import Path
from time import monotonic, sleep

import pyarrow.parquet
import pytest
import superbatch
from cluster import BINARY, DEADLINE_SECONDS, Cluster
from pages import get, page_on
from pages import refused as refused_by_page
from test_end_to_end import inputs, phase, spec, train  # noqa: F401
from test_flexi import HALF, LOW

#: Where a fork leaves its run, and the step to which a run is taken back.
FORKED, BACK = 3, 2


@pytest.fixture(scope="module")
def state(inputs, tmp_path_factory) -> Path:  # noqa: F811
    """The state of several runs that are over."""
    folder = tmp_path_factory.mktemp("replayed")
    with Cluster(folder) as cluster:
        client = superbatch.connect(cluster.address)

        def over(run_id: str, end: int = 4, **changes) -> None:
            run = client.open_run(spec(inputs, run_id, **changes))
            train(run, inputs, start=run.next_step, end=end)
            run.close()

        warm = phase(policy="uniform", approximation=LOW, multi_resolution=HALF)
        approximate = phase(from_step=2, fidelity="approximate", approximation=LOW)
        over("warm", phases=[warm, approximate])
        own = [phase(policy="uniform"), phase(from_step=3, reference_step=1)]
        over("own", end=5, phases=own)
        over("falls", fallback="reference_only")
        # The fork has another reference than the run that it leaves.
        over(
            "fork",
            end=5,
            fork_of=superbatch.Fork(run_id="falls", step=FORKED),
            reference=(inputs / "learner").as_uri(),
        )
    return folder / "state"


def run(state: Path, run_id: str, step: int, *options: str) -> subprocess.CompletedProcess:
    command = [BINARY, "replay", run_id, "--step", str(step), "--state", state, "--json", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def replay(state: Path, run_id: str, step: int, *options: str) -> dict:
    done = run(state, run_id, step, *options)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_steps_of_a_warm_up_and_after_it_are_drawn_again(state):
    for step in (0, 2, 3):
        assert replay(state, "warm", step)["same_draw"], f"step {step}"
    hard = replay(state, "warm", 3, "--criterion", "hard")
    assert hard["measured"]["criterion"] == "hard" and not hard["same_draw"]
    uniform = replay(state, "warm", 3, "--policy", "uniform")
    assert uniform["measured"]["criterion"] == "learnability"


def test_a_step_with_its_own_reference_is_drawn_by_what_needs_none(state):
    hard = replay(state, "own", 3, "--policy", "independent", "--criterion", "hard")
    assert hard["measured"]["criterion"] == "hard" and len(hard["rows"]) == 24
    uniform = replay(state, "own", 3, "--policy", "uniform")
    assert uniform["measured"] is None and "earlier weights" in uniform["missing"]
    asked = run(state, "own", 3)
    assert asked.returncode == 1 and "reference_step" in asked.stderr
    assert "--criterion hard" in asked.stderr


def test_the_fallback_of_a_run_has_no_say_in_a_redraw(state):
    drawn = replay(state, "falls", 2, "--policy", "proportional", "--criterion", "hard")
    assert drawn["redrawn"]["policy"] == "proportional" and len(drawn["rows"]) == 24


def test_steps_that_a_fork_inherited_are_those_of_its_run(state):
    for step in range(FORKED):
        assert replay(state, "fork", step)["same_draw"], f"step {step}"
        assert replay(state, "fork", step)["run_id"] == "falls"
    assert replay(state, "fork", FORKED)["run_id"] == "fork"


def test_the_pairs_of_a_step_that_was_taken_back_are_those_of_its_new_choice(inputs, tmp_path):
    with Cluster(tmp_path) as cluster, page_on(tmp_path / "state") as page:
        run = superbatch.connect(cluster.address).open_run(spec(inputs, "back"))
        train(run, inputs)
        at = f"/api/runs/back/steps/{BACK}/pairs"
        before = get(page, at)
        run.rewind(BACK, mode="reselect")
        train(run, inputs, start=BACK)
        # Facts are read again after a second at most.
        until = monotonic() + DEADLINE_SECONDS
        while not get(page, "/api/runs/back")["rewinds"]:
            assert monotonic() < until, "the page does not show the rewind"
            sleep(0.05)
        after = get(page, at)
        chosen = [f"{row.source}.{row.shard}.{row.row}" for row in run.receipt(BACK).chosen]
        assert after["key"] == chosen != before["key"]
        assert get(page, f"{at}?generation=0") == before


def test_a_chosen_row_that_is_damaged_now_is_named_by_its_pairs(inputs, tmp_path):  # noqa: F811
    shard = tmp_path / "plain" / "00000.parquet"
    shard.parent.mkdir()
    table = pyarrow.parquet.read_table(inputs / "pool" / "00000.parquet")
    # As they are, so that the bytes of an image are found in the file.
    pyarrow.parquet.write_table(
        table, shard, row_group_size=64, compression="none", use_dictionary=False
    )
    with Cluster(tmp_path) as cluster:
        run = superbatch.connect(cluster.address).open_run(
            spec(inputs, "hurt", sources=[shard.parent.as_uri()])
        )
        train(run, inputs, end=2)
        row = run.receipt(1).chosen[3]
        run.close()
    image, times = table["png"][row.row].as_py(), os.stat(shard)
    with shard.open("r+b") as file:
        # Other rows may have the same image.
        damaged = file.read().replace(image, bytes(len(image)))
        file.seek(0)
        file.write(damaged)
    # The file's name in its manifest is of its size, time and place.
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    with page_on(tmp_path / "state") as page:
        _, body = refused_by_page(page, "/api/runs/hurt/steps/1/pairs")
    named = re.search(r"row 00000.parquet#(\d+) was chosen in step 1 and cannot be used", body)
    assert table["png"][int(named.group(1))].as_py() == image
