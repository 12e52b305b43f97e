"""A run goes on after an upgrade of the service, and a build that is too old says so."""

import json

import superbatch
from cluster import Cluster
from commands import fails
from refusal import refused
from test_end_to_end import STEPS, choices, inputs, phase, spec, train  # noqa: F401

# What a run's facts have gained since the first form of the state.
GAINED = ("files", "dim", "image_tower", "text_flops", "optional_tensors")


def asked(inputs) -> superbatch.RunSpec:
    return spec(inputs, "old", phases=[phase(policy="uniform"), phase(from_step=1)])


def rewrite(folder, change) -> None:
    """Changes run.json, as another build might have written it."""
    path = folder / "state" / "runs" / "old" / "run.json"
    fact = json.loads(path.read_text())
    change(fact)
    path.write_text(json.dumps(fact))


def first_form(fact: dict) -> None:
    del fact["format"]
    for model in ("learner", "reference"):
        for field in GAINED:
            fact[model].pop(field, None)
    # Defaults that an older build did not know.
    del fact["spec"]["stall_grace_seconds"]


def test_a_run_of_an_older_build_goes_on(inputs, tmp_path):  # noqa: F811
    with Cluster(tmp_path / "new") as cluster:
        run = superbatch.connect(cluster.address).open_run(asked(inputs))
        expected = train(run, inputs), choices(run)
    with Cluster(tmp_path / "old") as cluster:
        run = superbatch.connect(cluster.address).open_run(asked(inputs))
        first = train(run, inputs, end=2)
        cluster.coordinator.stop()
        rewrite(tmp_path / "old", first_form)
        cluster.start_coordinator("upgraded")
        run = superbatch.connect(cluster.address).open_run(asked(inputs))
        assert run.next_step >= 2
        assert (first + train(run, inputs, start=2), choices(run)) == expected
        assert len(expected[0]) == STEPS


def test_a_run_of_a_newer_build_is_refused_by_name(inputs, tmp_path):  # noqa: F811
    with Cluster(tmp_path) as cluster:
        superbatch.connect(cluster.address).open_run(asked(inputs))
        cluster.coordinator.stop()
        rewrite(tmp_path, lambda fact: fact.update(format=99, spec={"unheard": "of"}))
        cluster.start_coordinator("old")
        client = superbatch.connect(cluster.address)
        says = "runs/old has state of form 99"
        refused(lambda: client.open_run(asked(inputs)), "UNIMPLEMENTED", says)
        state = (tmp_path / "state").as_uri()
        assert says in fails("receipts", "old", "--state", state)
