"""Image towers of transformers and open_clip, approximated as the service approximates them: larger
patches, fewer patches, fewer layers.

A tower is put together from the library's own modules, so nothing in the model is changed, and
wrappers (DDP, torch.compile) see what they see of any forward.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from .._errors import invalid
from .patches import shrunk
from .resolutions import image_call
from .ways import Way


def low_images(
    model: Any, pixels: torch.Tensor, way: Way, places: torch.Tensor | None = None
) -> torch.Tensor:
    """The embeddings of images `[rows, 3, side, side]` in one of the ways.

    places: for `patch_dropout`, the patches that each row keeps, `[rows, kept]`, by their place in
    the grid; drawn by torch's generator if None.
    """
    side = way.value if way.field == "resolution" else way.shape.image
    if side is not None and pixels.shape[-1] != side:
        raise invalid(
            "batch",
            f"low rows are images of {pixels.shape[-1]} pixels, and with {way.field}={way.value} "
            f"they are to be of {side}",
        )
    if way.field == "resolution":
        return image_call(model)(pixels)
    if way.field == "patch":
        shape = way.shape
        how = (shape.kernel_filter, shape.kernel_antialias)
        return image_call(model)(shrunk(pixels, shape.patch, way.value, how))
    if hasattr(model, "get_image_features"):
        return of_transformers(model, pixels, way, places)
    if hasattr(model.visual, "trunk"):
        return of_timm(model.visual, pixels, way, places)
    return of_open_clip(model.visual, pixels, way, places)


def of_transformers(
    model: Any, pixels: torch.Tensor, way: Way, places: torch.Tensor | None
) -> torch.Tensor:
    vision = model.vision_model
    x = vision.embeddings(pixels)
    is_clip = hasattr(model, "visual_projection")
    x = left(x, int(is_clip), way, places)
    x = vision.pre_layrnorm(x) if is_clip else x
    if way.field == "layers":
        # CLIP's layers asked for a second mask before version 5, which ignores it.
        masks = {"causal_attention_mask": None} if is_clip else {}
        for layer in list(vision.encoder.layers)[: way.value]:
            x = layer(x, attention_mask=None, **masks)
            x = x[0] if isinstance(x, tuple) else x
    else:
        x = vision.encoder(inputs_embeds=x)[0]
    if is_clip:
        return model.visual_projection(vision.post_layernorm(x[:, 0]))
    return vision.head(vision.post_layernorm(x))


def of_open_clip(
    visual: Any, pixels: torch.Tensor, way: Way, places: torch.Tensor | None
) -> torch.Tensor:
    x = visual.conv1(pixels).flatten(2).mT
    first = visual.class_embedding.to(x.dtype).expand(len(x), 1, -1)
    x = torch.cat([first, x], dim=1) + visual.positional_embedding.to(x.dtype)
    x = visual.ln_pre(left(x, 1, way, places))
    x = through(visual.transformer.resblocks, x, way, visual.transformer.grad_checkpointing)
    return visual._pool(x)[0] @ visual.proj


def of_timm(
    visual: Any, pixels: torch.Tensor, way: Way, places: torch.Tensor | None
) -> torch.Tensor:
    trunk = visual.trunk
    x = trunk._pos_embed(trunk.patch_embed(pixels))
    x = trunk.norm_pre(left(x, trunk.num_prefix_tokens, way, places))
    x = through(trunk.blocks, x, way, trunk.grad_checkpointing)
    return visual.head(trunk.forward_head(trunk.norm(x)))


def through(
    blocks: Iterable[torch.nn.Module], x: torch.Tensor, way: Way, is_checkpointed: bool
) -> torch.Tensor:
    """What the blocks make of tokens: the first ones alone, if that is the way."""
    for block in list(blocks)[: way.value if way.field == "layers" else None]:
        x = checkpoint(block, x, use_reentrant=False) if is_checkpointed else block(x)
    return x


def left(x: torch.Tensor, prefix: int, way: Way, places: torch.Tensor | None) -> torch.Tensor:
    """Of tokens `[rows, prefix + patches, d]`, those before the patches and the patches that are
    kept. They have their positions already (FLIP, Li et al. 2022, arXiv 2212.00794).
    """
    if way.field != "patch_dropout":
        return x
    rows, tokens, d = x.shape
    if places is None:
        places = drawn(rows, tokens - prefix, way.value, x.device)
    kept = x.gather(1, (places + prefix).unsqueeze(-1).expand(-1, -1, d))
    return torch.cat([x[:, :prefix], kept], dim=1)


def drawn(rows: int, patches: int, share: float, device: torch.device) -> torch.Tensor:
    """The patches that each row keeps, `[rows, kept]`: as many as the service keeps, anew at each
    call.
    """
    count = max(1, int(patches * (1 - share)))
    return torch.rand(rows, patches, device=device).argsort(dim=1)[:, :count]
