"""Contrastive losses over the whole sub-batch, whatever ranks it is spread over."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from .ranks import gather


def sigmoid_loss(
    images: torch.Tensor,
    texts: torch.Tensor,
    scale: torch.Tensor | float,
    bias: torch.Tensor | float,
    group: Any = None,
) -> torch.Tensor:
    """SigLIP's loss (Zhai et al. 2023) of this rank's images with all ranks' captions, for runs
    with `loss="sigmoid"`.

    Joint selection chooses rows for all of their pairs; a loss over a rank's own rows has
    `1 / world_size` of them. Averaged over ranks, as DistributedDataParallel does with gradients,
    it is the loss of the whole sub-batch.

    images, texts: this rank's embeddings, rows of length 1, as many on each rank.
    scale: multiplies the cosines, such as `model.logit_scale.exp()`.
    bias: such as `model.logit_bias`.
    group: the process group; by default the whole world, and without one this process alone.
    """
    logits = images @ gather(texts, group).T * scale + bias
    own = _own(images, group)
    labels = torch.full_like(logits, -1.0)
    labels[torch.arange(len(images), device=images.device), own] = 1.0
    return -F.logsigmoid(labels * logits).sum() / len(images)


def softmax_loss(
    images: torch.Tensor, texts: torch.Tensor, scale: torch.Tensor | float, group: Any = None
) -> torch.Tensor:
    """CLIP's loss of this rank's images with all captions and its captions with all images, for
    runs with `loss="softmax"`. Arguments as in `sigmoid_loss`.
    """
    own = _own(images, group)
    by_image = F.cross_entropy(images @ gather(texts, group).T * scale, own)
    by_text = F.cross_entropy(texts @ gather(images, group).T * scale, own)
    return (by_image + by_text) / 2


def _own(rows: torch.Tensor, group: Any) -> torch.Tensor:
    """Where this rank's rows are among those of all ranks."""
    alone = not dist.is_available() or not dist.is_initialized()
    first = 0 if alone else dist.get_rank(group) * len(rows)
    return torch.arange(first, first + len(rows), device=rows.device)
