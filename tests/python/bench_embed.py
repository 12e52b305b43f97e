"""Pairs a second that one worker's device embeds on the CPU, beside PyTorch eager and
`torch.compile` with the same LibTorch, threads and batch: `make bench-embed`. Taken in turns in one
run; the best turn of each counts. Ratios above 1 say that the service is faster.
"""

import argparse
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from bench_turns import Took, Waiting, least, timed
from transformers import SiglipModel

from examples.demo.model import write_folder
from scripts import bench
from scripts.bench import Ratio

BINARY = os.environ.get("SUPERBATCH_BENCH_EMBED", "target/release/examples/bench_embed")
TEXT = {"text_layers": 12, "text_length": 64, "vocab_size": 4096}
#: Name, shape, rows of a micro-batch, turns.
MODELS = (
    (
        "small ViT",
        {"image_size": 128, "patch_size": 16, "width": 384, "vision_layers": 6, "heads": 6}
        | {"mlp": 1536, **TEXT, "text_layers": 3, "text_length": 32},
        32,
        8,
    ),
    (
        "ViT-B/16",
        {"image_size": 224, "patch_size": 16, "width": 768, "vision_layers": 12, "heads": 12}
        | {"mlp": 3072, **TEXT},
        16,
        3,
    ),
)


def ours(process: Waiting) -> Callable[[], Took]:
    def turn() -> Took:
        (seconds,), processor = process.turn()
        return float(seconds), processor

    return turn


def theirs(call: Callable, rows: tuple) -> Callable[[], Took]:
    def work() -> None:
        with torch.inference_mode():
            call(*rows)

    return timed(work)


def embedding(model: SiglipModel) -> Callable:
    def call(pixels, ids):
        values = pixels.permute(0, 3, 1, 2).float().div(127.5).sub(1.0)
        image = model.get_image_features(pixel_values=values)
        text = model.get_text_features(input_ids=ids)
        return (
            torch.nn.functional.normalize(image, dim=-1),
            torch.nn.functional.normalize(text, dim=-1),
        )

    return call


def compared(
    folder: Path, shape: dict, rows: int, turns: int, threads: int, compiles: bool
) -> dict[str, Took]:
    """The best seconds and processor seconds of a turn, by what embeds."""
    write_folder(folder, [str(n) for n in range(100, 3000)], 0, shape)
    model = SiglipModel.from_pretrained(folder).eval()
    pixels = torch.randint(0, 256, (rows, *(shape["image_size"],) * 2, 3), dtype=torch.uint8)
    ids = torch.zeros(rows, shape["text_length"], dtype=torch.long)
    # The device waits for each turn in a process of its own.
    process = Waiting(BINARY, folder, str(rows), str(threads))
    calls = {"ours": ours(process), "eager": theirs(embedding(model), (pixels, ids))}
    if compiles:
        compiled = theirs(torch.compile(embedding(model), dynamic=False), (pixels, ids))
        try:
            compiled()
            calls["compile"] = compiled
        except Exception as error:
            print(f"torch.compile does not work here: {type(error).__name__}")
    found = least(calls, turns)
    process.stop()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--eager-only", action="store_true", help="leave torch.compile out, which takes minutes"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{args.threads} threads, torch {torch.__version__}, f32, both towers")
    for name, shape, rows, turns in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            model = Path(folder) / "model"
            found = compared(model, shape, rows, turns, args.threads, not args.eager_only)
        for which, (seconds, processor) in found.items():
            print(
                f"{name:<10} {which:<8} {rows / seconds:8.2f} pairs/s "
                f"{processor / rows * 1e3:8.1f} ms processor time a pair"
            )
        others = {which: value for which, value in found.items() if which != "ours"}
        for which, (seconds, processor) in others.items():
            wall, cpu = seconds / found["ours"][0], processor / found["ours"][1]
            print(f"{name}: {wall:.2f} of {which}'s speed, {cpu:.2f} by processor time")
            ratio = Ratio(wall, processor=cpu)
            print(bench.line(f"embedding, {name}: speed of PyTorch, {which}", ratio), flush=True)


if __name__ == "__main__":
    main()
