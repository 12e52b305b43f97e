"""Every policy and rule of the kernels in served runs, drawn by the coordinator itself and on a
worker.
"""

import json
import math
import os
import subprocess

import pyarrow
import pyarrow.parquet
import pytest
import superbatch
from cluster import BINARY, Cluster
from refusal import refused
from superbatch import Tuning
from test_end_to_end import inputs, phase, service, spec  # noqa: F401

POLICIES = {
    "uniform": None,
    "independent": Tuning(temperature=0.5),
    "joint": None,
    "joint_top_k": None,
    "top_k": None,
    "rank": Tuning(pressure=50.0),
    "proportional": Tuning(weight_exponent=1.0),
    "k_center": None,
}
NUMBERS = ("temperature", "pressure", "priority_exponent", "weight_exponent")
WORKER_THREADS = len(os.sched_getaffinity(0)) + 1
# Embeddings that differ by no more are of the same image.
TWINS = 0.99999


@pytest.fixture(scope="module")
def on_worker(tmp_path_factory):
    """A service that has a worker select."""
    environment = {
        "SUPERBATCH_COORDINATOR__SELECTOR_DEVICE": "worker",
        "SUPERBATCH_WORKER__THREADS": str(WORKER_THREADS),
    }
    with Cluster(tmp_path_factory.mktemp("on-worker"), environment=environment) as cluster:
        yield cluster


def opened(cluster, asked: superbatch.RunSpec) -> superbatch.Run:
    return superbatch.connect(cluster.address).open_run(asked)


def step(cluster, asked: superbatch.RunSpec) -> tuple:
    """The first step's batch, and its receipt."""
    run = opened(cluster, asked)
    return run.select(0, rank=0, world_size=1), run.receipt(0)


def drawn(receipt) -> list[tuple]:
    return [(row.id, row.chunk, row.score, row.weight) for row in receipt.chosen]


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_draws_alike_in_the_coordinator_and_on_a_worker(
    inputs, service, on_worker, policy
):
    asked = spec(inputs, f"alike-{policy}", phases=[phase(policy=policy, tuning=POLICIES[policy])])
    (batch, here), (_, there) = step(service, asked), step(on_worker, asked)
    assert drawn(here) == drawn(there)
    assert len({row.id for row in here.chosen}) == 24
    assert here.summary.policy == policy
    chunks = 3 if policy in ("joint", "joint_top_k", "k_center") else 1
    assert here.summary.n_chunks == chunks and {row.chunk for row in here.chosen} == set(
        range(chunks)
    )
    weights = {row.id: row.weight for row in here.chosen}
    assert (
        dict(zip(batch["_superbatch_id"].to_pylist(), batch["_superbatch_weight"].to_pylist()))
        == weights
    )
    if policy != "uniform":
        assert there.summary.selector_threads == WORKER_THREADS != here.summary.selector_threads
    # Who reads no loss asks no learner, and has no score.
    blind = policy in ("uniform", "k_center")
    assert (here.summary.learner is None) == (here.summary.batch_score is None) == blind


@pytest.mark.parametrize("policy", POLICIES)
def test_a_receipt_holds_the_numbers_that_its_policy_read(inputs, service, policy):
    asked = spec(inputs, f"alike-{policy}", phases=[phase(policy=policy, tuning=POLICIES[policy])])
    run, receipt = opened(service, asked), step(service, asked)[1]
    read = {
        "independent": {"temperature": 0.5},
        "rank": {"pressure": 50.0},
        "proportional": {"priority_exponent": 0.6, "weight_exponent": 1.0},
    }.get(policy)
    for tuning in (receipt.summary.tuning, run.spec.phases[0].tuning):
        assert read == (
            tuning and {name: tuning[name] for name in NUMBERS if tuning[name] is not None}
        )
    assert receipt.summary.left_out is None


