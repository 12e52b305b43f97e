"""Writes model folders with random weights, inputs, and what transformers and open_clip make of
them: model_parity.py OUT.
"""

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from model_approximations import open_clip_approximations, transformers_approximations
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from open_clip.model import CLIP, CustomTextCLIP
from safetensors.torch import save_file
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)

ROWS = 6
EOS_RIGHT, EOS_LEGACY = 37, 2


def tower(hidden, inner, layers, heads, **more):
    return dict(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        **more,
    )


def siglip(vision, text):
    return SiglipModel(SiglipConfig(vision_config=vision, text_config=text))


def clip(vision, text, projection_dim):
    return CLIPModel(
        CLIPConfig(vision_config=vision, text_config=text, projection_dim=projection_dim)
    )


def models():
    """Name, model, the end-of-text id that captions carry, and the largest shard."""
    yield (
        "siglip-64",
        siglip(
            tower(64, 160, 2, 4, image_size=32, patch_size=8),
            tower(64, 128, 2, 2, vocab_size=100, max_position_embeddings=12),
        ),
        None,
        "1GB",
    )
    # Another text width; 50 pixels do not divide into patches of 16; layer_norm_eps and activation
    # are not the defaults.
    yield (
        "siglip-96",
        siglip(
            tower(
                96, 100, 3, 3, image_size=50, patch_size=16, hidden_act="gelu", layer_norm_eps=1e-3
            ),
            tower(40, 80, 3, 5, vocab_size=64, max_position_embeddings=9, projection_size=96),
        ),
        None,
        "1GB",
    )
    yield (
        "clip-legacy-eos",
        clip(
            tower(64, 128, 2, 4, image_size=32, patch_size=8),
            tower(48, 96, 2, 4, vocab_size=90, max_position_embeddings=11, eos_token_id=EOS_LEGACY),
            projection_dim=32,
        ),
        89,
        "1GB",
    )
    yield (
        "clip-gelu-sharded",
        clip(
            tower(48, 96, 3, 3, image_size=30, patch_size=10, hidden_act="gelu"),
            tower(
                64,
                100,
                2,
                2,
                vocab_size=50,
                max_position_embeddings=14,
                hidden_act="gelu",
                eos_token_id=EOS_RIGHT,
            ),
            projection_dim=56,
        ),
        EOS_RIGHT,
        "100KB",
    )


def open_clip_models():
    """Name, class, and the `model_cfg` of `open_clip_config.json`."""
    text = {"context_length": 11, "vocab_size": 70, "width": 32, "heads": 4, "layers": 2}
    yield (
        "open_clip-vit",
        CLIP,
        {
            "embed_dim": 24,
            "quick_gelu": True,
            "text_cfg": text,
            "vision_cfg": {
                "image_size": 32,
                "layers": 2,
                "width": 48,
                "head_width": 12,
                "patch_size": 8,
            },
        },
    )
    # Every other way that its own towers may take.
    yield (
        "open_clip-custom",
        CustomTextCLIP,
        {
            "embed_dim": 20,
            "init_logit_bias": -9,
            "custom_text": True,
            "vision_cfg": {
                "image_size": 50,
                "layers": 2,
                "width": 48,
                "head_width": 24,
                "patch_size": 16,
                "mlp_ratio": 3.0,
                "pool_type": "avg",
                "no_ln_pre": True,
                "final_ln_after_pool": True,
            },
            "text_cfg": {
                **text,
                "no_causal_mask": True,
                "pool_type": "last",
                "proj_bias": True,
                "norm_kwargs": {"eps": 1e-3},
                "act_kwargs": {"approximate": "tanh"},
            },
        },
    )
    # The image tower of ViT-B-16-SigLIP at its full size.
    yield (
        "open_clip-siglip",
        CustomTextCLIP,
        {
            "embed_dim": 768,
            "init_logit_bias": -10,
            "custom_text": True,
            "vision_cfg": {
                "image_size": 224,
                "timm_model_name": "vit_base_patch16_siglip_224",
                "timm_model_pretrained": False,
                "timm_pool": "map",
                "timm_proj": "none",
            },
            "text_cfg": {
                **text,
                "hf_tokenizer_name": "timm/ViT-B-16-SigLIP",
                "no_causal_mask": True,
                "proj_bias": True,
                "pool_type": "last",
                "norm_kwargs": {"eps": 1e-6},
            },
        },
    )


def any_size(model, pixels):
    """Images of any size: by timm's `dynamic_img_size`, and for open_clip's own tower by the grid
    that timm makes.
    """
    visual = model.visual
    if hasattr(visual, "trunk"):
        import timm

        trunk = timm.create_model(
            "vit_base_patch16_siglip_224", num_classes=0, dynamic_img_size=True
        ).eval()
        trunk.load_state_dict(visual.trunk.state_dict())
        return trunk(pixels)
    old, new = visual.grid_size[0], pixels.shape[-1] // visual.patch_size[0]
    from timm.layers import resample_abs_pos_embed

    grid = resample_abs_pos_embed(
        visual.positional_embedding[None], new_size=[new, new], old_size=[old, old]
    )[0]
    return torch.func.functional_call(visual, {"positional_embedding": grid}, (pixels,))


