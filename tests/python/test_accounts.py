"""What was spent is the same wherever it is told: in receipts, by GetRun, by the commands, and in
the metrics.
"""

import json
import subprocess
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import superbatch
from cluster import BINARY, Cluster
from test_end_to_end import inputs, phase, spec, weights  # noqa: F401

COUNTS = ("candidates_scanned", "examples_selected", "bad_rows")
FLOPS = (
    "reference_flops",
    "learner_flops",
    "selection_flops",
    "discarded_flops",
    "train_flops",
    "uniform_flops",
)
ROWS, BAD_EVERY = 576, 9


@pytest.fixture(scope="module")
def data(inputs, tmp_path_factory) -> str:
    """Six super-batches of 96 rows. Of every nine pictures one is none."""
    table = pyarrow.concat_tables(
        [pyarrow.parquet.read_table(path) for path in sorted((inputs / "pool").iterdir())]
    )[:ROWS]
    images = [
        image if row % BAD_EVERY else b"no picture"
        for row, image in enumerate(table["png"].to_pylist())
    ]
    table = table.set_column(
        table.schema.get_field_index("png"), "png", pyarrow.array(images, pyarrow.binary())
    )
    folder = tmp_path_factory.mktemp("data")
    pyarrow.parquet.write_table(table, folder / "a.parquet", row_group_size=64)
    return folder.as_uri()


def finite(inputs: Path, data: str, run_id: str, phases: list, **changes) -> superbatch.RunSpec:
    """A run with an end: when its last step is served, nothing is under way."""
    return spec(
        inputs, run_id, sources=[data], phases=phases, epochs=1, max_bad_row_share=0.5, **changes
    )


def train(
    client, asked: superbatch.RunSpec, inputs: Path, pushes: bool = True
) -> tuple[superbatch.Run, list]:
    """All steps of a run, and their receipts."""
    run = client.open_run(asked)
    steps = run.dataset.steps_total
    for batch in run.batches(rank=0, world_size=1, start_step=0):
        if pushes and batch.step + 2 < steps:
            run.push_weights(weights(inputs, batch.step), step=batch.step)
    run.flush()
    return run, [run.receipt(step) for step in range(steps)]


def spent(receipts: list) -> dict[str, float]:
    costs = [receipt.summary.cost for receipt in receipts]
    return {name: sum(cost[name] for cost in costs) for name in COUNTS + FLOPS}


def told(cluster: Cluster, run: superbatch.Run) -> dict[str, float]:
    """What GetRun says, and the state by the commands with it."""
    info = run.get_run()
    known = {name: info.accounts[name] for name in COUNTS + FLOPS}
    assert info.candidates_scanned == known["candidates_scanned"]
    listed = printed(cluster, "runs", "--json")
    (listed,) = [line for line in listed if line["run"] == run.run_id]
    assert (listed["scanned"], listed["selected"]) == (
        known["candidates_scanned"],
        known["examples_selected"],
    )
    # Steps under way together may be committed out of order, and sums are in the order of commits.
    sums = [
        receipt["summary"]["run_totals"]
        for receipt in printed(cluster, "receipts", run.run_id, "--json")
    ]
    newest = max(sums, key=lambda totals: totals["candidates_scanned"])
    assert {name: newest[name] for name in COUNTS + FLOPS} == pytest.approx(known)
    return known


