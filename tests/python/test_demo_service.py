"""The demo's trainer on two real ranks against the real binary, on tiny data: what `make demo`
does, in seconds.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import superbatch
import torch

from examples.demo import report, service, tiny
from examples.demo.data.packages import DemoError
from examples.demo.reference import clip_score_of_best, clip_scores, threshold
from examples.demo.settings import ARMS, Settings

STEPS = 8
SETTINGS = Settings(
    steps=STEPS,
    evaluate_every=4,
    super_batch_size=64,
    sub_batch_size=16,
    n_chunks=2,
    warmup_steps=1,
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    tiny.write_dataset(folder / "pool", rows=1024)
    tiny.write_dataset(folder / "eval", rows=32, mismatched_share=0.0, shards=1, seed=1)
    tiny.write_siglip(folder / "learner", seed=0)
    tiny.write_siglip(folder / "reference", seed=1)
    return folder


def train(policy: str, inputs: Path, folder: Path, **of_arm) -> tuple[report.ArmResult, list, dict]:
    """The arm's result, its receipts, and what the service knows of the run at the end."""
    selection = ARMS[policy]
    if selection.low_side:
        selection = replace(selection, low_side=tiny.SIDE // 2)
    arm = service.Arm(
        selection,
        0,
        SETTINGS,
        inputs,
        inputs / "learner",
        inputs / "reference",
        folder,
        **of_arm,
    )
    with service.serve(folder) as address:
        service.run_arm(arm, address)
        run = superbatch.connect(address).open_run(service.run_spec(arm))
        receipts = [run.receipt(step) for step in range(STEPS)]
        return report.read_arm(policy, 0, folder), receipts, run.get_run()


def test_a_two_rank_trainer_learns_from_batches_chosen_with_its_own_weights(inputs, tmp_path):
    result, receipts, known = train("joint", inputs, tmp_path)
    summaries = [receipt.summary for receipt in receipts]
    # Lag exact(1): step s is scored with what was pushed after step s-2; before that with the
    # initial weights.
    assert [summary.learner.step for summary in summaries] == [-1, -1, *range(STEPS - 2)]
    versions = [summary.learner.version for summary in summaries]
    assert versions[0] == versions[1] and all(a < b for a, b in zip(versions[1:], versions[2:]))
    for receipt, chosen in zip(receipts, result.chosen, strict=True):
        assert sorted(row.id for row in receipt.chosen) == sorted(chosen)
        assert receipt.summary.mean_score_chosen > receipt.summary.mean_score_candidates
    assert [point.step for point in result.points] == [0, 4, 8]
    assert result.points[-1].scanned == STEPS * SETTINGS.super_batch_size
    assert result.points[-1].flops > 0
    assert known.candidates_scanned >= STEPS * SETTINGS.super_batch_size


def test_flexi_scores_small_pictures_and_trains_half_of_the_batch_so(inputs, tmp_path):
    result, receipts, known = train("flexi", inputs, tmp_path)
    for receipt, chosen in zip(receipts, result.chosen, strict=True):
        assert receipt.summary.fidelity == "approximate"
        assert sorted(row.id for row in receipt.chosen) == sorted(chosen)
        fidelities = [row.fidelity for row in receipt.chosen]
        assert fidelities.count("approximate") == SETTINGS.sub_batch_size // 2
    accounts = known.accounts
    assert accounts.scoring.image_full == 0 < accounts.scoring.image_approximate
    assert 0 < accounts.training.image_approximate < accounts.training.image_full
    assert [point.step for point in result.points] == [0, 4, 8]
    (probe,) = result.probes
    assert probe["step"] == 0 and probe["rows"] == SETTINGS.super_batch_size
    assert accounts.probe_flops > 0
    loss = [point.loss for point in result.points[1:]]
    assert all(0 < value < 20 for value in loss)


def test_uniform_pays_for_what_it_reads_and_pushes_nothing(inputs, tmp_path):
    result, receipts, known = train("uniform", inputs, tmp_path)
    assert result.points[-1].scanned == STEPS * SETTINGS.sub_batch_size
    # A uniform draw looks at no weights, and its receipt names none.
    assert all(receipt.summary.learner is None for receipt in receipts)
    assert known.accounts.learner_flops == 0 and known.accounts.reference_flops == 0
    pool = report.Pool(inputs / "pool")
    assert 0.3 < pool.mismatched_share(sum(result.chosen, [])) < 0.7


def test_a_filter_takes_the_best_by_the_reference_at_random(inputs, tmp_path):
    pool = report.Pool(inputs / "pool")
    scores = clip_scores(inputs / "reference", inputs / "pool")
    best = clip_score_of_best(inputs / "reference", inputs / "pool", 0.4)
    assert (scores >= best).float().mean() == pytest.approx(0.4, abs=0.02) and best > 0
    result, receipts, known = train("filtered", inputs, tmp_path, clip_score_at_least=best)
    by_id = dict(zip(pool.rows, scores.tolist(), strict=True))
    # The service's own numbers, up to its rounding of embeddings.
    assert min(by_id[row] for step in result.chosen for row in step) > best - 0.01
    assert result.points[-1].scanned == STEPS * 2 * SETTINGS.super_batch_size
    assert all(receipt.summary.policy == "uniform" for receipt in receipts)
    # The reference is asked once for each row, and on the arm's bill; the learner never.
    assert known.accounts.reference_flops > 0 == known.accounts.learner_flops


def test_a_filter_leaves_something_out_where_most_scores_are_0():
    scores = torch.tensor([0.0] * 8 + [0.2, 0.4])
    assert threshold(scores, 0.1) == pytest.approx(0.22)
    # Three tenths have at least 0, as all others.
    assert threshold(scores, 0.3) == pytest.approx(0.2)
    with pytest.raises(DemoError, match="no row of the pool a CLIPScore above 0"):
        threshold(torch.zeros(10), 0.3)


def test_arms_are_judged_on_the_names_that_were_asked_for(inputs, tmp_path):
    assert ARMS["uniform"].is_baseline and not ARMS["filtered"].is_baseline
    arm = service.Arm(
        ARMS["uniform"],
        0,
        SETTINGS,
        inputs,
        inputs / "learner",
        inputs / "reference",
        tmp_path,
        split="val",
    )
    # There are none of `val` here.
    with service.serve(tmp_path) as address, pytest.raises(DemoError, match="no names of `val`"):
        service.run_arm(arm, address)


def test_a_failed_arm_says_which_and_where_its_log_is(inputs, tmp_path):
    arm = service.Arm(
        ARMS["joint"], 3, SETTINGS, inputs, tmp_path / "missing", inputs / "reference", tmp_path
    )
    with (
        service.serve(tmp_path) as address,
        pytest.raises(DemoError, match=r"joint \(seed 3\) failed.*server\.log"),
    ):
        service.run_arm(arm, address)