def test_top_k_takes_the_largest_of_all_scores(inputs, service):
    scored = [
        drawn(step(service, spec(inputs, f"largest-{number}", phases=[phase(**changes)]))[1])
        for number, changes in enumerate(
            [
                {"policy": "top_k", "sub_batch_size": 96},
                {"policy": "top_k"},
                {"policy": "joint_top_k", "n_chunks": 1},
                {"policy": "joint_top_k"},
            ]
        )
    ]
    everyone, largest, one_chunk, joint = scored
    scores = [score for _, _, score, _ in everyone]
    assert len(everyone) == 96 and scores == sorted(scores, reverse=True) and scores[0] > scores[-1]
    assert largest == everyone[:24] == one_chunk
    assert joint[:8] == everyone[:8], "the first chunk is conditional on nothing"
    assert [row[0] for row in joint] != [row[0] for row in largest]
    for chunk in range(3):
        inside = [score for _, at, score, _ in joint if at == chunk]
        assert inside == sorted(inside, reverse=True) and len(inside) == 8


def test_k_center_reads_no_loss_whatever_the_criterion(inputs, service):
    drawings = []
    for criterion in ("learnability", "hard", "easy"):
        asked = spec(
            inputs,
            f"spread-{criterion}",
            learner=None,
            phases=[phase(policy="k_center", criterion=criterion)],
        )
        receipt = step(service, asked)[1]
        assert receipt.summary.batch_score is receipt.summary.mean_score_candidates is None
        assert all(0 <= row.score <= 2 for row in receipt.chosen)
        drawings.append(drawn(receipt))
    assert drawings[0] == drawings[1] == drawings[2]


def test_importance_weights_are_those_of_the_priorities(inputs, service):
    tuning = Tuning(priority_exponent=0.8, weight_exponent=0.5)
    asked = spec(
        inputs, "weights", phases=[phase(policy="proportional", criterion="hard", tuning=tuning)]
    )
    receipt = step(service, asked)[1]
    chances = [(max(row.score, 0.0) + 1e-6) ** 0.8 for row in receipt.chosen]
    weights = [row.weight for row in receipt.chosen]
    assert weights == pytest.approx([(min(chances) / chance) ** 0.5 for chance in chances])
    assert max(weights) == 1 > min(weights)


# --------------------------------------------------------------------------------------------------
# what is left out


def twins(inputs, folder) -> tuple[str, int]:
    """A data set in which every row comes twice, and how many different images it has."""
    rows = pyarrow.parquet.read_table(inputs / "pool").slice(0, 128)
    folder.mkdir()
    both = pyarrow.concat_tables([rows, rows])
    pyarrow.parquet.write_table(both, folder / "a.parquet", row_group_size=64)
    return folder.as_uri(), len(set(rows["png"].to_pylist()))


def leaving_out(**changes) -> superbatch.Phase:
    sizes = {"super_batch_size": 256, "sub_batch_size": 24}
    return phase(**{**sizes, "tuning": Tuning(duplicates_above=TWINS), **changes})


def test_no_two_near_duplicates_are_served_together(inputs, service, on_worker, tmp_path):
    uri, images = twins(inputs, tmp_path / "twins")
    common = {"sources": [uri], "embedding_dtype": "f32", "epochs": 1}
    batch, receipt = step(
        service, spec(inputs, "twins", phases=[leaving_out(policy="top_k", tuning=None)], **common)
    )
    assert len(set(batch["image"].to_pylist())) <= 12, "of twins, both score alike"
    assert receipt.summary.left_out is None
    for policy, cluster in [
        (policy, cluster) for policy in POLICIES for cluster in (service, on_worker)
    ]:
        phases = [leaving_out(policy=policy, criterion="hard")]
        batch, receipt = step(cluster, spec(inputs, f"apart-{policy}", phases=phases, **common))
        assert len(set(batch["image"].to_pylist())) == 24, policy
        left_out = receipt.summary.left_out
        assert (
            left_out.duplicates_above == 256 - images
            and receipt.summary.tuning.duplicates_above == TWINS
        )
        assert (left_out.clip_score_at_least, left_out.neg_clip_loss_keep) == (0, 0)
        assert receipt.summary.reference_digest and receipt.summary.cost.selection_flops > 0
    for cluster in (service, on_worker):
        counted = cluster.coordinator.metric("superbatch_left_out_total", rule="duplicates_above")
        assert counted == len(POLICIES) * (256 - images)


