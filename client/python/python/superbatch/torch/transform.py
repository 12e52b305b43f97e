"""From the bytes and captions of a batch to the tensors that a model takes."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy
import torch
from torch.utils.data import get_worker_info

from .._arguments import whole
from .._batches import Batch
from .._errors import invalid
from .._spec import Approximation
from .fidelities import by_fidelity

#: More threads than this wait for each other: the pool feeds one rank's share.
THREADS_MAX = 8


class ImageText:
    """A transform for `SelectedBatches`: images are decoded and transformed by a pool of threads,
    captions tokenized.

    image: makes a tensor of a `PIL.Image` in RGB, such as open_clip's `preprocess_train` or a
        transform of torchvision.
    text: makes of a list of captions a tensor, such as open_clip's tokenizer, or a mapping of
        tensors, such as one of transformers with `return_tensors="pt"`.
    names: without it, batches are pairs (images, texts). With it they are dicts, as transformers
        takes them: images under the first name, and texts under the second where `text` gives no
            mapping of its own.
    extra: further entries of these dicts, the same for every batch, such as {"return_loss": True}.
    low: as `image`, of the rows that are to be trained at the phase's approximation
        (`multi_resolution`): images of its side for `resolution`, and the same as `image` for the
        other ways. Batches are then (full images, low images, texts), full rows first, as
        `TwoFidelities` takes them; dicts have the low images under "low_" and the first name. One
        of the two may have no rows. Without it a batch with such rows is an error.
    columns: further columns of numbers, such as "_superbatch_weight": as tensors behind the pair,
        or in the dict. Lists of equal lengths become a row each, but a list that is null is
        refused.
    threads: how many images are worked on at once; by default 1 in a loader's worker, else one a
        core and at most 8. Random
        transforms draw from one generator, so with several threads two runs draw differently: give
            1 to repeat a run.

    It is called in the process that iterates, and pickled if `image` and `text` can be.
    """

    def __init__(
        self,
        image: Callable[[Any], torch.Tensor],
        text: Callable[[list[str]], Any],
        *,
        low: Callable[[Any], torch.Tensor] | None = None,
        names: tuple[str, str] | None = None,
        extra: Mapping[str, Any] | None = None,
        columns: Sequence[str] = (),
        threads: int | None = None,
    ) -> None:
        if extra and names is None:
            raise invalid(
                "extra",
                "it goes into a dict: give names too, such as ('pixel_values', 'input_ids')",
            )
        self.image = image
        self.text = text
        self.low = low
        self.names = names
        self.extra = dict(extra or {})
        self.columns = tuple(columns)
        self.threads = None if threads is None else whole("threads", threads, least=1)
        self._pool: tuple[int, ThreadPoolExecutor] | None = None

    @classmethod
    def of_folder(
        cls,
        folder: str | os.PathLike[str],
        *,
        low: Approximation | None = None,
        **options: Any,
    ) -> ImageText:
        """The transform of a model's folder of transformers, the same as the service's: images by
        its preprocessor_config.json, captions by its tokenizer.json, cut and padded to the model's
        length.

        low: the phase's approximation, for runs with `multi_resolution`.
        options: as of `ImageText` itself, such as `names=("pixel_values", "input_ids")`, by which
            the batches are what its `forward` takes.
        """
        from .folders import Pixels, TokenIds

        if low is not None:
            options["low"] = Pixels(folder, low.resolution)
        return cls(Pixels(folder), TokenIds(folder), **options)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pool": None}

    def __call__(self, batch: Batch) -> Any:
        """The batch as tensors."""
        parts = self._parts(batch)
        images = self._images(parts)
        texts = self.text([caption for part in parts for caption in part["caption"].to_pylist()])
        further = {name: column(parts, name) for name in self.columns}
        if self.names is None:
            return (*images, texts, *further.values())
        image_name, text_name = self.names
        texts = dict(texts) if isinstance(texts, Mapping) else {text_name: texts}
        pixels = dict(zip((image_name, f"low_{image_name}"), images))
        return {**pixels, **texts, **further, **self.extra}

    def _parts(self, batch: Batch) -> tuple[Batch, ...]:
        """The rows of each fidelity that there is a transform for."""
        if self.low is not None:
            return by_fidelity(batch)
        column = "_superbatch_fidelity"
        if column in batch.column_names and "approximate" in batch[column].to_pylist():
            raise invalid(
                "low",
                f"rows of step {batch.step} are to be trained at the phase's approximation "
                "(multi_resolution), and this transform makes images of one size: give ImageText a "
                "`low` and train with TwoFidelities, or leave multi_resolution out of the run",
            )
        return (batch,)

    def _images(self, parts: tuple[Batch, ...]) -> list[torch.Tensor]:
        """The images of each part."""
        made = [list(self._map(part, image)) for part, image in zip(parts, (self.image, self.low))]
        some = next((images[0] for images in made if images), torch.empty(0))
        # A part without rows has the shape of the other's.
        return [torch.stack(images) if images else some[None][:0] for images in made]

    def _map(self, batch: Batch, image: Callable[[Any], torch.Tensor]) -> Any:
        indices = range(len(batch))
        threads = self._threads()
        if threads == 1:
            return map(lambda index: self._one(batch, index, image), indices)
        # A fork leaves a pool behind whose threads do not exist.
        if self._pool is None or self._pool[0] != os.getpid():
            self._pool = (
                os.getpid(),
                ThreadPoolExecutor(threads, thread_name_prefix="superbatch-decode"),
            )
        return self._pool[1].map(lambda index: self._one(batch, index, image), indices)

    def _threads(self) -> int:
        if self.threads is not None:
            return self.threads
        return (
            1 if get_worker_info() is not None else min(THREADS_MAX, len(os.sched_getaffinity(0)))
        )

    def _one(self, batch: Batch, index: int, image: Callable[[Any], torch.Tensor]) -> torch.Tensor:
        from PIL import Image

        try:
            with Image.open(io.BytesIO(batch["image"][index].as_py())) as picture:
                return image(picture.convert("RGB"))
        except Exception as error:
            error.add_note(f"in row {batch['_superbatch_id'][index].as_py()} of step {batch.step}")
            raise


def column(parts: Sequence[Batch], name: str) -> torch.Tensor:
    """A column of numbers or truth values, or of lists of them that are of equal lengths."""
    # A copy: what Arrow hands out is read-only.
    rows = numpy.concatenate([part[name].to_numpy(zero_copy_only=False) for part in parts])
    lists = [row for row in rows if isinstance(row, numpy.ndarray)]
    if lists and len(lists) == len(rows) and len({row.shape for row in lists}) == 1:
        rows = numpy.stack(lists)
    if rows.dtype.kind not in "biuf":
        raise invalid(
            "columns",
            f"{name} makes no tensor of step {parts[0].step}: that takes numbers or truth values, "
            "or lists of them of one length, and none may be null. Leave it out, and read "
            f"batch[{name!r}]",
        )
    return torch.from_numpy(rows)
