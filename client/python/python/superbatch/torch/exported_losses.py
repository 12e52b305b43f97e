"""Folders of models that give one loss an example, such as classifiers and language models: a
TorchScript module, whose parameters pushes replace.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .._errors import invalid
from .exported import (
    TRACED,
    TRIED,
    buffers_as_parameters,
    flops,
    write_module,
    write_preprocessor,
    write_tokenizer,
)


def export_losses(
    model: torch.nn.Module,
    folder: str | os.PathLike,
    *,
    classes: int | None = None,
    image_size: int | None = None,
    text_length: int | None = None,
    tokenizer: Any = None,
    mean: Sequence[float] = (0.5, 0.5, 0.5),
    std: Sequence[float] = (0.5, 0.5, 0.5),
    resample: int = 3,
    pad_token_id: int = 0,
    per_token: bool = False,
    weights: bool = True,
) -> str:
    """Writes the folder that a `model_uri` of a run with the loss "per_example" names, and gives
    the SHA-256 of its module: the operator names it in `worker.exported_modules`.

    model: any module with `loss_per_example(inputs, targets)`, which gives a loss a row, f32 [n].
    Inputs are images [n, 3, image_size, image_size] if `image_size` is given, else token ids
    [n, text_length]. Targets are classes, int64 [n], if `classes` is given, else token ids
    [n, text_length]. It is traced, so it may not look at values to decide what it computes.
    classes: how many there are; rows whose target is no integer from 0 to `classes` - 1 are bad.
    image_size: the side of the images in pixels, to which the service resizes without cropping.
    text_length, tokenizer: of texts, be they inputs or targets; as in `export_module`.
    pad_token_id: fills what a text is shorter, whatever the tokenizer itself pads with.
    per_token: the model has `loss_per_token(inputs, targets)` instead, for phases with
    `token_share`: a pair of the losses of the target's tokens, f32 [n, tokens], and of which of
    them count, bool [n, tokens]. A row's loss is the mean over those that count.
    mean, std, resample, weights: as in `export_module`.
    """
    method = "loss_per_token" if per_token else "loss_per_example"
    if not callable(getattr(model, method, None)):
        raise invalid("model", f"it has no method {method}(inputs, targets)")
    if per_token and classes is not None:
        raise invalid("per_token", "a class has no tokens; leave classes out")
    reads_text = image_size is None or classes is None
    if reads_text and (text_length is None or tokenizer is None):
        what = "inputs" if image_size is None else "targets"
        raise invalid("text_length", f"its {what} are texts; give text_length and tokenizer")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    vocab_size = write_tokenizer(folder, tokenizer) if reads_text else 0

    def rows(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(count)

        def ids() -> torch.Tensor:
            return torch.randint(0, vocab_size, (count, text_length), generator=generator)

        side = (image_size, image_size)
        inputs = ids() if image_size is None else torch.randn(count, 3, *side, generator=generator)
        if classes is None:
            return inputs, ids()
        return inputs, torch.randint(0, classes, (count,), generator=generator)

    own = buffers_as_parameters(copy.deepcopy(model).eval().float().cpu())
    with torch.no_grad():
        traced = torch.jit.trace_module(own, {method: rows(TRACED)}, check_trace=False)
        tokens = {}
        if per_token:
            tokens["tokens"] = tokens_of(own, traced, rows(TRIED))
        else:
            check(own, traced, rows(TRIED))
    about: dict[str, Any] = {
        "gives": method,
        "input": "text" if image_size is None else "image",
        "target": "text" if classes is None else "class",
        "flops": flops(lambda row: getattr(own, method)(*row), rows(1)),
        **tokens,
    }
    if image_size is not None:
        about["image_size"] = image_size
        write_preprocessor(folder, image_size, mean, std, resample)
    if classes is not None:
        about["classes"] = classes
    if reads_text:
        about |= {
            "text_length": text_length,
            "vocab_size": vocab_size,
            "pad_token_id": pad_token_id,
        }
    return write_module(folder, traced, about, weights)


def check(model: Any, traced: Any, rows: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Raises if the model gives other than a finite loss a row, or the traced module is not the
    model for another number of rows.
    """
    expected, count = model.loss_per_example(*rows), len(rows[0])
    if expected.shape != (count,) or not expected.is_floating_point():
        message = (
            f"its loss_per_example makes {expected.dtype} of shape {list(expected.shape)} of "
            f'{count} rows, not one loss a row (reduction="none", and a mean over what a row has '
            "several losses of)"
        )
        raise invalid("model", message)
    endless = (~torch.isfinite(expected)).nonzero().flatten().tolist()
    if endless:
        message = (
            f"its loss_per_example makes {expected[endless[0]].item()} of row {endless[0]} of "
            f"{count} rows of random inputs and targets: a loss must be finite"
        )
        raise invalid("model", message)
    try:
        is_same = torch.allclose(traced.loss_per_example(*rows), expected, rtol=1e-3, atol=1e-4)
    except RuntimeError:
        is_same = False
    if not is_same:
        raise otherwise("loss_per_example", count)


def tokens_of(model: Any, traced: Any, rows: tuple[torch.Tensor, torch.Tensor]) -> int:
    """How many tokens of a row have a loss each. Raises if the model gives other than a finite loss
    for each token that counts, or the traced module is not the model for another number of rows.
    """
    found, count = model.loss_per_token(*rows), len(rows[0])
    pair = found if isinstance(found, tuple) and len(found) == 2 else (None, None)
    losses, counts = pair
    is_pair = torch.is_tensor(losses) and torch.is_tensor(counts)
    if not (
        is_pair
        and losses.dim() == 2
        and losses.shape == counts.shape
        and len(losses) == count
        and losses.shape[1] > 0
        and losses.is_floating_point()
        and counts.dtype == torch.bool
    ):
        message = (
            f"its loss_per_token makes of {count} rows no pair of losses, [{count}, tokens], and "
            "of which of them count, of the same shape and bool"
        )
        raise invalid("model", message)
    if not torch.isfinite(losses[counts]).all():
        message = (
            "its loss_per_token makes losses of random inputs and targets that are not finite: one "
            "that counts must be"
        )
        raise invalid("model", message)
    try:
        again, same = traced.loss_per_token(*rows)
        is_same = torch.equal(same, counts) and torch.allclose(
            again[counts], losses[counts], rtol=1e-3, atol=1e-4
        )
    except (RuntimeError, IndexError):
        is_same = False
    if not is_same:
        raise otherwise("loss_per_token", count)
    return losses.shape[1]


def otherwise(method: str, count: int) -> Exception:
    message = (
        f"its {method}, traced with {TRACED} rows, does otherwise with {count}: it must not depend "
        "on the number of rows"
    )
    return invalid("model", message)
