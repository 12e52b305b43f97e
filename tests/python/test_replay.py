"""`superbatch replay`: steps of a run that is over, drawn again from its state alone."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import superbatch
from cluster import BINARY, Cluster
from pages import take_steps

from examples.demo import tiny

ROWS, STEPS, SUPER, SUB = 288, 8, 96, 24
# By step: uniform, joint, independent by the learner's loss, and one that reads the reference only.
PHASES = [
    superbatch.Phase(policy="uniform", super_batch_size=SUPER, sub_batch_size=SUB),
    superbatch.Phase(
        from_step=2, policy="joint", super_batch_size=SUPER, sub_batch_size=SUB, n_chunks=3
    ),
    superbatch.Phase(
        from_step=4,
        policy="independent",
        criterion="hard",
        super_batch_size=SUPER,
        sub_batch_size=SUB,
    ),
    superbatch.Phase(from_step=6, policy="k_center", super_batch_size=SUPER, sub_batch_size=SUB),
]


@pytest.fixture(scope="module")
def state(tmp_path_factory) -> Path:
    """The state of a run that is over; its service no longer runs."""
    folder = tmp_path_factory.mktemp("replay")
    tiny.write_dataset(folder / "pool", rows=ROWS)
    tiny.write_siglip(folder / "learner", seed=0)
    tiny.write_siglip(folder / "reference", seed=1)
    with Cluster(folder) as cluster:
        client = superbatch.connect(cluster.address)
        run = client.open_run(
            superbatch.RunSpec(
                run_id="past",
                sources=[(folder / "pool").as_uri()],
                reference=(folder / "reference").as_uri(),
                learner=superbatch.Learner(
                    model_uri=(folder / "learner").as_uri(),
                    snapshot_uri=(folder / "learner" / "model.safetensors").as_uri(),
                ),
                phases=PHASES,
                loss="sigmoid",
                seed=11,
                micro_batch_rows=16,
                epochs=3,
            )
        )
        take_steps(run, folder, STEPS)
    return folder / "state"


def replay(state: Path, step: int, *options: str) -> dict:
    command = [BINARY, "replay", "past", "--step", str(step), "--state", state, "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def refused(state: Path, step: int, *options: str) -> str:
    command = [BINARY, "replay", "past", "--step", str(step), "--state", state, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and not done.stdout, done.stdout
    return done.stderr


def receipt(state: Path, step: int) -> dict:
    command = [BINARY, "receipts", "past", "--step", str(step), "--state", state, "--json"]
    return json.loads(subprocess.run(command, capture_output=True, check=True, timeout=60).stdout)


def test_the_settings_of_the_step_draw_the_same_rows_bit_for_bit(state):
    # The second step of each policy.
    for step in range(1, STEPS, 2):
        was, now = receipt(state, step), replay(state, step)
        policy = was["summary"]["policy"]
        assert now["same_draw"], f"step {step}, {policy}"
        for field in ("id", "position", "chunk", "score", "weight"):
            drawn = [row[field] for row in now["rows"]]
            assert drawn == [row[field] for row in was["chosen"]], f"{field} of step {step}"
        assert all(row["was_chosen"] for row in now["rows"]) and now["rows_shared"] == SUB
        if policy in ("joint", "independent"):
            assert now["redrawn"]["batch_score"] == was["summary"]["batch_score"]
            assert now["losses_differ_by"] == 0, "the same weights, the same arithmetic"
            assert now["measured"]["uniform"] == was["summary"]["uniform_score"]
            assert now["measured"]["chosen"] == pytest.approx(
                was["summary"]["batch_score"], abs=1e-6
            )


def test_another_policy_is_measured_beside_the_one_that_was(state):
    now = replay(state, 3, "--policy", "independent")
    assert now["chosen"]["policy"] == "joint" and now["redrawn"]["policy"] == "independent"
    assert now["measured"]["criterion"] == "learnability"
    assert now["measured"]["redrawn"] == pytest.approx(now["redrawn"]["batch_score"], abs=1e-6)
    uniform = replay(state, 3, "--policy", "uniform")
    assert uniform["redrawn"]["batch_score"] is None
    assert uniform["measured"]["chosen"] == now["measured"]["chosen"]
    assert 0 < uniform["rows_shared"] < SUB
    assert uniform["measured"]["redrawn"] < uniform["measured"]["chosen"], "a draw by scores gains"
    best = replay(state, 3, "--policy", "top_k", "--criterion", "hard")
    assert best["measured"]["criterion"] == "hard"
    own = [row["own_score"] for row in best["rows"]]
    assert own == sorted(own, reverse=True)


def test_sizes_seeds_and_tuning_are_taken(state):
    fewer = replay(state, 2, "--filter-ratio", "0.875", "--n-chunks", "4", "--seed", "12")
    assert len(fewer["rows"]) == 12 and fewer["redrawn"]["n_chunks"] == 4
    assert fewer["redrawn"]["filter_ratio"] == 0.875 and fewer["redrawn"]["seed"] == 12
    cold = replay(state, 2, "--policy", "independent", "--temperature", "1e-6")
    own = [row["own_score"] for row in cold["rows"]]
    assert own == sorted(own, reverse=True), "the best, best first"
    left = replay(state, 2, "--clip-score-at-least", "0")
    assert left["redrawn"]["tuning"]["clip_score_at_least"] == 0


def test_what_cannot_be_drawn_is_said(state):
    assert "must be" in refused(state, 2, "--policy", "independent", "--temperature", "0")
    assert "temperature belongs to policy independent" in refused(state, 2, "--temperature", "2")
    assert "filter_ratio is 1" in refused(state, 2, "--filter-ratio", "1")
    assert "sub_batch_size" in refused(state, 2, "--sub-batch-size", "97")
    assert "is not committed" in refused(state, 99)
    assert "decided without the learner" in refused(state, 0, "--policy", "joint")
    easy = replay(state, 0, "--policy", "joint", "--criterion", "easy")
    assert easy["measured"]["criterion"] == "easy" and len(easy["rows"]) == SUB


def test_deleted_weights_are_named_and_the_reference_still_serves(state, tmp_path):
    copy = tmp_path / "state"
    shutil.copytree(state, copy)
    before = {path for path in copy.rglob("*") if path.is_file()}
    assert replay(copy, 3)["same_draw"]
    assert {path for path in copy.rglob("*") if path.is_file()} == before, "nothing is written"
    shutil.rmtree(copy / "runs/past/snapshots")
    told = refused(copy, 3)
    assert "weights version" in told and "snapshots_kept" in told and "--criterion easy" in told
    assert replay(copy, 3, "--criterion", "easy")["measured"]["criterion"] == "easy"
    uniform = replay(copy, 3, "--policy", "uniform")
    assert uniform["measured"] is None and "snapshots_kept" in uniform["missing"]


def test_text_says_what_json_says(state):
    command = [BINARY, "replay", "past", "--step", "3", "--state", state]
    told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
    assert f"the same {SUB} rows in the same order" in told
    assert "batch score by learnability" in told and "differ from those of the receipt" in told
