"""Training at two fidelities: what a trainer needs beside its own loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow
import torch

from .._batches import Batch
from .._spec import Approximation
from .resolutions import ModelCall, image_call, own_call, tensor_of
from .towers import low_images
from .ways import Way, way_of


def by_fidelity(batch: Batch) -> tuple[Batch, Batch]:
    """The rows that are to be trained at full fidelity, and those at the phase's approximation,
    each in the order served.
    """
    fidelities = batch["_superbatch_fidelity"].to_pylist()

    def rows(low: bool) -> Batch:
        places = [
            place for place, fidelity in enumerate(fidelities) if (fidelity == "approximate") == low
        ]
        return Batch(
            # Without a type a list without places has none.
            batch.record_batch.take(pyarrow.array(places, pyarrow.int64())),
            batch.receipt,
            batch.step,
            batch.rank,
            batch.world_size,
        )

    return rows(False), rows(True)


def two_fidelities(
    model_call: ModelCall,
    batch: Sequence[torch.Tensor],
    approximation: Approximation,
    *,
    kernel_filter: str | None = None,
    kernel_antialias: bool | None = None,
) -> torch.Tensor:
    """The image embeddings of a batch at two fidelities, one after the other, for one loss over all
    of them. The low rows are computed as the service computes them at the phase's approximation.

    model_call: the model, of transformers (SigLIP, CLIP) or open_clip (a ViT of its own or timm's);
    for `resolution` also what embeds pixels of any size.
    batch: the pixels of the full rows and those of the low ones, `[rows, 3, side, side]` each. One
    without rows is left out. Low rows are smaller images for `resolution`, and like the full ones
    for the other ways.
    approximation: the phase's. `patch_dropout` draws the patches that are left out anew at each
    call, for each row, by torch's generator.
    kernel_filter, kernel_antialias: for `patch`, what the model folder's `resize.json` says, if it
    has one.
    """
    way = way_of(model_call, approximation, kernel_filter, kernel_antialias)
    return embedded(model_call, batch, way)


def two_resolutions(model_call: ModelCall, batch: Sequence[torch.Tensor]) -> torch.Tensor:
    """The image embeddings of a batch in two sizes, one after the other, for one loss over all of
    them.

    model_call: the model, of transformers (SigLIP, CLIP) or open_clip; or what embeds pixels of any
    size.
    batch: the pixels of the full rows and those of the low ones, `[rows, 3, side, side]` each. One
    without rows is left out.
    """
    call = image_call(model_call)
    return torch.cat([call(pixels) for pixels in batch if len(pixels)])


def embedded(
    model_call: ModelCall,
    batch: Sequence[torch.Tensor],
    way: Way,
    places: torch.Tensor | None = None,
) -> torch.Tensor:
    """Full rows, then low ones. `places` are the patches that low rows keep, if not drawn."""
    full, low = batch
    call = image_call(model_call) if way.field in ("resolution", "patch") else own_call(model_call)
    parts = [call(full)] if len(full) else []
    if len(low):
        parts.append(low_images(model_call, low, way, places))
    return torch.cat(parts)


class TwoFidelities(torch.nn.Module):
    """A model whose one forward embeds images at two fidelities and all captions: what DDP, FSDP
    and torch.compile wrap.

    Its forward takes the pixels of full and of low rows and the captions of all (full rows first),
    and gives image embeddings, text embeddings (neither normalised), logit_scale (its exponential)
    and logit_bias (None without one). The model's tensors are its own, so push `model.state_dict()`
    of the model inside.

    model: of transformers (SigLIP, CLIP) or open_clip (a ViT of its own or timm's). One that cannot
    be run at the approximation is refused here.
    approximation: the phase's; None is smaller images of any size.
    kernel_filter, kernel_antialias: for `patch`, what the model folder's `resize.json` says, if it
    has one.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        approximation: Approximation | None,
        *,
        kernel_filter: str | None = None,
        kernel_antialias: bool | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.way = way_of(model, approximation, kernel_filter, kernel_antialias)

    def forward(
        self, full: torch.Tensor, low: torch.Tensor, text: Any
    ) -> tuple[Any, Any, Any, Any]:
        bias = getattr(self.model, "logit_bias", None)
        return (
            embedded(self.model, (full, low), self.way),
            text_of(self.model, text),
            self.model.logit_scale.exp(),
            # A parameter that is itself an output is unused to DDP's `find_unused_parameters`.
            None if bias is None else bias.view_as(bias),
        )


class TwoResolutions(TwoFidelities):
    """`TwoFidelities` of smaller images of any size."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__(model, None)


def text_of(model: Any, text: Any) -> torch.Tensor:
    """Embeddings of captions: token ids, or for transformers a dict of its tokenizer."""
    if hasattr(model, "get_text_features"):
        given = text if isinstance(text, dict) or hasattr(text, "keys") else {"input_ids": text}
        return tensor_of(model.get_text_features(**given))
    return model.encode_text(text)
