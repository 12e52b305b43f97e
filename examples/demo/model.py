"""The model that the demo trains: a small `transformers.SiglipModel` and its Hugging Face folder.

The folder (config.json, preprocessor_config.json, tokenizer.json, model.safetensors) is all that
the service needs to know.
"""

import copy
import io
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import SiglipConfig, SiglipModel

PAD, EOS, UNKNOWN = "<pad>", "</s>", "<unk>"

# Small enough for two slow cores, 0.4 million parameters. Small patches matter more than large
# pictures: with 8 x 8 ones a reference did not carry over from the vendors it was trained on to
# another.
SHAPE = {
    "image_size": 16,
    "patch_size": 4,
    "width": 64,
    "vision_layers": 2,
    "text_layers": 1,
    "heads": 4,
    "mlp": 256,
    "text_length": 12,
    "vocab_size": 4096,
}
# SigLIP starts at a bias of -10, for batches of thousands. At this size, about -log(sub_batch_size)
# is where a model that knows nothing would end up.
LOGIT_SCALE, LOGIT_BIAS = 10.0, -5.0


def config(shape: dict, vocab_size: int) -> SiglipConfig:
    common = {
        "hidden_size": shape["width"],
        "intermediate_size": shape["mlp"],
        "num_attention_heads": shape["heads"],
        "attention_dropout": 0.0,
    }
    text = {
        **common,
        "num_hidden_layers": shape["text_layers"],
        "vocab_size": vocab_size,
        "projection_size": shape["width"],
        "max_position_embeddings": shape["text_length"],
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 1,
    }
    vision = {
        **common,
        "num_hidden_layers": shape["vision_layers"],
        "image_size": shape["image_size"],
        "patch_size": shape["patch_size"],
    }
    return SiglipConfig(text_config=text, vision_config=vision)


def train_tokenizer(captions: Iterable[str], shape: dict) -> Tokenizer:
    """A byte-pair tokenizer that ends with `</s>`, cut and padded to the model's text length."""
    tokenizer = Tokenizer(models.BPE(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=shape["vocab_size"],
        special_tokens=[PAD, EOS, UNKNOWN],
        show_progress=False,
        limit_alphabet=200,
    )
    tokenizer.train_from_iterator(captions, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS}", special_tokens=[(EOS, 1)]
    )
    tokenizer.enable_truncation(shape["text_length"])
    tokenizer.enable_padding(length=shape["text_length"], pad_id=0, pad_token=PAD)
    return tokenizer


def preprocessor(shape: dict) -> dict:
    side = shape["image_size"]
    return {
        "image_processor_type": "SiglipImageProcessor",
        "do_resize": True,
        "size": {"height": side, "width": side},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "do_convert_rgb": True,
    }


def write_folder(folder: Path, captions: Sequence[str], seed: int, shape: dict = SHAPE) -> Path:
    """A model folder with random weights of that seed."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(captions, shape)
    tokenizer.save(str(folder / "tokenizer.json"))
    torch.manual_seed(seed)
    model = SiglipModel(config(shape, tokenizer.get_vocab_size()))
    with torch.no_grad():
        model.logit_scale.fill_(math.log(LOGIT_SCALE))
        model.logit_bias.fill_(LOGIT_BIAS)
    model.config.architectures = ["SiglipModel"]
    (folder / "config.json").write_text(model.config.to_json_string())
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor(shape), indent=2))
    save_weights(model, folder / "model.safetensors")
    return folder


def save_weights(model: SiglipModel, path: Path) -> None:
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()},
        path,
        {"format": "pt"},
    )


def load(folder: Path, weights: Path | None = None) -> SiglipModel:
    """The folder's model, with its own weights or those of another file."""
    model = SiglipModel(SiglipConfig.from_pretrained(folder))
    model.load_state_dict(load_file(weights or folder / "model.safetensors"))
    return model


class Transform:
    """Bytes and captions as they come in a batch, to the tensors that the model takes."""

    def __init__(self, folder: Path):
        about = json.loads((folder / "preprocessor_config.json").read_text())
        self.size = (about["size"]["width"], about["size"]["height"])
        self.resample = Image.Resampling(about["resample"])
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def at(self, side: int) -> "Transform":
        """The same for pictures of another side."""
        other = copy.copy(self)
        other.size = (side, side)
        return other

    def image(self, data: bytes) -> numpy.ndarray:
        picture = Image.open(io.BytesIO(data)).convert("RGB")
        return numpy.asarray(picture.resize(self.size, self.resample), numpy.uint8)

    def images(self, many: Iterable[bytes]) -> torch.Tensor:
        return normalise(torch.from_numpy(numpy.stack([self.image(data) for data in many])))

    def captions(self, many: Sequence[str]) -> torch.Tensor:
        return torch.tensor([encoding.ids for encoding in self.tokenizer.encode_batch(list(many))])


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 (n, height, width, 3) to float (n, 3, height, width) in -1 .. 1."""
    return pixels.permute(0, 3, 1, 2).float().div(127.5).sub(1.0)


def embed(
    model: SiglipModel, pixels: torch.Tensor, ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Image and text embeddings of length one, (n, d) each. Pictures of another size get a
    resampled position grid.
    """
    image = model.get_image_features(
        pixel_values=pixels, interpolate_pos_encoding=resized(model, pixels)
    )
    text = model.get_text_features(input_ids=ids)
    return torch.nn.functional.normalize(image, dim=-1), torch.nn.functional.normalize(text, dim=-1)


def resized(model: SiglipModel, pixels: torch.Tensor) -> bool:
    return pixels.shape[-1] != model.config.vision_config.image_size
