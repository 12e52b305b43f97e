"""The real binary, driven by the Python client: workers, ranks, crashes, and what is refused."""

from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import superbatch
from cluster import Cluster
from safetensors.torch import load_file

from examples.demo import tiny

STEPS = 4


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    tiny.write_dataset(folder / "pool", rows=768)
    tiny.write_siglip(folder / "learner", seed=0)
    tiny.write_siglip(folder / "reference", seed=1)
    return folder


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    with Cluster(tmp_path_factory.mktemp("service")) as cluster:
        yield cluster


def spec(inputs: Path, run_id: str, **changes) -> superbatch.RunSpec:
    settings = {
        "sources": [(inputs / "pool").as_uri()],
        "reference": (inputs / "reference").as_uri(),
        "learner": superbatch.Learner(
            model_uri=(inputs / "learner").as_uri(),
            snapshot_uri=(inputs / "learner" / "model.safetensors").as_uri(),
        ),
        "phases": [phase()],
        "loss": "sigmoid",
        "seed": 5,
        "micro_batch_rows": 16,
        **changes,
    }
    return superbatch.RunSpec(run_id=run_id, **settings)


def phase(**changes) -> superbatch.Phase:
    return superbatch.Phase(
        **{
            "policy": "joint",
            "super_batch_size": 96,
            "sub_batch_size": 24,
            "n_chunks": 3,
            **changes,
        }
    )


def weights(inputs: Path, step: int) -> dict:
    """What a trainer might have after `step`: the same on every call."""
    return {
        name: tensor * (1 + 0.01 * (step + 1))
        for name, tensor in load_file(inputs / "learner/model.safetensors").items()
    }


def train(run: superbatch.Run, inputs: Path, start: int = 0, end: int = STEPS) -> list[list[str]]:
    """Ids by step, pushing after each."""
    ids = []
    for batch in run.batches(rank=0, world_size=1, start_step=start, end_step=end):
        ids.append(batch["_superbatch_id"].to_pylist())
        run.push_weights(weights(inputs, batch.step), step=batch.step)
    run.flush()
    return ids


def choices(run: superbatch.Run, steps: int = STEPS) -> list:
    receipts = [run.receipt(step) for step in range(steps)]
    return [[(row.id, row.score, row.position) for row in receipt.chosen] for receipt in receipts]


@pytest.fixture(scope="module")
def undisturbed(inputs, service) -> tuple[list, list]:
    run = superbatch.connect(service.address).open_run(spec(inputs, "undisturbed"))
    return train(run, inputs), choices(run)


def reason(caught) -> str:
    return str(caught.value.reason).upper()


def test_a_step_asked_for_again_gives_the_same_rows_to_any_number_of_ranks(
    inputs, service, undisturbed
):
    run = superbatch.connect(service.address).open_run(
        spec(inputs, "undisturbed"), incarnation="again"
    )
    slices = [run.select(1, rank=rank, world_size=2) for rank in range(2)]
    ids = [row for batch in slices for row in batch["_superbatch_id"].to_pylist()]
    assert sorted(ids) == sorted(undisturbed[0][1]) and len(set(ids)) == 24
    assert [len(batch) for batch in slices] == [12, 12]
    assert slices[0]["image"].type == pyarrow.binary()


def test_three_workers_choose_what_one_does(inputs, tmp_path, undisturbed):
    with Cluster(tmp_path, workers=3) as cluster:
        run = superbatch.connect(cluster.address).open_run(spec(inputs, "three"))
        assert train(run, inputs) == undisturbed[0]
        assert choices(run) == undisturbed[1]
        assert all(
            worker.metric("superbatch_reference_rows_computed_total") > 0
            for worker in cluster.workers
        )


def test_late_pushes_change_nothing(inputs, service, undisturbed):
    """Each push is held back until the next batch is there: the latest that lag exact(1) allows."""
    run, ids = superbatch.connect(service.address).open_run(spec(inputs, "late")), []
    for batch in run.batches(rank=0, world_size=1, start_step=0, end_step=STEPS):
        ids.append(batch["_superbatch_id"].to_pylist())
        if batch.step > 0:
            run.push_weights(weights(inputs, batch.step - 1), step=batch.step - 1)
    run.flush()
    assert ids == undisturbed[0]
    assert choices(run) == undisturbed[1]