def write_open_clip(folder, model, config):
    folder.mkdir()
    vision, text = config["vision_cfg"], config["text_cfg"]
    size, patch = vision["image_size"], vision.get("patch_size", 16)
    low = (size // patch + 1) // 2 * patch
    mean, std = torch.tensor(OPENAI_DATASET_MEAN), torch.tensor(OPENAI_DATASET_STD)
    (folder / "open_clip_config.json").write_text(
        json.dumps(
            {
                "model_cfg": config,
                "preprocess_cfg": {"mean": OPENAI_DATASET_MEAN, "std": OPENAI_DATASET_STD},
            }
        )
    )
    (folder / "tokenizer.json").write_text("{}")
    save_file(
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        folder / "open_clip_model.safetensors",
    )
    rows = ROWS if size < 100 else 2

    def unit(x):
        return F.normalize(x, dim=-1).contiguous()

    def values(pixels):
        return ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()

    pixels, low_pixels = (
        torch.randint(0, 256, (rows, side, side, 3), dtype=torch.uint8) for side in (size, low)
    )
    ids = torch.randint(1, text["vocab_size"] - 1, (rows, text["context_length"]))
    for row in range(rows):
        ids[row, 3 + row] = text["vocab_size"] - 1
        ids[row, 4 + row :] = 0
    image, words = unit(model.encode_image(values(pixels))), unit(model.encode_text(ids))
    torch.testing.assert_close(unit(any_size(model, values(pixels))), image)
    for x in (image, words):
        assert (x @ x.T - 2 * torch.eye(rows)).max() < 0.998, (
            f"{folder.name}: rows are too alike to prove anything"
        )
    bias = -3.5 if model.logit_bias is not None else 0.0
    save_file(
        {
            "pixels": pixels,
            "ids": ids,
            "image": image,
            "text": words,
            "low_pixels": low_pixels,
            "low_image": unit(any_size(model, values(low_pixels))),
            **{
                name: unit(x)
                for name, x in open_clip_approximations(model, config, values(pixels)).items()
            },
            "normalisation": torch.cat([torch.tensor([1 / 255]), mean, std]),
            "logits": torch.tensor([model.logit_scale.exp().item(), bias]),
        },
        folder / "expected.safetensors",
    )
    names = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    (folder / "state_dict.json").write_text(json.dumps(names))


def perturb(model):
    """Nothing stays at a value (zero, one) that would hide a tensor which is not used."""
    for name, parameter in model.named_parameters():
        if name not in ("logit_scale", "logit_bias"):
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.dim() == 1 else 0.08))
    model.logit_scale.fill_(1.25)
    if getattr(model, "logit_bias", None) is not None:
        model.logit_bias.fill_(-3.5)


def captions(model, eos):
    text = model.config.text_config
    ids = torch.randint(3, text.vocab_size, (ROWS, text.max_position_embeddings))
    if eos is not None:
        ids = torch.where(ids >= min(eos, text.vocab_size - 2), ids % 30 + 3, ids)
        for row in range(ROWS):
            end = 2 + row
            # The legacy rule must not look for id 2, nor the right one for the largest id.
            ids[row, 1] = EOS_LEGACY if eos != EOS_RIGHT else text.vocab_size - 1
            ids[row, end] = eos
            ids[row, end + 1 :] = eos if row % 2 else 1
    return ids


def write(folder, model, eos, shard):
    model.save_pretrained(folder, max_shard_size=shard)
    size = model.config.vision_config.image_size
    processor = CLIPImageProcessor if eos is not None else SiglipImageProcessor
    processor = processor(size={"height": size, "width": size})
    processor.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")

    pixels = torch.randint(0, 256, (ROWS, size, size, 3), dtype=torch.uint8)
    pixels[0] = pixels[0] // 4  # Rows that differ in more than noise.
    pixels[1, :, :, 0] = 255
    ids = captions(model, eos)
    mean, std = torch.tensor(processor.image_mean), torch.tensor(processor.image_std)
    values = (pixels.float() * processor.rescale_factor - mean) / std
    image = model.get_image_features(pixel_values=values.permute(0, 3, 1, 2).contiguous())
    text = model.get_text_features(input_ids=ids)
    image, text = (x / x.norm(dim=-1, keepdim=True) for x in (image, text))
    for x in (image, text):
        others = (x @ x.T - 2 * torch.eye(ROWS)).max()
        assert others < 0.995, f"{folder.name}: rows are too alike ({others}) to prove anything"
    patch = model.config.vision_config.patch_size
    low = (size // patch + 1) // 2 * patch
    low_pixels = torch.randint(0, 256, (ROWS, low, low, 3), dtype=torch.uint8)
    values = (low_pixels.float() * processor.rescale_factor - mean) / std
    low_image = model.get_image_features(
        pixel_values=values.permute(0, 3, 1, 2).contiguous(), interpolate_pos_encoding=True
    )
    values = (pixels.float() * processor.rescale_factor - mean) / std
    others = transformers_approximations(model, values.permute(0, 3, 1, 2).contiguous())
    save_file(
        dict(
            **{name: F.normalize(x, dim=-1).contiguous() for name, x in others.items()},
            low_pixels=low_pixels,
            low_image=(low_image / low_image.norm(dim=-1, keepdim=True)).contiguous(),
            pixels=pixels,
            ids=ids,
            image=image.contiguous(),
            text=text.contiguous(),
            normalisation=torch.cat([torch.tensor([processor.rescale_factor]), mean, std]),
            logits=torch.tensor(
                [model.logit_scale.exp().item(), -3.5 if hasattr(model, "logit_bias") else 0.0]
            ),
        ),
        folder / "expected.safetensors",
    )
    names = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    (folder / "state_dict.json").write_text(json.dumps(names))


@torch.no_grad()
def main():
    torch.manual_seed(20240617)
    torch.set_num_threads(1)
    for name, model, eos, shard in models():
        model.eval()
        perturb(model)
        write(Path(sys.argv[1]) / name, model, eos, shard)
    for name, kind, config in open_clip_models():
        model = kind(**{key: value for key, value in config.items() if key != "custom_text"}).eval()
        perturb(model)
        write_open_clip(Path(sys.argv[1]) / name, model, config)


if __name__ == "__main__":
    main()
