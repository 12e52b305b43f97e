"""Larger patches, as FlexiViT makes them."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

#: Singular values below this share of the largest count as zero, as in the service.
RANK_TOLERANCE = 1e-15


def shrunk(pixels: torch.Tensor, own: int, patch: int, how: tuple[str, bool]) -> torch.Tensor:
    """Images whose patches of side `patch` are shrunk to the side `own`, so that their products
    with a kernel are those of the whole patches with the resized kernel.

    The service resizes a kernel w to P w Pᵀ (FlexiViT, Beyer et al. 2022, arXiv 2212.08013, section
    3.4), and <x, P w Pᵀ> = <Pᵀ x P, w>. So the kernel stays a parameter as it is, whose gradient is
    that through the resizing.

    how: filter and antialiasing of the resizing.
    """
    grid = pixels.shape[-1] // patch
    with torch.autocast(pixels.device.type, enabled=False):
        to = inverse(*how, own, patch, pixels.device)

        def along(x: torch.Tensor) -> torch.Tensor:
            return (x.unflatten(-1, (grid, patch)) @ to).flatten(-2)

        return along(along(pixels.float()).mT).mT.to(pixels.dtype)


def inverse(
    kernel_filter: str, antialias: bool, own: int, patch: int, device: torch.device
) -> torch.Tensor:
    """P = pinv(Aᵀ), `[patch, own]`, of the matrix A that resizes a line of `own` pixels to
    `patch`. A constant to torch.compile.
    """
    return kept_inverse(kernel_filter, antialias, own, patch, torch.device(device))


@functools.lru_cache(maxsize=32)
def kept_inverse(
    kernel_filter: str, antialias: bool, own: int, patch: int, device: torch.device
) -> torch.Tensor:
    # What is kept must serve training even if it is made in an evaluation.
    with torch.inference_mode(False), torch.no_grad():
        # Image i is the i-th pixel of a line, in all columns, which resizing leaves alike. Images
        # one pixel wide would do, but torch's antialiasing resizes them wrongly.
        lines = torch.eye(own, dtype=torch.float64, device="cpu").reshape(own, 1, own, 1)
        lines = lines.expand(own, 1, own, own).contiguous()
        resized = F.interpolate(
            lines, (patch, patch), mode=kernel_filter, antialias=antialias, align_corners=False
        )
        transposed = resized[:, 0, :, 0]
        return torch.linalg.pinv(transposed, rtol=RANK_TOLERANCE).float().to(device)
