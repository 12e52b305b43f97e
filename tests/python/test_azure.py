"""Data, models and state on Azure Blob storage, through the real binary against azurite."""

from pathlib import Path

import pytest
import superbatch
from azure_store import CONTAINER, Azurite
from cluster import Cluster, Process
from test_end_to_end import (  # noqa: F401
    choices,
    inputs,
    service,
    spec,
    train,
    undisturbed,
)

ROOT = f"az://{CONTAINER}"


@pytest.fixture(scope="module")
def azure(inputs):
    azure = Azurite()
    try:
        azure.upload(inputs)
        yield azure
    finally:
        azure.stop()


def on_azure(run_id: str) -> superbatch.RunSpec:
    return spec(
        Path("/"),
        run_id,
        sources=[f"{ROOT}/pool"],
        reference=f"{ROOT}/reference",
        learner=superbatch.Learner(
            model_uri=f"{ROOT}/learner", snapshot_uri=f"{ROOT}/learner/model.safetensors"
        ),
    )


def test_data_models_and_state_on_azure_give_what_files_give(azure, inputs, tmp_path, undisturbed):
    state = f"{ROOT}/state-of-two"
    with Cluster(tmp_path, workers=2, state=state, environment=azure.environment) as cluster:
        run = superbatch.connect(cluster.address).open_run(on_azure("remote"))
        assert train(run, inputs) == undisturbed[0]
        assert choices(run) == undisturbed[1]
    assert azure.keys("state-of-two/runs/remote/receipts/")


def test_on_azure_one_coordinator_owns_a_run_until_it_dies(azure, inputs, tmp_path, undisturbed):
    state = f"{ROOT}/state-of-rivals"

    def coordinator(name: str) -> Process:
        settings = {
            "listen": "127.0.0.1:0",
            "metrics_listen": "127.0.0.1:0",
            "page_listen": None,
            "state": state,
        }
        return Process(tmp_path, name, "serve", settings, azure.environment)

    owner, heir = coordinator("owner"), coordinator("heir")
    try:
        run = superbatch.connect(owner.address).open_run(on_azure("raced"))
        first = train(run, inputs, end=2)
        known = [run.receipt(step) for step in range(2)]
        with pytest.raises(superbatch.Error) as caught:
            superbatch.connect(heir.address).open_run(on_azure("raced"))
        assert caught.value.reason == "NOT_OWNER"
        owner.kill()
        run = superbatch.connect(heir.address).open_run(on_azure("raced"))
        assert [run.receipt(step) for step in range(2)] == known
        assert first + train(run, inputs, start=2) == undisturbed[0]
        assert choices(run) == undisturbed[1]
    finally:
        owner.stop()
        heir.stop()
