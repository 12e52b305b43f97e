"""From the bytes and captions of a batch to the tensors that a model takes."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch.utils.data import get_worker_info

from .._arguments import whole
from .._batches import Batch
from .._errors import invalid

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
    columns: further columns of numbers, such as "_superbatch_weight": as tensors behind the pair,
        or in the dict.
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
        self.names = names
        self.extra = dict(extra or {})
        self.columns = tuple(columns)
        self.threads = None if threads is None else whole("threads", threads, least=1)
        self._pool: tuple[int, ThreadPoolExecutor] | None = None

    @classmethod
    def of_folder(cls, folder: str | os.PathLike[str], **options: Any) -> ImageText:
        """The transform of a model's folder of transformers, the same as the service's: images by
        its preprocessor_config.json, captions by its tokenizer.json, cut and padded to the model's
        length.

        options: as of `ImageText` itself, such as `names=("pixel_values", "input_ids")`, by which
            the batches are what its `forward` takes.
        """
        from .folders import Pixels, TokenIds

        return cls(Pixels(folder), TokenIds(folder), **options)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pool": None}

    def __call__(self, batch: Batch) -> Any:
        """The batch as tensors."""
        images = torch.stack(list(self._map(batch)))
        texts = self.text(batch["caption"].to_pylist())
        # A copy: what Arrow hands out is read-only.
        further = {
            name: torch.from_numpy(batch[name].to_numpy(zero_copy_only=False).copy())
            for name in self.columns
        }
        if self.names is None:
            return (images, texts, *further.values())
        image_name, text_name = self.names
        texts = dict(texts) if isinstance(texts, Mapping) else {text_name: texts}
        return {image_name: images, **texts, **further, **self.extra}

    def _map(self, batch: Batch) -> Any:
        indices = range(len(batch))
        threads = self._threads()
        if threads == 1:
            return map(lambda index: self._one(batch, index), indices)
        # A fork leaves a pool behind whose threads do not exist.
        if self._pool is None or self._pool[0] != os.getpid():
            self._pool = (
                os.getpid(),
                ThreadPoolExecutor(threads, thread_name_prefix="superbatch-decode"),
            )
        return self._pool[1].map(lambda index: self._one(batch, index), indices)

    def _threads(self) -> int:
        if self.threads is not None:
            return self.threads
        return (
            1 if get_worker_info() is not None else min(THREADS_MAX, len(os.sched_getaffinity(0)))
        )

    def _one(self, batch: Batch, index: int) -> torch.Tensor:
        from PIL import Image

        try:
            with Image.open(io.BytesIO(batch["image"][index].as_py())) as picture:
                return self.image(picture.convert("RGB"))
        except Exception as error:
            error.add_note(f"in row {batch['_superbatch_id'][index].as_py()} of step {batch.step}")
            raise
