"""A dual encoder that the service knows nothing of: a ConvNeXt and averaged words, exported as a
TorchScript module, by the real binary.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy
import pyarrow.parquet
import pytest
import superbatch
import superbatch.torch
import timm
import torch
import torch.nn.functional as F
from cluster import BINARY, Cluster
from commands import run
from test_end_to_end import phase, reason, spec

from examples.demo import tiny
from examples.demo.model import Transform, train_tokenizer

SIDE, LENGTH, WIDTH, STEPS = 32, 8, 24, 3


class Dual(torch.nn.Module):
    """A ConvNeXt of timm for images, with a batch norm behind it, and a mean of words."""

    def __init__(self, words: int):
        super().__init__()
        self.trunk = timm.create_model(
            "convnext_atto", pretrained=False, num_classes=WIDTH, depths=(1, 1, 1, 1)
        )
        self.norm = torch.nn.BatchNorm1d(WIDTH)
        self.words = torch.nn.Embedding(words, WIDTH)
        self.logit_scale = torch.nn.Parameter(torch.tensor(1.5))
        self.logit_bias = torch.nn.Parameter(torch.tensor(-3.0))

    def encode_image(self, pixels):
        return self.norm(self.trunk(pixels))

    def encode_text(self, ids):
        return self.words(ids).mean(dim=1)


def dual(tokenizer, seed: int) -> Dual:
    torch.manual_seed(seed)
    model = Dual(tokenizer.get_vocab_size()).eval()
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point() and not name.startswith("logit"):
                value += 0.05 * torch.rand_like(value)
    return model


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A pool, the folders of a learner and a reference, their models, and the modules' SHA-256."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny.write_dataset(folder / "pool", rows=768)
    tokenizer = train_tokenizer(tiny.captions(), tiny.SHAPE)
    models = {name: dual(tokenizer, seed) for seed, name in enumerate(("learner", "reference"))}
    pins = [
        superbatch.torch.export_module(
            model,
            folder / name,
            image_size=SIDE,
            text_length=LENGTH,
            tokenizer=tokenizer,
            resample=2,
        )
        for name, model in models.items()
    ]
    return folder, models, pins


@pytest.fixture(scope="module")
def allowed(inputs) -> dict[str, str]:
    return {"SUPERBATCH_WORKER__EXPORTED_MODULES": json.dumps(inputs[2])}


def test_runs_score_with_it_and_pushes_replace_its_parameters(inputs, allowed, tmp_path):
    folder, models, _ = inputs
    learner = models["learner"]
    with Cluster(tmp_path, environment=allowed) as cluster:
        run = superbatch.connect(cluster.address).open_run(spec(folder, "run", phases=[phase()]))
        for batch in run.batches(rank=0, world_size=1, start_step=0, end_step=STEPS):
            state = {
                name: value * (1 + 0.1 * batch.step)
                for name, value in learner.state_dict().items()
                if value.is_floating_point()
            }
            run.push_weights(state, step=batch.step)
        run.flush()
        summary = run.receipt(STEPS - 1).summary
        assert summary.mode == "normal" and summary.compute_dtype == "f32"
        assert summary.learner.step == STEPS - 3
        cost = summary.cost.scoring
        about = json.loads((folder / "learner" / "module.json").read_text())
        assert cost.image_full >= 96 * about["image_flops"] > 0
        with pytest.raises(superbatch.Error, match="run at full fidelity only"):
            low = superbatch.Approximation(resolution=SIDE // 2)
            half = superbatch.MultiResolution()
            asked = phase(policy="uniform", approximation=low, multi_resolution=half)
            superbatch.connect(cluster.address).open_run(spec(folder, "low", phases=[asked]))
        with pytest.raises(superbatch.Error) as caught:
            seeded = superbatch.Learner(model_uri=(folder / "learner").as_uri(), random_seed=1)
            superbatch.connect(cluster.address).open_run(spec(folder, "seed", learner=seeded))
        assert "push them first" in str(caught.value)


def test_embeddings_are_those_of_eager_pytorch(inputs, allowed, tmp_path, monkeypatch):
    folder, models, _ = inputs
    for name, value in allowed.items():
        monkeypatch.setenv(name, value)
    embedded = subprocess.run(
        [BINARY, "embed", "--model", folder / "reference", "--sources", (folder / "pool").as_uri()]
        + ["--state", (tmp_path / "state").as_uri(), "--out", tmp_path / "out"]
        + ["--embedding-dtype", "f32", "--json"],
        capture_output=True,
        text=True,
    )
    assert embedded.returncode == 0, embedded.stderr
    table = pyarrow.parquet.read_table(sorted((tmp_path / "out").glob("*.parquet"))[0])
    source = pyarrow.parquet.read_table(folder / "pool" / "00000.parquet")
    transform = Transform(folder / "reference")
    pixels = transform.images(source["png"].to_pylist())
    ids = transform.captions(source["caption"].to_pylist())
    model = models["reference"]
    with torch.no_grad():
        expected = model.encode_image(pixels), model.encode_text(ids)
    names = ("image_embedding", "text_embedding")
    for name, theirs in zip(names, expected, strict=True):
        ours = numpy.stack(table[name].to_numpy(zero_copy_only=False))
        assert numpy.abs(ours - F.normalize(theirs, dim=-1).numpy()).max() < 1e-4
    inspected = subprocess.run([BINARY, "inspect", folder / "reference"], capture_output=True)
    assert b"by an exported module" in inspected.stdout, inspected.stderr


def test_doctor_reads_a_module_as_a_worker_does(inputs, allowed, tmp_path):
    uri = (inputs[0] / "learner").as_uri()
    asked = ("doctor", "--state", (tmp_path / "state").as_uri(), "--model", uri)
    anywhere = {
        f"SUPERBATCH_{name}": "127.0.0.1:0" for name in ("LISTEN", "METRICS_LISTEN", "PAGE_LISTEN")
    }
    ended = run(*asked, env={**os.environ, **anywhere, **allowed})
    assert ended.returncode == 0, ended.stderr
    assert f"ok    model {uri}: its files can be read, and it has weights" in ended.stdout
    ended = run(*asked, env={**os.environ, **anywhere})
    assert ended.returncode == 1 and "worker.exported_modules" in ended.stderr


def test_nothing_runs_that_the_operator_does_not_name(inputs, tmp_path):
    folder, _, pins = inputs
    with Cluster(tmp_path / "none") as cluster:
        with pytest.raises(superbatch.Error) as caught:
            superbatch.connect(cluster.address).open_run(spec(folder, "none"))
        assert reason(caught) == "MODEL_INVALID" and "exported_modules" in str(caught.value)
    other = {"SUPERBATCH_WORKER__EXPORTED_MODULES": json.dumps(["0" * 64])}
    with Cluster(tmp_path / "other", environment=other) as cluster:
        with pytest.raises(superbatch.Error) as caught:
            superbatch.connect(cluster.address).open_run(spec(folder, "other"))
        assert reason(caught) == "MODEL_INVALID" and any(pin in str(caught.value) for pin in pins)


def test_a_run_pins_what_the_folder_says_of_its_module(inputs, allowed, tmp_path):
    folder, _, _ = inputs
    shutil.copytree(folder / "reference", tmp_path / "reference")
    easy = phase(policy="independent", criterion="easy")
    asked = spec(folder, "pin", phases=[easy], reference=(tmp_path / "reference").as_uri())
    about = tmp_path / "reference" / "module.json"
    with Cluster(tmp_path, environment=allowed) as cluster:
        run = superbatch.connect(cluster.address).open_run(asked)
        next(iter(run.batches(rank=0, world_size=1, start_step=0, end_step=1)))
    changed = json.loads(about.read_text())
    about.write_text(json.dumps({**changed, "image_flops": 2 * changed["image_flops"]}))
    with Cluster(tmp_path, environment=allowed) as cluster:
        with pytest.raises(superbatch.Error, match="module.json") as caught:
            run = superbatch.connect(cluster.address).open_run(asked)
            # The first steps were decided ahead, before the change.
            list(run.batches(rank=0, world_size=1, start_step=1, end_step=8))
        assert reason(caught) == "MODEL_INVALID"


def test_a_model_that_cannot_be_exported_is_refused_with_the_reason(tmp_path: Path):
    tokenizer = train_tokenizer(tiny.captions(), tiny.SHAPE)

    class Fixed(Dual):
        def encode_text(self, ids):
            return self.words(ids).mean(dim=1) * float(len(ids))

    how = {"image_size": SIDE, "text_length": LENGTH, "tokenizer": tokenizer}
    model = Fixed(tokenizer.get_vocab_size())
    with pytest.raises(superbatch.Error, match="must not depend on the number of rows"):
        superbatch.torch.export_module(model, tmp_path, **how)
    del model.logit_scale
    with pytest.raises(superbatch.Error, match="logit_scale"):
        superbatch.torch.export_module(model, tmp_path, **how)