def printed(cluster: Cluster, *arguments: str) -> list[dict]:
    ended = subprocess.run(
        [BINARY, *arguments, "--state", cluster.state],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return [json.loads(line) for line in ended.stdout.splitlines()]


def measured(cluster: Cluster) -> dict[str, float]:
    """The metrics of a service with an embedded worker. What models computed, used or not, is
    counted there together.
    """
    metric = cluster.coordinator.metric
    stages = ("reference", "learner", "selection", "discarded")
    flops = {stage: metric("superbatch_flops_total", stage=stage) for stage in stages}
    return {
        "candidates_scanned": metric("superbatch_candidates_total"),
        "examples_selected": metric("superbatch_selected_total"),
        "bad_rows": metric("superbatch_skipped_total"),
        "selection_flops": flops["selection"],
        "discarded_flops": flops["discarded"],
        "model_flops": flops["reference"] + flops["learner"],
    }


def all_agree(cluster: Cluster, run: superbatch.Run, receipts: list) -> dict[str, float]:
    """The one account of a cluster's only run."""
    account = spent(receipts)
    assert told(cluster, run) == pytest.approx(account)
    counted = measured(cluster)
    models = sum(account[name] for name in ("reference_flops", "learner_flops", "discarded_flops"))
    # Counters go up by whole numbers.
    assert counted == {
        name: pytest.approx({**account, "model_flops": models}[name], abs=100) for name in counted
    }
    assert {name: counted[name] for name in COUNTS} == {name: account[name] for name in COUNTS}
    assert account["bad_rows"] == sum(len(receipt.bad_rows) for receipt in receipts)
    assert account["examples_selected"] == sum(len(receipt.chosen) for receipt in receipts)
    return account


def test_uniform_is_charged_what_it_reads(inputs, data, tmp_path):
    phases = [phase(policy="uniform", n_chunks=1)]
    with Cluster(tmp_path) as cluster:
        asked = finite(inputs, data, "uniform", phases, train_flops_per_example=1e6)
        run, receipts = train(superbatch.connect(cluster.address), asked, inputs, pushes=False)
        account = all_agree(cluster, run, receipts)
        assert [len(receipt.chosen) for receipt in receipts] == [24] * 6
        # It reads what it serves, and each row that it draws in the place of a bad one.
        for receipt in receipts:
            assert receipt.summary.cost.candidates_scanned == 24 + len(receipt.bad_rows)
        assert 0 < account["bad_rows"] < ROWS / BAD_EVERY, "only bad rows that were drawn are read"
        assert {name: account[name] for name in FLOPS} == {
            **dict.fromkeys(FLOPS, 0),
            "train_flops": 6 * 24 * 1e6,
            "uniform_flops": 6 * 24 * 1e6,
        }
        assert cluster.coordinator.metric("superbatch_steps_committed_total", mode="normal") == 6


def test_scoring_is_charged_in_full(inputs, data, tmp_path):
    phases = [
        phase(policy="uniform", n_chunks=1),
        phase(policy="independent", n_chunks=1, from_step=2),
        phase(from_step=4),
    ]
    with Cluster(tmp_path) as cluster:
        run, receipts = train(
            superbatch.connect(cluster.address), finite(inputs, data, "scored", phases), inputs
        )
        account = all_agree(cluster, run, receipts)
        uniform, scored = receipts[:2], receipts[2:]
        assert spent(uniform)["reference_flops"] == spent(uniform)["learner_flops"] == 0
        assert [receipt.summary.cost.candidates_scanned for receipt in scored] == [96] * 4
        assert all(receipt.summary.cost.learner_flops > 0 for receipt in scored)
        # A training step is priced at three forward passes; a candidate's scoring is one.
        learner = scored[0].summary.cost.learner_flops / 96
        assert account["train_flops"] == pytest.approx(6 * 24 * 3 * learner)
        # Each block's reference embeddings are computed once, whole, and found again by every later
        # step.
        reference = account["reference_flops"] / learner
        assert reference == pytest.approx(ROWS), "both models are of one shape"
        assert account["discarded_flops"] == 0
        accounts = run.get_run().accounts
        seconds = [receipt.summary.cost.seconds for receipt in receipts]
        for stage in (
            "plan",
            "fetch",
            "decode",
            "embed_reference",
            "embed_learner",
            "select",
            "total",
            "wait_weights",
        ):
            assert accounts.seconds[stage] == pytest.approx(sum(step[stage] for step in seconds)), (
                stage
            )


def test_three_workers_are_charged_what_one_is(inputs, data, tmp_path):
    accounts = []
    for workers in (1, 3):
        with Cluster(tmp_path / str(workers), workers=workers) as cluster:
            # 36 candidates a slice, 64 rows a block: slices of one step share blocks, and so do
            # steps that are under way together.
            asked = finite(inputs, data, "shared", [phase()], micro_batch_rows=4)
            run, receipts = train(superbatch.connect(cluster.address), asked, inputs)
            accounts.append(told(cluster, run))
            assert accounts[-1] == pytest.approx(spent(receipts))
            assert cluster.coordinator.metric("superbatch_optimal_workers") >= 1, (
                "the trainer's pace is known"
            )
            assert accounts[-1]["bad_rows"] == cluster.coordinator.metric(
                "superbatch_skipped_total"
            )
    assert accounts[0] == accounts[1]


def test_a_step_that_fell_back_to_uniform_pays_for_the_scores_that_it_could_not_use(
    inputs, data, tmp_path
):
    learner = superbatch.Learner(model_uri=(inputs / "learner").as_uri(), first_push=True)
    with Cluster(tmp_path) as cluster:
        settings = {"learner": learner, "fallback": "uniform", "stall_grace_seconds": 0.0}
        asked = finite(inputs, data, "fallen", [phase()], **settings)
        run, receipts = train(superbatch.connect(cluster.address), asked, inputs, pushes=False)
        account = all_agree(cluster, run, receipts)
        assert {receipt.summary.mode for receipt in receipts} == {"uniform"}
        assert account["candidates_scanned"] == ROWS, "it had read them all"
        assert account["reference_flops"] == account["learner_flops"] == 0
        assert account["discarded_flops"] > 0
        assert cluster.coordinator.metric("superbatch_steps_committed_total", mode="uniform") == 6


def test_accounts_survive_the_coordinator(inputs, data, tmp_path):
    with Cluster(tmp_path) as cluster:
        asked = finite(inputs, data, "survives", [phase()])
        run, receipts = train(superbatch.connect(cluster.address), asked, inputs)
        account = told(cluster, run)
        cluster.coordinator.kill()
        cluster.start_coordinator("again")
        run = superbatch.connect(cluster.address).open_run(asked)
        assert told(cluster, run) == account == pytest.approx(spent(receipts))
        # Serving a step again costs nothing and counts nothing.
        assert len(run.select(0, rank=0, world_size=1)) == 24
        assert told(cluster, run) == account
