"""`superbatch select`: what it draws, and what it refuses."""

import json

import pytest
import superbatch
from commands import CASE, GOLDEN, USAGE, fails, prints, run
from safetensors import safe_open
from safetensors.numpy import save_file


@pytest.mark.parametrize(
    "path",
    [
        CASE,
        *(
            GOLDEN / f"{name}.safetensors"
            for name in (
                "joint-sigmoid-hard-B256-b51-N16",
                "joint-softmax-learnability-B64-b16-N4",
                "independent-softmax-easy-B64-b16-N4",
            )
        ),
    ],
    ids=lambda path: path.stem,
)
def test_select_draws_what_the_oracle_says_on_every_backend(path):
    with safe_open(path, "np") as file:
        expected, metadata = file.get_tensor("expected").tolist(), file.metadata()
    for backend in ("native", "torch"):
        drawn = json.loads(prints("select", "--embeddings", path, "--backend", backend))
        assert drawn["indices"] == expected, backend
        assert sum(drawn["chunks"]) == int(metadata["b"])
        assert set(drawn["seconds"]) == {"load", "select"}
        if "batch_score" in metadata:
            assert drawn["batch_score"] == pytest.approx(float(metadata["batch_score"]), rel=1e-4)


def test_select_takes_flags_before_the_file_and_says_what_is_wrong(tmp_path):
    drawn = json.loads(
        prints(
            "select", "--embeddings", CASE, "--sub-batch-size", 7, "--n-chunks", 3, "--threads", 1
        )
    )
    assert drawn["chunks"] == [3, 2, 2] and len(set(drawn["indices"])) == 7
    assert "100" in fails("select", "--embeddings", CASE, "--sub-batch-size", 100)
    assert str(tmp_path / "none") in fails("select", "--embeddings", tmp_path / "none")
    (tmp_path / "text").write_text("no tensors")
    assert "not a safetensors file" in fails("select", "--embeddings", tmp_path / "text")
    assert "joint" in fails("select", "--embeddings", CASE, "--policy", "best", code=USAGE)
    said = fails("select", "--embeddings", CASE, "--temperature", 2)
    assert (
        "temperature belongs to policy independent, and the policy is joint; leave it out" in said
    )


def test_select_warns_of_rows_that_are_not_normalised(tmp_path):
    with safe_open(CASE, "np") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
    assert run("select", "--embeddings", CASE).stderr == ""
    tensors["learner_txt"] = 3 * tensors["learner_txt"]
    save_file(tensors, tmp_path / "long.safetensors", metadata)
    ended = run("select", "--embeddings", tmp_path / "long.safetensors")
    assert (ended.returncode, len(json.loads(ended.stdout)["indices"])) == (0, 16)
    (said,) = ended.stderr.splitlines()
    assert said.startswith(
        "superbatch: warning: learner text: rows are not L2-normalised (median norm 3.000, "
        "candidate "
    ), said


def test_select_draws_by_every_policy_and_leaves_out_what_it_is_told_to():
    select = lambda *flags: json.loads(prints("select", "--embeddings", CASE, "--seed", 1, *flags))
    size = {
        policy: len(set(select("--policy", policy)["indices"]))
        for policy in (
            "uniform",
            "independent",
            "joint",
            "joint_top_k",
            "top_k",
            "rank",
            "proportional",
            "k_center",
        )
    }
    assert set(size.values()) == {16}
    assert "weights" not in select("--policy", "rank")
    weights = select("--policy", "proportional", "--weight-exponent", 1)["weights"]
    assert len(weights) == 16 and max(weights) == 1 and min(weights) > 0
    cold = select("--policy", "independent", "--temperature", 1e-9)["indices"]
    assert sorted(cold) == sorted(select("--policy", "top_k")["indices"])
    thinned = select("--policy", "top_k", "--clip-score-at-least", 0.05)
    assert 0 < thinned["left_out"] <= 48
    assert "temperature" in fails(
        "select", "--embeddings", CASE, "--policy", "independent", "--temperature", 0
    )
