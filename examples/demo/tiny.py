"""A data set and models small enough for tests: coloured shapes with names; SigLIP, CLIP and NaFlex
SigLIP 2 of a few thousand weights.
"""

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path

import pyarrow
import pyarrow.parquet
import torch
from PIL import Image, ImageDraw
from transformers import (
    CLIPConfig,
    CLIPModel,
    Siglip2Config,
    Siglip2ImageProcessor,
    Siglip2Model,
)

from .data.render import png
from .model import LOGIT_BIAS, LOGIT_SCALE, save_weights, train_tokenizer, write_folder

COLOURS = ("red", "green", "blue", "orange", "purple", "black", "brown", "cyan", "magenta", "gray")
SHAPES = ("circle", "square", "triangle", "bar", "cross")
SIDE = 16
SHAPE = {
    "image_size": SIDE,
    "patch_size": 8,
    "width": 16,
    "vision_layers": 1,
    "text_layers": 1,
    "heads": 2,
    "mlp": 32,
    "text_length": 8,
    "vocab_size": 160,
}


def draw(colour: str, shape: str, rng: random.Random) -> bytes:
    """PNG bytes of one shape, a little off centre."""
    picture = Image.new("RGB", (SIDE, SIDE), "white")
    pen, x, y = ImageDraw.Draw(picture), rng.randint(1, 4), rng.randint(1, 4)
    box = (x, y, x + 10, y + 10)
    if shape == "circle":
        pen.ellipse(box, fill=colour)
    elif shape == "square":
        pen.rectangle(box, fill=colour)
    elif shape == "triangle":
        pen.polygon([(x, y + 10), (x + 10, y + 10), (x + 5, y)], fill=colour)
    elif shape == "bar":
        pen.rectangle((x, y + 4, x + 10, y + 7), fill=colour)
    else:
        pen.line((x, y, x + 10, y + 10), fill=colour, width=2)
        pen.line((x, y + 10, x + 10, y), fill=colour, width=2)
    return png(picture)


def captions() -> list[str]:
    return [f"a {colour} {shape}" for colour in COLOURS for shape in SHAPES]


def write_dataset(
    folder: Path,
    rows: int = 1024,
    mismatched_share: float = 0.5,
    seed: int = 0,
    shards: int = 2,
    row_group_rows: int = 64,
    split: str = "test",
) -> Path:
    """`folder` with Parquet shards of `key`, `png`, `caption`, `kind` (clean or shuffled) and
    `split`.
    """
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for index in range(rows):
        colour, shape = rng.choice(COLOURS), rng.choice(SHAPES)
        own, kind = (
            f"a {colour} {shape}",
            "shuffled" if rng.random() < mismatched_share else "clean",
        )
        caption = (
            own if kind == "clean" else rng.choice([other for other in captions() if other != own])
        )
        records.append(
            {
                "key": f"{index:09d}",
                "png": draw(colour, shape, rng),
                "caption": caption,
                "kind": kind,
                "split": split,
            }
        )
    schema = pyarrow.schema(
        [
            ("key", "string"),
            ("png", "binary"),
            ("caption", "string"),
            ("kind", "string"),
            ("split", "string"),
        ]
    )
    for shard in range(shards):
        part = pyarrow.Table.from_pylist(
            records[shard * rows // shards : (shard + 1) * rows // shards], schema
        )
        pyarrow.parquet.write_table(
            part, folder / f"{shard:05d}.parquet", row_group_size=row_group_rows
        )
    return folder


def write_siglip(folder: Path, seed: int = 0) -> Path:
    return write_folder(folder, captions(), seed, SHAPE)


#: What both towers of a model of transformers have.
TOWER = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
}


def write_tokenizer(folder: Path, texts: Sequence[str]) -> dict:
    """Makes `folder` with a tokenizer in it. Returns the configuration of its text tower."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(texts, SHAPE)
    tokenizer.save(str(folder / "tokenizer.json"))
    return {
        **TOWER,
        "vocab_size": tokenizer.get_vocab_size(),
        "max_position_embeddings": SHAPE["text_length"],
        "pad_token_id": 0,
    }


def write_clip(folder: Path, seed: int = 0, texts: Sequence[str] | None = None) -> Path:
    """CLIP pools the text at its end token, so its tokenizer begins and ends captions and its
    config says where.
    """
    text = {**write_tokenizer(folder, texts or captions()), "bos_token_id": 1, "eos_token_id": 1}
    torch.manual_seed(seed)
    model = CLIPModel(
        CLIPConfig(
            text_config=text,
            vision_config={**TOWER, "image_size": SIDE, "patch_size": 8},
            projection_dim=16,
        )
    )
    model.config.architectures = ["CLIPModel"]
    (folder / "config.json").write_text(model.config.to_json_string())
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "image_processor_type": "CLIPImageProcessor",
                "do_resize": True,
                "size": {"shortest_edge": SIDE},
                "resample": 3,
                "do_center_crop": True,
                "crop_size": {"height": SIDE, "width": SIDE},
                "do_rescale": True,
                "rescale_factor": 1 / 255,
                "do_normalize": True,
                "image_mean": [0.48145466, 0.4578275, 0.40821073],
                "image_std": [0.26862954, 0.26130258, 0.27577711],
                "do_convert_rgb": True,
            }
        )
    )
    save_weights(model, folder / "model.safetensors")
    return folder


def write_naflex(folder: Path, seed: int = 0, max_num_patches: int = 10) -> Path:
    """A SigLIP 2 that takes pictures of any shape."""
    text = write_tokenizer(folder, captions())
    vision = {**TOWER, "num_patches": 4, "patch_size": SHAPE["patch_size"]}
    torch.manual_seed(seed)
    model = Siglip2Model(Siglip2Config(text_config=text, vision_config=vision))
    with torch.no_grad():
        model.logit_scale.fill_(math.log(LOGIT_SCALE))
        model.logit_bias.fill_(LOGIT_BIAS)
    model.config.architectures = ["Siglip2Model"]
    (folder / "config.json").write_text(model.config.to_json_string())
    processor = Siglip2ImageProcessor(
        patch_size=SHAPE["patch_size"], max_num_patches=max_num_patches
    )
    processor.save_pretrained(folder)
    save_weights(model, folder / "model.safetensors")
    return folder


if __name__ == "__main__":
    import sys

    out = Path(sys.argv[1])
    write_dataset(out / "pool")
    write_dataset(out / "clean", rows=256, mismatched_share=0.0, seed=1)
    write_siglip(out / "learner", seed=0)
    write_siglip(out / "reference", seed=1)
    write_clip(out / "clip", seed=2)
