"""Models that give one loss an example, and the data of their tests."""

import io
import json
import random
from pathlib import Path

import numpy
import pyarrow
import pyarrow.parquet
import superbatch
import torch
import torch.nn.functional as F
from PIL import Image

from examples.demo import tiny
from examples.demo.model import normalise

SIDE, BLOCK = tiny.SIDE, 64
CLASSES = len(tiny.SHAPES)


class Classifier(torch.nn.Module):
    """Two convolutions."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3, stride=2, padding=1),
            torch.nn.BatchNorm2d(8),
            torch.nn.ReLU(),
            torch.nn.Conv2d(8, 16, 3, stride=2, padding=1),
            torch.nn.ReLU(),
            torch.nn.Flatten(),
            torch.nn.Linear(16 * (SIDE // 4) ** 2, CLASSES),
        )

    def forward(self, pixels):
        return self.layers(pixels)

    def loss_per_example(self, pixels, targets):
        return F.cross_entropy(self(pixels), targets, reduction="none")


class Language(torch.nn.Module):
    """The next token by the one before; padding counts for nothing."""

    def __init__(self, words: int, pad: int = 0, is_tied: bool = False):
        super().__init__()
        self.pad = pad
        self.words = torch.nn.Embedding(words, 12)
        self.head = torch.nn.Linear(12, words)
        if is_tied:
            self.head.weight = self.words.weight

    def loss_per_token(self, ids, targets):
        logits, wanted = self.head(self.words(ids[:, :-1])), targets[:, 1:]
        losses = F.cross_entropy(logits.transpose(1, 2), wanted, reduction="none")
        return losses, wanted != self.pad

    def loss_per_example(self, ids, targets):
        losses, is_word = self.loss_per_token(ids, targets)
        counts = is_word.float()
        return (losses * counts).sum(1) / counts.sum(1).clamp(min=1)


def pixels(images: list[bytes]) -> torch.Tensor:
    arrays = [numpy.asarray(Image.open(io.BytesIO(image)).convert("RGB")) for image in images]
    return normalise(torch.from_numpy(numpy.stack(arrays)))


def drawings(rows: int, seed: int) -> tuple[list[bytes], list[int]]:
    """Pictures of shapes, and the number of each one's shape."""
    rng = random.Random(seed)
    images, labels = [], []
    for _ in range(rows):
        shape = rng.randrange(CLASSES)
        images.append(tiny.draw(rng.choice(tiny.COLOURS), tiny.SHAPES[shape], rng))
        labels.append(shape)
    return images, labels


def classifier(seed: int, steps: int = 0) -> Classifier:
    """One of random weights, trained for some steps on pictures with right labels."""
    torch.manual_seed(seed)
    model = Classifier()
    images, labels = drawings(400, seed=100)
    inputs, targets = pixels(images), torch.tensor(labels)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model.loss_per_example(inputs, targets).mean().backward()
        optimizer.step()
    return model.eval()


def write(folder: Path, name: str, columns: dict) -> Path:
    (folder / name).mkdir()
    table = pyarrow.table(columns)
    pyarrow.parquet.write_table(table, folder / name / "0.parquet", row_group_size=BLOCK)
    return folder / name


def allowing(pins: dict[str, str]) -> dict[str, str]:
    """The settings of a service that may run these modules."""
    return {"SUPERBATCH_WORKER__EXPORTED_MODULES": json.dumps(sorted(pins.values()))}


def losses(model: torch.nn.Module, *rows: torch.Tensor) -> numpy.ndarray:
    with torch.no_grad():
        return model.loss_per_example(*rows).double().numpy()


def learner(folder: Path) -> superbatch.Learner:
    weights = folder / "model.safetensors"
    return superbatch.Learner(model_uri=folder.as_uri(), snapshot_uri=weights.as_uri())


def pushed(model: torch.nn.Module, step: int) -> dict:
    """What a trainer might have after `step`."""
    return {
        name: value * (1 + 0.2 * (step + 1))
        for name, value in model.state_dict().items()
        if value.is_floating_point()
    }


def train(run: superbatch.Run, model: torch.nn.Module, steps: int) -> list:
    """Takes the run's steps and pushes after each. Returns the batches."""
    batches = []
    for batch in run.batches(rank=0, world_size=1, start_step=0, end_step=steps):
        batches.append(batch)
        run.push_weights(pushed(model, batch.step), step=batch.step)
    run.flush()
    return batches
