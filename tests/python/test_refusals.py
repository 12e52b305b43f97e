"""What is refused, with its reason, by the real binary."""

import shutil
import subprocess

import pyarrow
import pyarrow.parquet
import pytest
import superbatch
from cluster import BINARY
from test_end_to_end import inputs, phase, reason, service, spec  # noqa: F401

from examples.demo import tiny


def refused(service, wanted: str, asked: superbatch.RunSpec, says: str = "") -> None:
    with pytest.raises(superbatch.Error) as caught:
        superbatch.connect(service.address).open_run(asked)
    assert reason(caught) == wanted, caught.value
    assert says in str(caught.value), caught.value


def test_runs_that_can_never_be_met(inputs, service, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(service, "DATASET_EMPTY", spec(inputs, "a", sources=[(tmp_path / "empty").as_uri()]))
    refused(
        service,
        "DATASET_TOO_SMALL",
        spec(inputs, "b", phases=[phase(super_batch_size=4096)]),
        "768",
    )
    refused(service, "COLUMN_NOT_FOUND", spec(inputs, "c", columns=["colour"]), "kind")
    refused(service, "RUN_SPEC_IMPOSSIBLE", spec(inputs, "d", phases=[phase(sub_batch_size=97)]))
    other = tmp_path / "other"
    other.mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"n": [1, 2]}), other / "n.parquet")
    refused(
        service,
        "COLUMN_NOT_FOUND",
        spec(inputs, "e", sources=[(inputs / "pool").as_uri(), other.as_uri()]),
    )


def test_models_that_cannot_serve(inputs, service, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(inputs / "reference", folder)
    (folder / "tokenizer.json").unlink()
    refused(
        service, "MODEL_INVALID", spec(inputs, "f", reference=folder.as_uri()), "tokenizer.json"
    )
    shutil.copytree(tiny.write_siglip(tmp_path / "big"), tmp_path / "odd")
    config = (tmp_path / "odd" / "config.json").read_text()
    vocabulary = f'"vocab_size": {__import__("json").loads(config)["text_config"]["vocab_size"]}'
    assert vocabulary in config
    (tmp_path / "odd" / "config.json").write_text(config.replace(vocabulary, '"vocab_size": 9'))
    refused(service, "TOKENIZER_MISMATCH", spec(inputs, "g", reference=(tmp_path / "odd").as_uri()))


def test_learners_whose_weights_are_not_there(inputs, service, tmp_path):
    learner = (inputs / "learner").as_uri()
    bare = tmp_path / "bare"
    shutil.copytree(inputs / "learner", bare)
    (bare / "model.safetensors").unlink()
    gone, folder = f"{learner}/nope.safetensors", bare.as_uri()
    for model, snapshot in [
        (learner, gone),
        (learner, folder),
        (folder, folder),
        (folder, f"{folder}/model.safetensors"),
    ]:
        asked = superbatch.Learner(model_uri=model, snapshot_uri=snapshot)
        refused(service, "MODEL_INVALID", spec(inputs, "gone", learner=asked), snapshot)


def test_another_spec_under_a_known_id(inputs, service):
    superbatch.connect(service.address).open_run(spec(inputs, "known"))
    refused(service, "RUN_SPEC_CONFLICT", spec(inputs, "known", seed=6), "this spec says 6")
    superbatch.connect(service.address).open_run(spec(inputs, "known"))


def test_requests_that_do_not_fit(inputs, service):
    client = superbatch.connect(service.address)
    run = client.open_run(spec(inputs, "requests"))

    def select(step: int, rank: int, world_size: int) -> str:
        with pytest.raises(superbatch.Error) as caught:
            run.select(step, rank=rank, world_size=world_size)
        return reason(caught)

    assert select(0, 0, 5) == "WORLD_SIZE_INVALID"
    assert select(0, 2, 2) == "RANK_OUT_OF_RANGE"
    assert select(50, 0, 1) == "STEP_BEYOND_AHEAD"
    assert len(run.select(0, rank=0, world_size=2)) == 12
    assert select(0, 0, 3) == "WORLD_SIZE_CONFLICT"
    with pytest.raises(superbatch.Error) as caught:
        client.get_run("nobody")
    assert reason(caught) == "RUN_NOT_FOUND"
    client.open_run(spec(inputs, "requests"), incarnation="operator").rewind(0, mode="reselect")
    assert select(0, 0, 2) == "GENERATION_STALE"


def fails(*arguments: str) -> str:
    ended = subprocess.run([BINARY, *arguments], capture_output=True, text=True, timeout=60)
    assert ended.returncode != 0
    return ended.stderr


def test_a_server_that_cannot_start_says_why(service, tmp_path):
    taken = service.address.removeprefix("http://")
    assert taken in fails("serve", "--listen", taken, "--state", tmp_path.as_uri())
    assert "allow_insecure" in fails("serve", "--listen", "0.0.0.0:0", "--state", tmp_path.as_uri())