def clip_score(row, summary) -> float:
    """2.5 x cosine, from the score by the easy criterion: - softplus(-(scale x cosine + bias))."""
    logit = -math.log(math.expm1(-row.score))
    return 2.5 * max((logit - summary.reference_bias) / summary.reference_scale, 0.0)


def test_pairs_that_fit_badly_are_left_out(inputs, service):
    everyone = [phase(policy="top_k", criterion="easy", sub_batch_size=96)]
    receipt = step(service, spec(inputs, "fit-all", phases=everyone))[1]
    scores = [clip_score(row, receipt.summary) for row in receipt.chosen]
    best = sum(score > 0 for score in scores) // 2
    assert best > 8 and scores == sorted(scores, reverse=True)
    between = Tuning(clip_score_at_least=(scores[best - 1] + scores[best]) / 2)
    for size in (8, best):
        kept = [phase(policy="uniform", sub_batch_size=size, tuning=between)]
        batch, left = step(service, spec(inputs, f"fit-{size}", phases=kept))
        assert left.summary.left_out.clip_score_at_least == 96 - best and len(batch) == size
        assert set(batch["_superbatch_id"].to_pylist()) <= {row.id for row in receipt.chosen[:best]}
    more = [phase(policy="uniform", sub_batch_size=best + 1, tuning=between)]
    run = opened(service, spec(inputs, "fit-more", phases=more))
    refused(
        lambda: run.select(0, rank=0, world_size=1), "TOO_FEW_CANDIDATES", left_out=str(96 - best)
    )


def test_a_share_of_the_pairs_is_kept(inputs, service):
    asked = [phase(policy="joint", tuning=Tuning(clip_score_at_least=0.0, neg_clip_loss_keep=0.5))]
    left_out = step(service, spec(inputs, "share", phases=asked))[1].summary.left_out
    assert (
        left_out.clip_score_at_least,
        left_out.neg_clip_loss_keep,
        left_out.duplicates_above,
    ) == (0, 48, 0)


def test_a_step_that_is_degraded_to_uniform_leaves_out_the_same(inputs, service, tmp_path):
    uri, images = twins(inputs, tmp_path / "twins")
    learner = superbatch.Learner(model_uri=(inputs / "learner").as_uri(), first_push=True)
    asked = spec(
        inputs,
        "degraded",
        sources=[uri],
        embedding_dtype="f32",
        learner=learner,
        phases=[leaving_out()],
        fallback="uniform",
        need_deadline_seconds=0.1,
    )
    batch, receipt = step(service, asked)
    assert (
        receipt.summary.mode == "uniform"
        and receipt.summary.left_out.duplicates_above == 256 - images
    )
    assert len(set(batch["image"].to_pylist())) == 24
    assert receipt.summary.cost.discarded_flops == 0, "the reference's word was used"


# --------------------------------------------------------------------------------------------------
# what is refused


