"""What the libraries themselves make of models that are approximated: larger patches, fewer
patches, fewer layers.
"""

import copy

import timm
import torch
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from timm.models.vision_transformer import checkpoint_filter_fn


def drawn(keys, patches, share):
    """The patches of each row that are kept, by the row's key: those of the lowest hashes
    (SplitMix64), as many as timm and open_clip keep.
    """
    step, mask = 0x9E3779B97F4A7C15, (1 << 64) - 1

    def mixed(state):
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & mask
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & mask
        return state ^ (state >> 31)

    kept = max(1, int(patches * (1 - share)))
    places = []
    for key in keys:
        order = sorted(range(patches), key=lambda i: mixed((key + (i + 1) * step) & mask))
        places.append(sorted(order[:kept]))
    return torch.tensor(places)


class Kept(torch.nn.Module):
    """In the place of a library's patch dropout: leaves given patches."""

    def __init__(self, places, prefix):
        super().__init__()
        self.places, self.prefix = places, prefix

    def forward(self, x):
        if isinstance(x, tuple):
            x = x[0]
        places = (self.places + self.prefix).unsqueeze(-1).expand(-1, -1, x.shape[-1])
        return torch.cat([x[:, : self.prefix], x.gather(1, places)], dim=1)


SHARE, MORE = 0.5, 0.75


def larger_patch(size, patch):
    return next(side for side in range(patch + 1, size + 1) if size % side == 0)


def resized(kernel, patch, **how):
    return resample_patch_embed(kernel, [patch, patch], **how)


def open_clip_approximations(model, config, pixels):
    """By name, the embeddings of an open_clip model that is approximated in each way."""
    visual, vision = copy.deepcopy(model.visual), config["vision_cfg"]
    size, patch = vision["image_size"], vision.get("patch_size", 16)
    larger, grid = larger_patch(size, patch), size // patch
    found = {}
    is_timm = hasattr(visual, "trunk")
    where, name = (visual.trunk, "patch_drop") if is_timm else (visual, "patch_dropout")
    for share in (SHARE, MORE):
        places = drawn(range(len(pixels)), grid**2, share)
        setattr(where, name, Kept(places, 0 if is_timm else 1))
        found[f"patch_dropout={share}"] = visual(pixels)
    setattr(where, name, torch.nn.Identity())
    layers = where.blocks if is_timm else visual.transformer.resblocks
    count = len(layers) - 1
    del layers[count:]
    found[f"layers={count}"] = visual(pixels)
    if is_timm:
        trunk = timm.create_model(vision["timm_model_name"], num_classes=0, patch_size=larger)
        state = checkpoint_filter_fn(model.visual.trunk.state_dict(), trunk.eval())
        trunk.load_state_dict(state)
        found[f"patch={larger}"] = trunk(pixels)
        return found
    other = {**config, "vision_cfg": {**vision, "patch_size": larger}}
    other = {key: value for key, value in other.items() if key != "custom_text"}
    other = type(model)(**other).eval()
    state, new = model.state_dict(), size // larger
    state["visual.conv1.weight"] = resized(
        state["visual.conv1.weight"], larger, interpolation="bilinear", antialias=False
    )
    state["visual.positional_embedding"] = resample_abs_pos_embed(
        state["visual.positional_embedding"][None], new_size=[new, new], old_size=[grid, grid]
    )[0]
    other.load_state_dict(state)
    found[f"patch={larger}"] = other.visual(pixels)
    return found


def transformers_approximations(model, pixels):
    """By name, the embeddings of a model of transformers that is approximated in each way."""
    config = model.config.vision_config
    size, patch = config.image_size, config.patch_size
    larger, found = larger_patch(size, patch), {}
    for share in (SHARE, MORE):
        other = copy.deepcopy(model)
        prefix = 1 if hasattr(other, "visual_projection") else 0
        kept = Kept(drawn(range(len(pixels)), (size // patch) ** 2, share), prefix)
        inner = other.vision_model.embeddings
        inner.register_forward_hook(lambda _, __, x, kept=kept: kept(x))
        found[f"patch_dropout={share}"] = other.get_image_features(pixel_values=pixels)
    other, count = copy.deepcopy(model), config.num_hidden_layers - 1
    del other.vision_model.encoder.layers[count:]
    found[f"layers={count}"] = other.get_image_features(pixel_values=pixels)
    settings = copy.deepcopy(model.config)
    settings.vision_config.patch_size = larger
    other, state = type(model)(settings).eval(), model.state_dict()
    at, side = "vision_model.embeddings", size // larger * patch
    kernel = f"{at}.patch_embedding.weight"
    state[kernel] = resized(state[kernel], larger, interpolation="bilinear", antialias=False)
    inner = model.vision_model.embeddings
    tokens = torch.zeros(1, (size // larger) ** 2 + 1, config.hidden_size)
    grid = inner.interpolate_pos_encoding(tokens, side, side)[0]
    state[f"{at}.position_embedding.weight"] = grid
    other.load_state_dict(state)
    found[f"patch={larger}"] = other.get_image_features(pixel_values=pixels)
    return found
