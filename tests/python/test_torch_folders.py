"""`superbatch.torch` with models of transformers: what their folders say of pixels and captions,
and their losses.
"""

import io
import json
import pickle

import numpy
import pyarrow
import pytest
import superbatch
import torch
from PIL import Image
from superbatch.torch import ImageText, sigmoid_loss, softmax_loss
from superbatch.torch.folders import Pixels, TokenIds
from transformers import AutoImageProcessor, CLIPImageProcessor, CLIPModel, SiglipModel

from examples.demo import tiny

CAPTIONS = ["a red circle", "a blue bar", "a green cross"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_siglip(tmp_path_factory.mktemp("models") / "siglip", seed=0)


def pictures() -> list[Image.Image]:
    dice = numpy.random.default_rng(0)
    return [Image.fromarray(dice.integers(0, 256, (20, 30, 3), numpy.uint8)) for _ in CAPTIONS]


def inputs(folder) -> dict[str, torch.Tensor]:
    transform = pickle.loads(pickle.dumps(ImageText.of_folder(folder)))
    return {
        "pixel_values": torch.stack([transform.image(picture) for picture in pictures()]),
        "input_ids": transform.text(CAPTIONS),
    }


def test_pixels_are_the_processors(folder):
    processor = AutoImageProcessor.from_pretrained(folder, use_fast=False)
    expected = processor(pictures(), return_tensors="pt")["pixel_values"]
    assert torch.equal(inputs(folder)["pixel_values"], expected)


def test_columns_of_lists_of_one_length_are_tensors():
    def batch(masks):
        png = io.BytesIO()
        pictures()[0].save(png, "PNG")
        rows = {
            "image": [png.getvalue()] * len(masks),
            "caption": CAPTIONS[: len(masks)],
            "_superbatch_weight": [1.0] * len(masks),
            "_superbatch_token_mask": pyarrow.array(masks, pyarrow.list_(pyarrow.bool_())),
        }
        table = pyarrow.RecordBatch.from_pydict(rows)
        return superbatch.Batch(table, {}, step=3, rank=0, world_size=1)

    columns = ("_superbatch_weight", "_superbatch_token_mask")
    transform = ImageText(
        lambda picture: torch.zeros(1), lambda texts: torch.zeros(len(texts)), columns=columns
    )
    *_, weights, masks = transform(batch([[True, False], [False, True]]))
    assert torch.equal(weights, torch.ones(2, dtype=torch.float64))
    assert torch.equal(masks, torch.tensor([[True, False], [False, True]]))
    for other in ([[True], [True, False]], [[True], None], [None, None]):
        with pytest.raises(superbatch.Error, match="_superbatch_token_mask makes no tensor"):
            transform(batch(other))


def test_captions_are_cut_and_padded_to_the_models_length(folder, tmp_path):
    length = json.loads((folder / "config.json").read_text())["text_config"][
        "max_position_embeddings"
    ]
    ids = TokenIds(folder)(["a red circle", "a red circle " * 20])
    assert ids.shape == (2, length)
    # A tokenizer that does not pad by itself is told to, with the token that its folder names.
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_text((folder / name).read_text())
    told = json.loads((tmp_path / "tokenizer.json").read_text())
    pad = told["padding"]["pad_token"] if told["padding"] else "<pad>"
    (tmp_path / "tokenizer.json").write_text(json.dumps({**told, "padding": None}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": {"content": pad}}))
    assert torch.equal(TokenIds(tmp_path)(["a red circle", "a red circle " * 20]), ids)


def test_a_folder_without_a_tokenizer_is_refused(folder, tmp_path):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(superbatch.Error, match="folder: .*tokenizer.json is not there"):
        TokenIds(tmp_path)


def test_the_losses_are_those_of_transformers(folder, tmp_path):
    model = SiglipModel.from_pretrained(folder)
    out = model(**inputs(folder), return_loss=True)
    loss = sigmoid_loss(
        out.image_embeds, out.text_embeds, model.logit_scale.exp(), model.logit_bias
    )
    assert loss.item() == pytest.approx(out.loss.item(), rel=1e-5)
    clip_folder = tiny.write_clip(tmp_path / "clip", seed=2)
    clip = CLIPModel.from_pretrained(clip_folder)
    out = clip(**inputs(clip_folder), return_loss=True)
    loss = softmax_loss(out.image_embeds, out.text_embeds, clip.logit_scale.exp())
    assert loss.item() == pytest.approx(out.loss.item(), rel=1e-5)


@pytest.mark.parametrize("side", [8, 24])
def test_low_pixels_are_those_of_a_processor_of_that_side(folder, tmp_path, side):
    low = ImageText.of_folder(folder, low=superbatch.Approximation(resolution=side)).low
    size = {"height": side, "width": side}
    processor = AutoImageProcessor.from_pretrained(folder, use_fast=False, size=size)
    expected = processor(pictures()[0], return_tensors="pt")["pixel_values"][0]
    assert torch.equal(low(pictures()[0]), expected)
    # Other ways take the images as they are.
    same = ImageText.of_folder(folder, low=superbatch.Approximation(patch_dropout=0.5))
    assert torch.equal(same.low(pictures()[0]), same.image(pictures()[0]))
    # A crop keeps its share of the resized image.
    clip = CLIPImageProcessor(size={"shortest_edge": 36}, crop_size=32)
    clip.save_pretrained(tmp_path)
    cut = Pixels(tmp_path, side)(pictures()[0])
    edge = round(36 * side / 32)
    clip = CLIPImageProcessor(size={"shortest_edge": edge}, crop_size=side)
    assert torch.equal(cut, clip(pictures()[0], return_tensors="pt")["pixel_values"][0])
