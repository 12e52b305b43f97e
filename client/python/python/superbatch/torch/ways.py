"""Approximations as a model can be run at them, or refused as the service refuses them."""

from __future__ import annotations

from numbers import Real
from typing import Any, NamedTuple

import torch

from .._arguments import whole, wrong
from .._errors import invalid
from .._spec import Approximation
from .patches import inverse
from .resolutions import ModelCall, image_call

WAYS = ("resolution", "patch", "patch_dropout", "layers")


class Shape(NamedTuple):
    """An image tower: sides of an image and of a patch in pixels, layers, and how the service
    resizes its patch kernel if the model folder has no `resize.json`.
    """

    image: int
    patch: int
    layers: int
    kernel_filter: str = "bilinear"
    kernel_antialias: bool = False


class Way(NamedTuple):
    """How low rows are embedded: the field of `Approximation`, its value (None for images of any
    size), and the model's shape (None where `resolution` needs none).
    """

    field: str
    value: Any = None
    shape: Shape | None = None


def way_of(
    model: ModelCall,
    approximation: Approximation | None,
    kernel_filter: str | None = None,
    kernel_antialias: bool | None = None,
) -> Way:
    """How an approximation is computed with a model. Refused where the model cannot be run so, as
    the service refuses it.
    """
    if approximation is None:
        image_call(model)
        return Way("resolution")
    if not isinstance(approximation, Approximation):
        give = "give the phase's, such as superbatch.Approximation(patch=32)"
        raise wrong("approximation", approximation, give)
    given = [name for name in WAYS if getattr(approximation, name) is not None]
    if len(given) != 1:
        which = " and ".join(given) or "nothing"
        raise invalid("approximation", f"asks for {which}; give one of {', '.join(WAYS)}")
    field = given[0]
    value = getattr(approximation, field)
    if field != "patch_dropout":
        value = whole(f"approximation.{field}", value, least=1, bits=32)
    elif not isinstance(value, Real):
        raise wrong("approximation.patch_dropout", value, "give a share above 0 and below 1")
    if field == "resolution":
        image_call(model)
        return Way(field, value)
    shape = shape_of(model, field)
    if has := refused(shape, field, value):
        raise invalid(f"approximation.{field}", f"cannot be {value}: the model {has}")
    if field == "patch_dropout":
        refuse_own_dropout(model)
    if field != "patch":
        return Way(field, value, shape)
    # Larger patches need a resampled grid, as smaller images do.
    image_call(model)
    return Way(field, value, with_kernel(shape, kernel_filter, kernel_antialias))


def with_kernel(shape: Shape, kernel_filter: str | None, antialias: bool | None) -> Shape:
    """The shape with another way to resize its kernel, where one is given."""
    if kernel_filter not in (None, "bilinear", "bicubic"):
        raise wrong("kernel_filter", kernel_filter, 'give "bilinear" or "bicubic"')
    if not torch.compiler.is_compiling():
        # Said here and not where it is defined: it imports the compiler.
        torch.compiler.assume_constant_result(inverse)
    own = shape.kernel_antialias if antialias is None else bool(antialias)
    return shape._replace(kernel_filter=kernel_filter or shape.kernel_filter, kernel_antialias=own)


def refused(shape: Shape, field: str, value: Any) -> str | None:
    """Why a tower cannot be run so: what it has, and what to give."""
    image, own, layers = shape.image, shape.patch, shape.layers
    if field == "patch" and not (own < value <= image and image % value == 0):
        return (
            f"takes images of {image} pixels in patches of {own}; give a divisor of {image} above "
            f"{own}"
        )
    if field == "patch_dropout" and not 0 < value < 1:
        return "leaves out a share above 0 and below 1"
    if field == "layers" and not 0 < value < layers:
        return f"has {layers} layers; give fewer, and at least 1"
    return None


def shape_of(model: Any, field: str) -> Shape:
    """The shape of a ViT; refused if the model has none whose inside is known."""
    vision = vision_of(model)
    if vision is not None:
        entry = vision.embeddings
        return Shape(entry.image_size, entry.patch_size, len(vision.encoder.layers))
    visual = getattr(model, "visual", None)
    trunk = getattr(visual, "trunk", None)
    if trunk is not None and is_timm_vit(trunk):
        entry = trunk.patch_embed
        return Shape(entry.img_size[0], entry.patch_size[0], len(trunk.blocks), "bicubic", True)
    if trunk is None and hasattr(visual, "conv1") and hasattr(visual, "_pool"):
        layers = len(visual.transformer.resblocks)
        return Shape(visual.image_size[0], visual.patch_size[0], layers)
    tower = trunk if trunk is not None else visual if visual is not None else model
    raise invalid(
        "model_call",
        f"`{field}` reaches into the image tower, and a {type(tower).__name__} is none that is "
        "known; give a SigLIP or CLIP of transformers, or a model of open_clip 3 with a ViT",
    )


def vision_of(model: Any) -> Any:
    """The image tower of a SigLIP or a CLIP of transformers; None of other models, such as NaFlex
    ones, which have no grid.
    """
    vision = getattr(model, "vision_model", None)
    # The name of CLIP's first norm is misspelt in transformers.
    is_clip = hasattr(vision, "pre_layrnorm") and hasattr(model, "visual_projection")
    is_siglip = hasattr(vision, "head") and not hasattr(model, "visual_projection")
    has_grid = hasattr(getattr(vision, "embeddings", None), "interpolate_pos_encoding")
    is_known = (is_clip or is_siglip) and has_grid and hasattr(vision, "encoder")
    return vision if is_known and hasattr(model, "get_image_features") else None


def is_timm_vit(trunk: Any) -> bool:
    names = {kind.__name__ for kind in type(trunk).__mro__}
    return "VisionTransformer" in names and hasattr(trunk, "_pos_embed")


def refuse_own_dropout(model: Any) -> None:
    """A model that leaves out patches by itself does so of full rows, too."""
    visual = getattr(model, "visual", None)
    trunk = getattr(visual, "trunk", None)
    own = getattr(visual, "patch_dropout", None) if trunk is None else trunk.patch_drop
    if share := getattr(own, "prob", 0):
        message = (
            f"the model leaves out {share:g} of the patches of every row that it is trained on; "
            "set its own patch dropout to 0, so that full rows are whole"
        )
        raise invalid("model_call", message)
