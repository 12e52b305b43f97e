"""Images of any size by the towers of transformers and open_clip, each as its library resamples
the grid of position embeddings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.func import functional_call

from .._errors import invalid

#: A model, or what embeds pixels `[rows, 3, side, side]` of any side.
ModelCall = torch.nn.Module | Callable[[torch.Tensor], torch.Tensor]


def image_call(model: ModelCall) -> Callable[[torch.Tensor], torch.Tensor]:
    """What embeds pixels of any size with a model."""
    if hasattr(model, "get_image_features"):
        return lambda pixels: tensor_of(
            model.get_image_features(pixel_values=pixels, interpolate_pos_encoding=True)
        )
    if hasattr(model, "visual"):
        return open_clip_images(model)
    if isinstance(model, torch.nn.Module) and not callable(getattr(model, "encode_image", None)):
        message = (
            f"a {type(model).__name__} is neither of transformers nor of open_clip; give a "
            "function of pixels instead"
        )
        raise invalid("model_call", message)
    return getattr(model, "encode_image", model)


def own_call(model: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """What embeds pixels of the model's own size."""
    if hasattr(model, "get_image_features"):
        return lambda pixels: tensor_of(model.get_image_features(pixel_values=pixels))
    return model.encode_image


def open_clip_images(model: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """Images of any size by open_clip's towers, whose own take one. The grid is resampled as timm
    does it.
    """
    visual = model.visual
    if hasattr(visual, "trunk"):
        any_size(visual.trunk)
        return model.encode_image
    if not hasattr(visual, "positional_embedding") or not hasattr(visual, "patch_size"):
        raise invalid(
            "model_call",
            f"{type(visual).__name__} is no image tower that takes two sizes; a ViT does",
        )

    def call(pixels: torch.Tensor) -> torch.Tensor:
        positions = visual.positional_embedding
        grid, own = pixels.shape[-1] // visual.patch_size[0], visual.grid_size[0]
        if grid == own:
            return visual(pixels)
        resampled = F.interpolate(
            positions[1:].float().reshape(1, own, own, -1).permute(0, 3, 1, 2),
            size=(grid, grid),
            mode="bicubic",
            antialias=True,
            align_corners=False,
        )
        resampled = resampled.permute(0, 2, 3, 1).reshape(grid * grid, -1).to(positions.dtype)
        return functional_call(
            visual, {"positional_embedding": torch.cat([positions[:1], resampled])}, (pixels,)
        )

    return call


def any_size(trunk: Any) -> None:
    """Makes a ViT of timm what `dynamic_img_size=True` makes it at creation. Its tensors stay as
    they are.
    """
    if getattr(trunk, "dynamic_img_size", None) is None or not hasattr(trunk, "patch_embed"):
        raise invalid(
            "model_call",
            f"timm's {type(trunk).__name__} takes images of one size; a VisionTransformer takes "
            "any",
        )
    if not trunk.dynamic_img_size:
        trunk.dynamic_img_size = True
        trunk.patch_embed.strict_img_size = False
        trunk.patch_embed.flatten = False
        trunk.patch_embed.output_fmt = type(trunk.patch_embed.output_fmt)("NHWC")


def tensor_of(features: Any) -> torch.Tensor:
    """Versions of transformers from 5 on give an output object."""
    return features if isinstance(features, torch.Tensor) else features.pooler_output