def test_a_killed_coordinator_goes_on_where_it_was(inputs, tmp_path, undisturbed):
    with Cluster(tmp_path) as cluster:
        run = superbatch.connect(cluster.address).open_run(spec(inputs, "killed"))
        first = train(run, inputs, end=2)
        cluster.coordinator.kill()
        cluster.start_coordinator("again")
        run = superbatch.connect(cluster.address).open_run(spec(inputs, "killed"))
        assert run.select(1, rank=0, world_size=1)["_superbatch_id"].to_pylist() == first[1]
        assert first + train(run, inputs, start=2) == undisturbed[0]
        assert choices(run) == undisturbed[1]


def test_a_killed_worker_costs_nothing_but_time(inputs, tmp_path, undisturbed):
    short = {"SUPERBATCH_COORDINATOR__LEASE_SECONDS": "3"}
    with Cluster(tmp_path, workers=3, environment=short) as cluster:
        run = superbatch.connect(cluster.address).open_run(spec(inputs, "worker-killed"))
        first = train(run, inputs, end=2)
        cluster.workers[1].kill()
        assert first + train(run, inputs, start=2) == undisturbed[0]
        assert choices(run) == undisturbed[1]
        cluster.coordinator.wait_for("superbatch_workers", lambda count: count == 2)


def test_a_rewind_replays_or_selects_anew(inputs, service):
    client = superbatch.connect(service.address)
    run = client.open_run(spec(inputs, "rewound"))
    first = train(run, inputs)
    assert run.rewind(1, mode="replay") == 1
    run = client.open_run(spec(inputs, "rewound"), incarnation="second")
    assert train(run, inputs, start=1) == first[1:]
    assert run.rewind(2, mode="reselect") == 2
    run = client.open_run(spec(inputs, "rewound"), incarnation="third")
    anew = train(run, inputs, start=2)
    assert len(anew) == 2 and anew[0] != first[2]


def test_phases_change_policy_and_sizes_and_no_row_comes_twice(inputs, service):
    phases = [
        phase(policy="uniform", super_batch_size=48, sub_batch_size=24, n_chunks=1),
        phase(from_step=2),
    ]
    run = superbatch.connect(service.address).open_run(spec(inputs, "phases", phases=phases))
    ids = train(run, inputs)
    assert [run.receipt(step).summary.policy for step in range(STEPS)] == [
        "uniform",
        "uniform",
        "joint",
        "joint",
    ]
    assert len(set(sum(ids, []))) == STEPS * 24


def test_the_end_of_the_data_is_said(inputs, service):
    phases = [phase(policy="uniform", super_batch_size=256, sub_batch_size=32, n_chunks=1)]
    run = superbatch.connect(service.address).open_run(
        spec(inputs, "ends", phases=phases, epochs=1)
    )
    assert [batch.step for batch in run.batches(rank=0, world_size=1, start_step=0)] == [0, 1, 2]
    with pytest.raises(superbatch.EndOfData):
        run.select(3, rank=0, world_size=1)


def test_pushes_that_cannot_serve_are_refused_by_tensor(inputs, service):
    run = superbatch.connect(service.address).open_run(spec(inputs, "refused"))
    good = load_file(inputs / "learner/model.safetensors")
    name = sorted(good)[3]
    for bad in (
        {**good, name: good[name] * float("nan")},
        {**good, name: good[name][..., :-1]},
        {key: tensor for key, tensor in good.items() if key != name},
    ):
        with pytest.raises(superbatch.WeightsRefused, match=name.replace(".", r"\.")):
            run.push_weights(bad, step=0)
            run.flush()
    assert len(run.select(0, rank=0, world_size=1)) == 24


def test_an_undecodable_image_costs_its_row(inputs, service, tmp_path):
    table = pyarrow.parquet.read_table(sorted((inputs / "pool").iterdir())[0])
    images = table["png"].to_pylist()
    images[7] = b"\x89PNG\r\n\x1a\n no picture"
    table = table.set_column(
        table.schema.get_field_index("png"), "png", pyarrow.array(images, pyarrow.binary())
    )
    (tmp_path / "bad").mkdir()
    pyarrow.parquet.write_table(table, tmp_path / "bad" / "a.parquet", row_group_size=64)
    run = superbatch.connect(service.address).open_run(
        spec(
            inputs,
            "holes",
            sources=[(tmp_path / "bad").as_uri()],
            phases=[phase(super_batch_size=384)],
        )
    )
    run.select(0, rank=0, world_size=1)
    listed = [(row.id, row.reason) for row in run.receipt(0).bad_rows]
    assert listed == [("a.parquet#7", listed[0][1])] and "undecodable" in str(listed[0][1]).lower()