def test_too_few_candidates_are_an_error_of_their_own_with_a_way_out(inputs, tmp_path):
    """One block of the data holds one image 64 times; a super-batch is a block."""
    rows = pyarrow.parquet.read_table(inputs / "pool").slice(0, 256)
    images = rows["png"].to_pylist()
    images[64:128] = images[:1] * 64
    table = rows.set_column(
        rows.schema.get_field_index("png"), "png", pyarrow.array(images, pyarrow.binary())
    )
    (tmp_path / "same").mkdir()
    pyarrow.parquet.write_table(table, tmp_path / "same" / "a.parquet", row_group_size=64)
    blocks = {"super_batch_size": 64, "sub_batch_size": 16, "criterion": "easy"}
    asked = spec(
        inputs,
        "same",
        sources=[(tmp_path / "same").as_uri()],
        window_blocks=1,
        epochs=1,
        embedding_dtype="f32",
        phases=[leaving_out(**blocks)],
        seed=2,
    )
    with Cluster(tmp_path / "service") as cluster:
        run = opened(cluster, asked)
        assert [len(run.select(at, rank=0, world_size=1)) for at in range(2)] == [16, 16]
        error = refused(
            lambda: run.select(2, rank=0, world_size=1),
            "TOO_FEW_CANDIDATES",
            "duplicates_above 63",
            candidates="64",
            holes="0",
            left_out="63",
        )
        assert "step 2" in str(error) and "enlarge the super-batch" in str(error)
        refused(lambda: run.receipt(2), "STEP_NOT_COMMITTED", step="2")

        run.rewind(2, mode="reselect")
        run.append_phases(
            [
                superbatch.Phase(
                    policy="uniform", from_step=2, super_batch_size=64, sub_batch_size=16
                )
            ]
        )
        run = superbatch.connect(cluster.address).open_run(asked, incarnation="looser")
        assert [len(run.select(at, rank=0, world_size=1)) for at in range(2, 4)] == [16, 16]
        assert [run.receipt(at).summary.policy for at in range(4)] == [
            "joint",
            "joint",
            "uniform",
            "uniform",
        ]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        (
            {"phases": [phase(policy="joint", tuning=Tuning(temperature=2.0))]},
            "phases[0].tuning.temperature",
        ),
        (
            {"phases": [phase(policy="independent", tuning=Tuning(temperature=0.0))]},
            "phases[0].tuning.temperature",
        ),
        (
            {"phases": [phase(policy="uniform", tuning=Tuning(neg_clip_loss_keep=0.2))]},
            "phases[0].tuning.neg_clip_loss_keep",
        ),
        ({"phases": [phase(policy="proportional", criterion="easy")]}, "phases[0].criterion"),
        (
            {
                "phases": [phase(criterion="hard", tuning=Tuning(duplicates_above=0.9))],
                "reference": None,
            },
            "reference",
        ),
        ({"phases": [phase(policy="k_center")], "reference": None}, "reference"),
    ],
)
def test_what_can_never_work_is_refused_when_the_run_is_opened(inputs, service, changes, field):
    refused(
        lambda: opened(service, spec(inputs, "never", **changes)),
        "RUN_SPEC_IMPOSSIBLE",
        field=field,
    )


def test_an_unknown_policy_is_answered_with_those_there_are(inputs, service):
    asked = spec(inputs, "unknown", phases=[phase(policy="best")])
    error = refused(lambda: opened(service, asked), "INVALID_ARGUMENT", field="phases[0].policy")
    assert all(policy in str(error) for policy in POLICIES)


def test_the_command_line_says_how_a_step_was_tuned(inputs, tmp_path):
    uri, images = twins(inputs, tmp_path / "twins")
    with Cluster(tmp_path / "service") as cluster:
        phases = [leaving_out(policy="proportional", criterion="hard")]
        step(cluster, spec(inputs, "told", sources=[uri], embedding_dtype="f32", phases=phases))
        command = [
            BINARY,
            "receipts",
            "told",
            "--step",
            "0",
            "--config",
            tmp_path / "service" / "coordinator.yaml",
        ]
        told, printed = (
            subprocess.run([*command, *more], capture_output=True, text=True, check=True).stdout
            for more in ([], ["--json"])
        )
    assert (
        f'"duplicates_above":{TWINS}' in told
        and f"left out {256 - images} " in told
        and "proportional" in told
    )
    summary = json.loads(printed)["summary"]
    assert summary["tuning"] == {
        "priority_exponent": 0.6,
        "weight_exponent": 0.4,
        "duplicates_above": TWINS,
    }
    assert summary["left_out"]["duplicates_above"] == 256 - images
