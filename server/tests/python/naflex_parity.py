"""Writes a NaFlex SigLIP 2 with random weights, pictures of several shapes, and what transformers
makes of them: naflex_parity.py OUT.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from model_parity import perturb, tower
from PIL import Image
from safetensors.torch import save_file
from transformers import Siglip2Config, Siglip2ImageProcessor, Siglip2Model

# Width and height. With up to 20 patches and positions of 4 x 4, grids are wider and narrower,
# higher and lower than that of the positions; some fill all patches, others leave padding.
SIZES = [(40, 30), (30, 40), (16, 16), (90, 20), (7, 120), (3, 5), (200, 140), (1, 1)]
PATCH, POSITIONS, MOST = 4, 16, 20
LENGTH, VOCABULARY = 9, 70


def naflex():
    vision = tower(64, 160, 2, 4, num_patches=POSITIONS, patch_size=PATCH)
    text = tower(
        48, 96, 2, 4, vocab_size=VOCABULARY, max_position_embeddings=LENGTH, projection_size=64
    )
    return Siglip2Model(Siglip2Config(vision_config=vision, text_config=text)).eval()


def pictures():
    """A colour, a slope and noise, each of its own."""
    dice = np.random.default_rng(3)
    for width, height in SIZES:
        slope = np.linspace(0, dice.integers(-120, 120), width)[None, :, None]
        noise = dice.normal(0, 40, (height, width, 3))
        pixels = dice.integers(0, 256, 3) + slope + noise
        yield Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@torch.no_grad()
def main(folder):
    torch.manual_seed(20250221)
    torch.set_num_threads(1)
    model = naflex()
    perturb(model)
    model.save_pretrained(folder)
    processor = Siglip2ImageProcessor(
        patch_size=PATCH, max_num_patches=MOST, image_mean=[0.4, 0.5, 0.6]
    )
    processor.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    images = list(pictures())
    for number, image in enumerate(images):
        image.save(folder / f"{number}.png")
    inputs = processor(images, return_tensors="pt", input_data_format="channels_last")
    counts = inputs["spatial_shapes"].prod(dim=1)
    assert counts.max() == MOST and counts.min() < MOST, "with padding and without"
    ids = torch.randint(1, VOCABULARY, (len(images), LENGTH))
    image, text = model.get_image_features(**inputs), model.get_text_features(input_ids=ids)
    image, text = (F.normalize(x, dim=-1).contiguous() for x in (image, text))
    for x in (image, text):
        others = (x @ x.T - 2 * torch.eye(len(x))).max()
        assert others < 0.998, f"rows are too alike ({others}) to prove anything"
    save_file(
        {
            "image": image,
            "text": text,
            "ids": ids,
            "grids": inputs["spatial_shapes"].to(torch.int64).contiguous(),
        },
        folder / "expected.safetensors",
    )
    names = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    (folder / "state_dict.json").write_text(json.dumps(names))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
