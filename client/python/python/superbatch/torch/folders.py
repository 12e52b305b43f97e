"""Pixels and token ids as a model's folder has them, the same that the service scores."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from .._errors import invalid


class Pixels:
    """A `PIL.Image` as the folder's preprocessor_config.json says; or of another side, as the
    service makes them for `resolution`.
    """

    def __init__(self, folder: str | os.PathLike[str], side: int | None = None) -> None:
        from transformers import AutoImageProcessor

        # Pillow's pixels, as the service makes them; the fast processors resize in another way.
        self.processor = AutoImageProcessor.from_pretrained(folder, use_fast=False)
        if hasattr(self.processor, "max_num_patches"):
            raise invalid(
                "folder",
                f"{folder} takes images of any shape (NaFlex): their patches go with a mask and "
                "the shapes of their grids; call transformers' Siglip2ImageProcessor on a batch's "
                "images yourself",
            )
        self.sizes = {} if side is None else self._sizes(side)

    def _sizes(self, side: int) -> dict[str, dict[str, int]]:
        """What the processor resizes to, and cuts out, for another side."""
        size = dict(self.processor.size)
        cuts = getattr(self.processor, "do_center_crop", False)
        own = self.processor.crop_size if cuts else size
        own = own.get("height", own.get("shortest_edge"))
        scaled = {name: max(1, (2 * of * side + own) // (2 * own)) for name, of in size.items()}
        crop = {"crop_size": {"height": side, "width": side}} if cuts else {}
        return {"size": scaled, **crop}

    def __call__(self, picture: Any) -> torch.Tensor:
        return self.processor(picture, return_tensors="pt", **self.sizes)["pixel_values"][0]


class TokenIds:
    """Captions cut and padded to the model's length."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        from tokenizers import Tokenizer
        from transformers import AutoConfig

        file = Path(folder) / "tokenizer.json"
        if not file.exists():
            raise invalid(
                "folder",
                f"{file} is not there; save a fast tokenizer of transformers into the folder",
            )
        self.tokenizer = Tokenizer.from_file(str(file))
        config = AutoConfig.from_pretrained(folder)
        length = config.text_config.max_position_embeddings
        pad = self._pad_id(Path(folder), config)
        self.tokenizer.enable_truncation(length)
        self.tokenizer.enable_padding(
            length=length, pad_id=pad, pad_token=self.tokenizer.id_to_token(pad) or ""
        )

    def _pad_id(self, folder: Path, config: Any) -> int:
        """What the tokenizer itself names, before the model's configuration, whose default is often
        another id.
        """
        if self.tokenizer.padding is not None:
            return self.tokenizer.padding["pad_id"]
        file = folder / "tokenizer_config.json"
        named = json.loads(file.read_text()).get("pad_token") if file.exists() else None
        token = named.get("content") if isinstance(named, dict) else named
        if token is None and config.model_type.startswith("siglip"):
            token = "<pad>"
        found = None if token is None else self.tokenizer.token_to_id(token)
        return config.text_config.pad_token_id if found is None else found

    def __call__(self, captions: list[str]) -> torch.Tensor:
        return torch.tensor([found.ids for found in self.tokenizer.encode_batch(captions)])
