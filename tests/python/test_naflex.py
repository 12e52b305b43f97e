"""A SigLIP 2 that takes pictures of any shape (NaFlex), by the real binary."""

import io
import json
from pathlib import Path

import numpy
import pyarrow
import pyarrow.parquet
import pytest
import superbatch
import torch
import torch.nn.functional as F
from cluster import Cluster
from commands import fails, prints
from PIL import Image
from refusal import opening, refused
from superbatch.torch.folders import Pixels
from test_approximations import flexi
from test_embed import embeds
from test_end_to_end import phase, service, spec, train  # noqa: F401
from tokenizers import Tokenizer
from transformers import AutoImageProcessor, Siglip2Model

from examples.demo import tiny
from examples.demo.data.render import png

ROWS = 384
# Width and height.
SHAPES = [(16, 16), (40, 12), (10, 48), (30, 20), (6, 90), (64, 64), (3, 200)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A pool of pictures of several shapes, and the folders of a learner and a reference."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny.write_dataset(folder / "pool", rows=ROWS)
    for path in sorted((folder / "pool").iterdir()):
        table = pyarrow.parquet.read_table(path)
        pictures = [
            png(Image.open(io.BytesIO(data)).resize(SHAPES[row % len(SHAPES)]))
            for row, data in enumerate(table["png"].to_pylist())
        ]
        column = table.schema.get_field_index("png")
        table = table.set_column(column, "png", pyarrow.array(pictures, pyarrow.binary()))
        pyarrow.parquet.write_table(table, path, row_group_size=64)
    tiny.write_naflex(folder / "learner", seed=0)
    tiny.write_naflex(folder / "reference", seed=1)
    return folder


@torch.no_grad()
def embedded(folder: Path, images: list[bytes], captions: list[str]) -> list[numpy.ndarray]:
    """What transformers makes of them, at length one."""
    model = Siglip2Model.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder, use_fast=False)
    pictures = [Image.open(io.BytesIO(data)).convert("RGB") for data in images]
    pixels = processor(pictures, return_tensors="pt", input_data_format="channels_last")
    assert len(pixels["spatial_shapes"].unique(dim=0)) > 4, "grids of several shapes"
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = torch.tensor([found.ids for found in tokenizer.encode_batch(captions)])
    both = model.get_image_features(**pixels), model.get_text_features(input_ids=ids)
    return [F.normalize(x, dim=-1).numpy() for x in both]


def test_embeddings_are_those_of_transformers(inputs, tmp_path):
    state, out = (tmp_path / "state").as_uri(), tmp_path / "out"
    more = ("--out", out, "--embedding-dtype", "f32")
    made = embeds(state, inputs / "reference", inputs / "pool", *more)
    assert (made["rows"], made["faults"]) == (ROWS, 0)
    for path in sorted((inputs / "pool").iterdir()):
        source = pyarrow.parquet.read_table(path)
        found = pyarrow.parquet.read_table(out / f"{path.name}.embeddings.parquet")
        images, captions = source["png"].to_pylist(), source["caption"].to_pylist()
        names = ("image_embedding", "text_embedding")
        theirs = embedded(inputs / "reference", images, captions)
        for name, expected in zip(names, theirs, strict=True):
            ours = numpy.stack(found[name].to_numpy(zero_copy_only=False))
            assert (ours * expected).sum(axis=1).min() >= 0.9999, name
            assert numpy.abs(ours - expected).max() < 1e-4, name


def test_a_run_scores_with_it_and_takes_its_pushes(inputs, service):
    run = superbatch.connect(service.address).open_run(spec(inputs, "run"))
    ids = train(run, inputs)
    assert [len(chosen) for chosen in ids] == [24] * len(ids)
    receipt = run.receipt(2)
    assert not receipt.bad_rows and receipt.summary.learner.step == 0, "lag exact(1)"
    pool = [pyarrow.parquet.read_table(path) for path in sorted((inputs / "pool").iterdir())]
    stored = set(pyarrow.concat_tables(pool)["png"].to_pylist())
    assert set(run.select(3, rank=0, world_size=1)["image"].to_pylist()) <= stored, "as stored"
    image = json.loads(prints("inspect", inputs / "learner", "--json"))["fidelities"][0]
    assert (image["fidelity"], image["patches"]) == ("full", 10)
    # Of 96 candidates by the learner, padding of their patches included.
    assert receipt.summary.cost.scoring.image_full > 95.9 * image["image_flops"]


def test_any_number_of_workers_chooses_the_same(inputs, service, tmp_path):
    asked = spec(inputs, "one")
    alone = train(superbatch.connect(service.address).open_run(asked), inputs)
    with Cluster(tmp_path, workers=2) as cluster:
        assert train(superbatch.connect(cluster.address).open_run(asked), inputs) == alone


def test_embeddings_of_fewer_patches_are_kept_apart(inputs, tmp_path):
    state = (tmp_path / "state").as_uri()
    whole = embeds(state, inputs / "reference", inputs / "pool")
    again = embeds(state, inputs / "reference", inputs / "pool")
    assert again["blocks_kept"] == whole["blocks"]
    few = embeds(state, tiny.write_naflex(tmp_path / "few", 1, 5), inputs / "pool")
    assert few["blocks_kept"] == 0 and few["flops"] < whole["flops"]


def test_other_fidelities_are_refused_by_name(inputs, service):
    for changes in ({"resolution": 8}, {"patch": 16}, {"patch_dropout": 0.5}, {"layers": 1}):
        asked = flexi(inputs, "low", superbatch.Approximation(**changes))
        ((name, value),) = changes.items()
        said = f"(NaFlex), for which the fidelity {name}={value:g} is not built"
        field = f"phases[0].approximation.{name}"
        refused(opening(service, asked), "RUN_SPEC_IMPOSSIBLE", said, field=field)
    uniform = [phase(policy="uniform")]
    asked = spec(inputs, "uniform", phases=uniform)
    assert superbatch.connect(service.address).open_run(asked).select(0, rank=0, world_size=1)


def test_inspect_says_what_it_takes(inputs, tmp_path):
    text = prints("inspect", inputs / "learner")
    for said in (
        "siglip2, embeddings of 16 numbers",
        "of any shape (NaFlex), at most 10 patches of 8 pixels; positions of 2 x 2 patches;",
        "resized (bilinear) to at most 10 patches of 8 pixels, of the image's own shape",
        "positions bilinear with antialiasing",
        "finite, and so are embeddings on cpu",
    ):
        assert said in text, text
    found = json.loads(prints("inspect", inputs / "learner", "--json"))
    assert found["image"]["max_patches"] == 10
    assert [one["fidelity"] for one in found["fidelities"]] == ["full"]
    folder = tiny.write_naflex(tmp_path / "other")
    file = folder / "preprocessor_config.json"
    processor = json.loads(file.read_text())
    file.write_text(json.dumps({**processor, "patch_size": 4}))
    assert "at most 10 patches of 4 pixels" in fails("inspect", folder)
    fixed = {"image_processor_type": "SiglipImageProcessor", "size": 16}
    file.write_text(json.dumps(fixed))
    said = fails("inspect", folder)
    assert "makes 16x16 images" in said and "make them agree" in said


def test_pixels_without_their_mask_are_refused_for_training(inputs):
    with pytest.raises(superbatch.Error, match="folder: .*any shape .*Siglip2ImageProcessor"):
        Pixels(inputs / "learner")
