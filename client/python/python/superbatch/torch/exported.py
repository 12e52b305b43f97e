"""Folders of any dual encoder for the service: a TorchScript module, whose parameters pushes
replace.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .._errors import invalid

#: Rows that a module is traced with, and others that it is tried with.
TRACED, TRIED = 2, 3


def export_module(
    model: torch.nn.Module,
    folder: str | os.PathLike,
    *,
    image_size: int,
    text_length: int,
    tokenizer: Any,
    mean: Sequence[float] = (0.5, 0.5, 0.5),
    std: Sequence[float] = (0.5, 0.5, 0.5),
    resample: int = 3,
    pad_token_id: int = 0,
    weights: bool = True,
) -> str:
    """Writes the folder that a run's `model_uri` names, and gives the SHA-256 of its module: the
    operator names it in `worker.exported_modules`.

    model: any module with `encode_image(pixels [n, 3, side, side])`, `encode_text(ids [n,
    text_length])` and a parameter `logit_scale` (its logarithm); for the sigmoid loss also
    `logit_bias`. It is traced, so neither method may look at values to decide what it computes.
    image_size: the side of the images in pixels, to which the service resizes without cropping.
    text_length: token ids of a caption, padded with `pad_token_id`.
    tokenizer: a `tokenizers.Tokenizer`, a fast tokenizer of transformers, or the path of a
    `tokenizer.json`.
    mean, std, resample: of the pixels, as in `preprocessor_config.json` (2 bilinear, 3 bicubic).
    weights: whether to save the weights, too. A learner whose weights are pushed first needs none.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if not isinstance(getattr(model, "logit_scale", None), torch.nn.Parameter):
        raise invalid(
            "model", "it has no parameter logit_scale, the logarithm of the logits' scale"
        )
    vocab_size = write_tokenizer(folder, tokenizer)
    own = buffers_as_parameters(copy.deepcopy(model).eval().float().cpu())
    pixels, ids = example(TRACED, image_size, text_length, vocab_size)
    with torch.no_grad():
        traced = torch.jit.trace_module(
            own, {"encode_image": (pixels,), "encode_text": (ids,)}, check_trace=False
        )
        width = tried(own, traced, example(TRIED, image_size, text_length, vocab_size))
    about = {
        "image_size": image_size,
        "embedding_dim": width,
        "text_length": text_length,
        "vocab_size": vocab_size,
        "pad_token_id": pad_token_id,
        "image_flops": flops(own.encode_image, pixels[:1]),
        "text_flops": flops(own.encode_text, ids[:1]),
    }
    write_preprocessor(folder, image_size, mean, std, resample)
    return write_module(folder, traced, about, weights)


def write_module(folder: Path, traced: Any, about: dict[str, Any], weights: bool) -> str:
    """Writes the module, what is said of it and its weights, and gives the module's SHA-256."""
    torch.jit.save(traced, str(folder / "module.pt"))
    (folder / "module.json").write_text(json.dumps(about, indent=2))
    if weights:
        from safetensors.torch import save_file

        # Tied parameters are written under each of their names, by which the service reads them;
        # safetensors takes no tensors that share memory.
        named = traced.named_parameters(remove_duplicate=False)
        state = {name: value.detach().contiguous().clone() for name, value in named}
        save_file(state, folder / "model.safetensors")
    return hashlib.sha256((folder / "module.pt").read_bytes()).hexdigest()


def buffers_as_parameters(model: torch.nn.Module) -> torch.nn.Module:
    """The same model, whose running statistics are replaced by a push, too."""
    for module in model.modules():
        for name, buffer in list(module._buffers.items()):
            is_pushed = name not in module._non_persistent_buffers_set
            if buffer is not None and buffer.is_floating_point() and is_pushed:
                del module._buffers[name]
                module.register_parameter(name, torch.nn.Parameter(buffer, requires_grad=False))
    return model


def example(rows: int, side: int, length: int, vocab_size: int) -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(rows)
    pixels = torch.randn(rows, 3, side, side, generator=generator)
    return pixels, torch.randint(0, vocab_size, (rows, length), generator=generator)


def tried(model: Any, traced: Any, rows: tuple[Any, Any]) -> int:
    """The embeddings' width. Raises where the traced module is not the model for another number of
    rows.
    """
    widths = set()
    for method, given in zip(("encode_image", "encode_text"), rows, strict=True):
        expected = getattr(model, method)(given)
        widths.add(expected.shape[-1])
        try:
            found = getattr(traced, method)(given)
            is_same = torch.allclose(found, expected, rtol=1e-3, atol=1e-4)
        except RuntimeError:
            is_same = False
        if not is_same:
            message = (
                f"its {method}, traced with {TRACED} rows, does otherwise with {len(given)}: it "
                "must not depend on the number of rows"
            )
            raise invalid("model", message)
    if len(widths) > 1:
        raise invalid("model", f"images and captions have embeddings of {sorted(widths)} numbers")
    return widths.pop()


def flops(call: Any, row: torch.Tensor) -> float:
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        call(row)
    # An embedding without products costs next to nothing, and accounts want a number.
    return float(max(1, counter.get_total_flops()))


def write_preprocessor(folder: Path, side: int, mean: Any, std: Any, resample: int) -> None:
    how = {
        "image_processor_type": "SiglipImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": side, "width": side},
        "resample": resample,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(how, indent=2))


def write_tokenizer(folder: Path, tokenizer: Any) -> int:
    """Writes `tokenizer.json`, and gives the size of its vocabulary."""
    from tokenizers import Tokenizer

    inner = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if isinstance(inner, str | os.PathLike):
        inner = Tokenizer.from_file(str(inner))
    if not isinstance(inner, Tokenizer):
        raise invalid(
            "tokenizer", "give a tokenizers.Tokenizer, a fast tokenizer, or a tokenizer.json"
        )
    inner.save(str(folder / "tokenizer.json"))
    return max(inner.get_vocab().values()) + 1
