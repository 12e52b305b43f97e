"""Approximate scoring by larger patches, fewer patches and fewer layers, by the real binary."""

import dataclasses
import json
import subprocess
from pathlib import Path

import pytest
import superbatch
from cluster import BINARY, Cluster
from safetensors.torch import load_file
from test_end_to_end import phase, spec
from test_refusals import refused

from examples.demo import tiny
from examples.demo.model import write_folder

STEPS = 4
HALF = superbatch.MultiResolution()
ALL = [
    superbatch.Approximation(patch=16),
    superbatch.Approximation(patch_dropout=0.5),
    superbatch.Approximation(layers=1),
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A pool, and models of two layers with patches of 8 pixels of 16."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny.write_dataset(folder / "pool", rows=768)
    shape = {**tiny.SHAPE, "vision_layers": 2}
    write_folder(folder / "learner", tiny.captions(), 0, shape)
    write_folder(folder / "reference", tiny.captions(), 1, shape)
    return folder


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    with Cluster(tmp_path_factory.mktemp("service")) as cluster:
        yield cluster


def name_of(approximation: superbatch.Approximation) -> str:
    return next(k for k, v in dataclasses.asdict(approximation).items() if v is not None)


def flexi(inputs, run_id: str, low: superbatch.Approximation, **changes) -> superbatch.RunSpec:
    phases = [
        phase(policy="uniform", approximation=low, multi_resolution=HALF),
        phase(from_step=1, fidelity="approximate", approximation=low, multi_resolution=HALF),
    ]
    return spec(inputs, run_id, **{"phases": phases, **changes})


def train(run: superbatch.Run, inputs) -> list[list[str]]:
    ids, first = [], load_file(inputs / "learner/model.safetensors")
    for batch in run.batches(rank=0, world_size=1, start_step=0, end_step=STEPS):
        ids.append(batch["_superbatch_id"].to_pylist())
        pushed = {name: value * (1 + 0.01 * (batch.step + 1)) for name, value in first.items()}
        run.push_weights(pushed, step=batch.step)
    run.flush()
    return ids


@pytest.mark.parametrize("low", ALL, ids=name_of)
def test_it_is_scored_so_accounted_so_and_chosen_alike_again(inputs, service, tmp_path, low):
    name = name_of(low)
    client = superbatch.connect(service.address)
    run = client.open_run(flexi(inputs, name, low))
    ids = train(run, inputs)
    summary = run.receipt(2).summary
    value = getattr(low, name)
    assert summary.fidelity == "approximate" and summary.approximation == {name: value}
    assert run.spec.phases[1].approximation == {name: value}
    cost = summary.cost
    assert cost.scoring.image_full == 0
    inspected = subprocess.run(
        [BINARY, "inspect", inputs / "learner", "--json"], capture_output=True, check=True
    ).stdout
    fidelities = {one["fidelity"]: one for one in json.loads(inspected)["fidelities"]}
    image, full = (fidelities[key]["image_flops"] for key in (f"{name}={value:g}", "full"))
    assert 0.2 * full < image < 0.75 * full
    # Of 96 candidates by the learner; the blocks of the reference may be kept already.
    assert cost.scoring.image_approximate > 95.9 * image
    assert cost.training.image_approximate == pytest.approx(3 * 12 * image)
    printed = subprocess.run(
        [BINARY, "receipts", name, "--step", "2", "--state", service.state],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert f'{{"{name}":{value}}}' in printed.replace(" ", "")
    with Cluster(tmp_path, workers=2) as other:
        again = superbatch.connect(other.address).open_run(flexi(inputs, name, low))
        assert train(again, inputs) == ids, "other workers leave out the same"


def test_each_way_draws_otherwise_and_keeps_its_own_reference_embeddings(inputs, tmp_path):
    full = [phase(policy="uniform"), phase(from_step=1)]
    ways = [None, *ALL, superbatch.Approximation(resolution=8)]
    chosen = []
    with Cluster(tmp_path) as cluster:
        client = superbatch.connect(cluster.address)
        for n, low in enumerate(ways):
            asked = flexi(inputs, str(n), low) if low else spec(inputs, str(n), phases=full)
            run = client.open_run(asked)
            chosen.append(train(run, inputs))
            assert run.get_run().accounts.reference_flops > 0, "none of another fidelity's"
        rerun = client.open_run(flexi(inputs, "again", ALL[1]))
        assert train(rerun, inputs) == chosen[2]
        assert rerun.get_run().accounts.reference_flops == 0
    later = [tuple(ids[-1]) for ids in chosen]
    assert len(set(later)) == len(ways)


def test_what_a_model_cannot_be_run_at_is_refused_by_name(inputs, service):
    for changes, field, said in (
        ({"patch": 12}, "phases[0].approximation.patch", "a divisor of 16 above 8"),
        ({"patch": 8}, "phases[0].approximation.patch", "a divisor of 16 above 8"),
        ({"patch": 0}, "phases[0].approximation.patch", "0"),
        ({"layers": 2}, "phases[0].approximation.layers", "has 2 layers"),
        ({"patch_dropout": 1.0}, "phases[0].approximation.patch_dropout", "between 0 and 1"),
    ):
        asked = flexi(inputs, "no", superbatch.Approximation(**changes))
        refused(service, "RUN_SPEC_IMPOSSIBLE", asked, said)
        with pytest.raises(superbatch.Error) as caught:
            superbatch.connect(service.address).open_run(asked)
        assert caught.value.metadata["field"] == field
    untrained = phase(fidelity="approximate", approximation=ALL[2])
    refused(
        service, "RUN_SPEC_IMPOSSIBLE", spec(inputs, "no", phases=[untrained]), "never trained with"
    )
    two = superbatch.Approximation(patch=16, layers=1)
    with pytest.raises(superbatch.Error, match="one of resolution, patch"):
        superbatch.connect(service.address).open_run(flexi(inputs, "no", two))


def test_embed_fills_each_fidelity_ahead(inputs, tmp_path):
    state = (tmp_path / "state").as_uri()

    def kept(*more) -> tuple[int, float]:
        command = [BINARY, "embed", "--model", inputs / "reference", "--json", "--state", state]
        sources = ["--sources", (inputs / "pool").as_uri()]
        done = subprocess.run([*command, *sources, *more], capture_output=True, check=True).stdout
        found = json.loads(done)
        return found["blocks_kept"], found["flops"]

    flops = [kept()[1]]
    for more in (("--patch", "16"), ("--patch-dropout", "0.5"), ("--layers", "1")):
        blocks, spent = kept(*more)
        assert blocks == 0 and 0 < spent < flops[0]
        assert kept(*more) == (12, 0)
