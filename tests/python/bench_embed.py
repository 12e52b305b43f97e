"""Pairs a second that one worker's device embeds on the CPU, beside PyTorch eager and
`torch.compile` with the same LibTorch, threads and batch: `make bench-embed`. Taken in turns in one
run; the best turn of each counts. Ratios above 1 say that the service is faster.
"""

import argparse
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import SiglipModel

from examples.demo.model import write_folder

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


def processor_seconds(pid: int) -> float:
    """User and system time of a process, with its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Ours:
    """The device, in a process of its own that waits for each turn."""

    def __init__(self, folder: Path, rows: int, threads: int):
        command = [BINARY, str(folder), str(rows), str(threads)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __call__(self) -> tuple[float, float]:
        before = processor_seconds(self.process.pid)
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        seconds = float(self.process.stdout.readline())
        return seconds, processor_seconds(self.process.pid) - before

    def stop(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def theirs(call: Callable, rows: tuple) -> Callable[[], tuple[float, float]]:
    def turn() -> tuple[float, float]:
        wall, processor = time.perf_counter(), time.process_time()
        with torch.inference_mode():
            call(*rows)
        return time.perf_counter() - wall, time.process_time() - processor

    return turn


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
) -> dict:
    """The best seconds and processor seconds of a turn, by what embeds."""
    write_folder(folder, [str(n) for n in range(100, 3000)], 0, shape)
    model = SiglipModel.from_pretrained(folder).eval()
    pixels = torch.randint(0, 256, (rows, *(shape["image_size"],) * 2, 3), dtype=torch.uint8)
    ids = torch.zeros(rows, shape["text_length"], dtype=torch.long)
    calls = {"ours": Ours(folder, rows, threads)}
    calls["eager"] = theirs(embedding(model), (pixels, ids))
    if compiles:
        compiled = theirs(torch.compile(embedding(model), dynamic=False), (pixels, ids))
        try:
            compiled()
            calls["compile"] = compiled
        except Exception as error:
            print(f"torch.compile does not work here: {type(error).__name__}")
    found = {name: (float("inf"), float("inf")) for name in calls}
    for turn in range(turns + 1):
        for name, call in calls.items():
            seconds = call()
            if turn:  # The first warms up.
                best = zip(found[name], seconds, strict=True)
                found[name] = tuple(min(pair) for pair in best)
    calls["ours"].stop()
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
            print(f"ratio\tEmbedding, {name}: speed of PyTorch {which}\t{wall:.3f}")
            print(
                f"ratio\tEmbedding, {name}: speed of PyTorch {which}, by processor time\t{cpu:.3f}"
            )


if __name__ == "__main__":
    main()
