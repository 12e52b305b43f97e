"""What a trainer trains at an approximation is what the service scores at it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy
import pyarrow.parquet
import pytest
import superbatch
import torch
import torch.nn.functional as F
from blake3_words import derived_word
from cluster import BINARY
from superbatch.torch import (
    ImageText,
    SelectedBatches,
    TwoFidelities,
    by_fidelity,
    sigmoid_loss,
)
from superbatch.torch.fidelities import embedded
from superbatch.torch.ways import way_of
from test_approximations import ALL, flexi, inputs, name_of, service  # noqa: F401

from examples.demo.model import Transform, load

# The models that the service's own are compared with, and what their libraries make of them.
sys.path.insert(0, str(Path(__file__).parents[2] / "server/tests/python"))
import model_approximations
import model_parity

# By name, so that none is built while tests are collected.
NAMES = (
    "siglip-64",
    "siglip-96",
    "clip-legacy-eos",
    "clip-gelu-sharded",
    "open_clip-vit",
    "open_clip-custom",
    "open_clip-siglip",
)


@pytest.fixture(scope="module")
def models() -> dict[str, tuple]:
    """Each model and None, or its class and what open_clip builds it from."""
    found = {name: (model, None) for name, model, _, _ in model_parity.models()}
    found |= {name: (kind, config) for name, kind, config in model_parity.open_clip_models()}
    assert tuple(found) == NAMES
    return found


def unlike(ours: torch.Tensor, theirs: torch.Tensor) -> tuple[float, float]:
    """The least cosine of a row, and the largest difference of an element at length one."""
    ours, theirs = F.normalize(ours, dim=-1), F.normalize(theirs, dim=-1)
    return (ours * theirs).sum(dim=-1).min().item(), (ours - theirs).abs().max().item()


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_low_rows_are_those_of_the_models_that_the_service_is_tested_against(models, name):
    """`server/tests/model_parity.rs` holds the service to the same embeddings."""
    model, config = models[name]
    torch.manual_seed(3)
    if config is not None:
        model = model(**{key: value for key, value in config.items() if key != "custom_text"})
    model_parity.perturb(model.eval())
    side = config["vision_cfg"]["image_size"] if config else model.config.vision_config.image_size
    pixels = torch.randn(2 if side > 100 else 5, 3, side, side)
    if config:
        expected = model_approximations.open_clip_approximations(model, config, pixels)
    else:
        expected = model_approximations.transformers_approximations(model, pixels)
    assert len(expected) == 4, "each way, and one twice"
    for asked, theirs in expected.items():
        field, value = asked.split("=")
        value = float(value) if field == "patch_dropout" else int(value)
        way, places = way_of(model, superbatch.Approximation(**{field: value})), None
        if field == "patch_dropout":
            patches = (side // way.shape.patch) ** 2
            places = model_approximations.drawn(range(len(pixels)), patches, value)
        ours = embedded(model, (pixels[:0], pixels), way, places)
        cosine, apart = unlike(ours, theirs)
        assert cosine > 0.9999 and apart < 1e-4, f"{name} {asked}: {cosine}, {apart}"


def kept_by_the_service(images: list[bytes], patches: int, share: float) -> torch.Tensor:
    purpose = "superbatch patches of an image v1"
    keys = [derived_word(purpose, image) for image in images]
    return model_approximations.drawn(keys, patches, share)


@torch.no_grad()
@pytest.mark.parametrize("low", [*ALL, superbatch.Approximation(resolution=8)], ids=name_of)
def test_the_service_embeds_what_the_trainer_trains(inputs, tmp_path, low):
    field, out = name_of(low), tmp_path / "out"
    value = getattr(low, field)
    command = [BINARY, "embed", "--model", inputs / "learner", "--state", (tmp_path / "s").as_uri()]
    command += ["--sources", (inputs / "pool").as_uri(), "--out", out, "--embedding-dtype", "f32"]
    command += [f"--{field.replace('_', '-')}", value]
    subprocess.run(list(map(str, command)), check=True, capture_output=True, timeout=120)
    shard = sorted((inputs / "pool").iterdir())[0]
    images = pyarrow.parquet.read_table(shard)["png"].to_pylist()
    table = pyarrow.parquet.read_table(out / f"{shard.name}.embeddings.parquet")
    served = torch.from_numpy(numpy.stack(table["image_embedding"].to_numpy(zero_copy_only=False)))
    model, transform = load(inputs / "learner").eval(), Transform(inputs / "learner")
    pixels = (transform.at(value) if field == "resolution" else transform).images(images)
    way, places = way_of(model, low), None
    if field == "patch_dropout":
        places = kept_by_the_service(images, 4, value)
    cosine, apart = unlike(embedded(model, (pixels[:0], pixels), way, places), served)
    assert cosine > 0.9999 and apart < 1e-4, (cosine, apart)
    strangers = unlike(model.get_image_features(transform.images(images)), served)
    assert strangers[0] < 0.9999, "full fidelity is another thing"


@torch.no_grad()
def test_a_folder_says_how_its_trainer_resizes(inputs, tmp_path):
    """By `resize.json`: the embeddings are those of another kernel, of another model by name."""
    folder, low = tmp_path / "model", superbatch.Approximation(patch=16)
    shutil.copytree(inputs / "learner", folder)
    (folder / "resize.json").write_text('{"kernel_filter": "bicubic", "kernel_antialias": true}')
    named, served = set(), []
    for number, which in enumerate((inputs / "learner", folder)):
        out = tmp_path / f"out-{number}"
        asked = ["--model", which, "--sources", (inputs / "pool").as_uri(), "--out", out, "--json"]
        asked += ["--state", (tmp_path / "state").as_uri(), "--embedding-dtype", "f32"]
        command = [BINARY, "embed", *asked, "--patch", 16]
        ended = subprocess.run(
            list(map(str, command)), check=True, capture_output=True, text=True, timeout=120
        )
        made = json.loads(ended.stdout)
        assert made["blocks_kept"] == 0, "none of another resizing is taken for its own"
        named.add(made["model"])
        shard = sorted((inputs / "pool").iterdir())[0]
        table = pyarrow.parquet.read_table(out / f"{shard.name}.embeddings.parquet")
        image = table["image_embedding"].to_numpy(zero_copy_only=False)
        served.append(torch.from_numpy(numpy.stack(image)))
    assert len(named) == 2, "the file is part of the model's digest"
    images = pyarrow.parquet.read_table(shard)["png"].to_pylist()
    model, transform = load(folder).eval(), Transform(folder)
    pixels = transform.images(images)
    ways = (way_of(model, low), way_of(model, low, "bicubic", True))
    for way, theirs in zip(ways, served):
        cosine, apart = unlike(embedded(model, (pixels[:0], pixels), way), theirs)
        assert cosine > 0.9999 and apart < 1e-4, (cosine, apart)
    assert unlike(*served)[1] > 1e-3, "and they differ"
    inspected = subprocess.run(
        [BINARY, "inspect", folder, "--json"], check=True, capture_output=True
    ).stdout
    assert json.loads(inspected)["image"]["resizes"]["kernel"] == "bicubic with antialiasing"


@pytest.mark.parametrize("low", ALL, ids=name_of)
def test_a_trainer_trains_half_of_each_batch_so(inputs, service, low):
    """The few lines of docs/flexi.md, over the warm-up and approximate scoring."""
    run = superbatch.connect(service.address).open_run(flexi(inputs, f"few-{name_of(low)}", low))
    model, transform = load(inputs / "learner").train(), Transform(inputs / "learner")
    both, first = TwoFidelities(model, low), {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    torch.manual_seed(0)
    for batch in run.batches(rank=0, world_size=1, start_step=0, end_step=4):
        full, low_rows = by_fidelity(batch)
        assert len(full) == len(low_rows) == 12
        pixels = [transform.images(part["image"].to_pylist()) for part in (full, low_rows)]
        captions = [part["caption"].to_pylist() for part in (full, low_rows)]
        images, texts, scale, bias = both(*pixels, transform.captions(sum(captions, [])))
        loss = sigmoid_loss(F.normalize(images), F.normalize(texts), scale, bias)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.push_weights(model.state_dict(), step=batch.step)
    run.flush()
    assert torch.isfinite(loss)
    state = model.state_dict()
    kernel = "vision_model.embeddings.patch_embedding.weight"
    assert list(state) == list(first) and not torch.equal(state[kernel], first[kernel])
    assert run.verify_weights(state).equal
    assert run.receipt(3).summary.fidelity == "approximate"


@pytest.mark.parametrize("low", [ALL[0], superbatch.Approximation(resolution=8)], ids=name_of)
def test_a_loader_gives_both_fidelities(inputs, service, low):
    """As the recipes train: by `SelectedBatches` and the transform of the learner's folder."""
    asked = flexi(inputs, f"loader-{name_of(low)}", low)
    model = load(inputs / "learner").train()
    both, optimizer = TwoFidelities(model, low), torch.optim.AdamW(model.parameters(), lr=1e-3)

    def loader(transform):
        places = {"rank": 0, "world_size": 1, "start_step": 0, "end_step": 3}
        batches = SelectedBatches(service.address, asked, transform=transform, **places)
        return batches.open_run(), batches.loader()

    run, batches = loader(ImageText.of_folder(inputs / "learner", low=low))
    for step, (full, low_images, texts) in enumerate(batches):
        side = low.resolution or 16
        assert full.shape == (12, 3, 16, 16) and low_images.shape == (12, 3, side, side)
        assert len(texts) == 24
        images, captions, scale, bias = both(full, low_images, texts)
        loss = sigmoid_loss(F.normalize(images), F.normalize(captions), scale, bias)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.push_weights(model.state_dict(), step=step)
    run.flush()
    assert step == 2 and torch.isfinite(loss)
    # A transform of one size would train nothing low: it is an error at the first step.
    _, plain = loader(ImageText.of_folder(inputs / "learner"))
    with pytest.raises(superbatch.InvalidArgument, match="low: rows of step 0"):
        next(iter(plain))
