"""A worker's whole input path beside other loaders: files are read, images decoded and resized,
captions tokenized, in groups of 100 rows. Images a second and core.

    make bench-inputs               # a peer needs `pip install simplejpeg`; it is left out else

All run with one thread on images of 640x480 as JPEG, and give bytes of 224x224 pixels and 64 ids a
row: what a model's device takes. The worker's part is `server/examples/bench_inputs.rs`, the very
functions that scoring calls. Peers: WebDataset over tars with torchvision's transforms on Pillow's
images, and a loop over Parquet with simplejpeg and torchvision's resize of bytes. Taken in turns in
one run; the least of each counts. Files lie in the system's cache.
"""

import functools
import importlib.util
import io
import os
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

# One thread each; it is read when the libraries load.
os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", RAYON_NUM_THREADS="1")

import pyarrow
import pyarrow.parquet
import torch
import webdataset
from bench_turns import Took, Waiting, least, timed
from PIL import Image
from tokenizers import Tokenizer
from torchvision.transforms import InterpolationMode, v2

from examples.demo import tiny
from examples.demo.model import write_folder
from scripts import bench
from scripts.bench import Ratio

BINARY = os.environ.get("SUPERBATCH_BENCH_INPUTS", "target/release/examples/bench_inputs")
ROOT = Path(__file__).parents[2]
WIDTH, HEIGHT, SIDE, IDS = 640, 480, 224, 64
GROUP, GROUPS, PICTURES, ROUNDS = 100, 6, 16, 5
ROWS = GROUP * GROUPS
GOAL = 1.5
#: One layer: the model is not run.
SHAPE = {**tiny.SHAPE, "image_size": SIDE, "patch_size": 16, "text_length": IDS}
#: A caption of the length that captions of images on the web have.
CAPTION = "a {} beside another one, on a table in front of a wall with a window, number {}"


@functools.cache
def pictures() -> list[bytes]:
    """Stand-ins for photographs, of `make bench-images`."""
    about = importlib.util.spec_from_file_location("pictures", ROOT / "images/benches/pillow.py")
    module = importlib.util.module_from_spec(about)
    about.loader.exec_module(module)
    image, made = module.photograph(WIDTH, HEIGHT), []
    turned = (
        Image.Transpose.FLIP_LEFT_RIGHT,
        Image.Transpose.FLIP_TOP_BOTTOM,
        Image.Transpose.ROTATE_180,
    )
    for number in range(PICTURES):
        file = io.BytesIO()
        turn = turned[number % len(turned)]
        image.transpose(turn).save(file, "JPEG", quality=80 + number % 8)
        made.append(file.getvalue())
    return made


def rows() -> list[tuple[bytes, str]]:
    known = tiny.captions()
    return [
        (pictures()[n % PICTURES], CAPTION.format(known[n % len(known)], n)) for n in range(ROWS)
    ]


def write_parquet(folder: Path) -> None:
    folder.mkdir()
    images, captions = zip(*rows(), strict=True)
    table = pyarrow.table({"jpg": pyarrow.array(images, "binary"), "caption": captions})
    pyarrow.parquet.write_table(
        table, folder / "0.parquet", row_group_size=GROUP, compression="none", use_dictionary=False
    )


def write_tars(folder: Path) -> None:
    folder.mkdir()
    for group in range(GROUPS):
        with tarfile.open(folder / f"{group:05d}.tar", "w") as archive:
            for n, (image, caption) in enumerate(rows()[group * GROUP :][:GROUP]):
                for field, content in (("jpg", image), ("txt", caption.encode())):
                    member = tarfile.TarInfo(f"{group * GROUP + n:09d}.{field}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))


def ours(process: Waiting) -> Callable[[], Took]:
    """A turn of the worker's functions."""

    def turn() -> Took:
        (usable, seconds), processor = process.turn()
        assert int(usable) == ROWS, usable
        return float(seconds), processor

    return turn


def theirs(groups: Callable) -> Callable[[], Took]:
    """A turn of a peer, which gives pixels and ids of a group at a time."""

    def work() -> None:
        count = 0
        for pixels, ids in groups():
            assert pixels.shape[1:] == (3, SIDE, SIDE) and pixels.dtype == torch.uint8
            assert ids.shape == (len(pixels), IDS)
            count += len(pixels)
        assert count == ROWS, count

    return timed(work)


def by_webdataset(folder: Path, tokenizer: Tokenizer) -> Callable:
    shards = [str(path) for path in sorted(folder.glob("*.tar"))]
    size, bicubic = (SIDE, SIDE), InterpolationMode.BICUBIC
    transform = v2.Compose([v2.Resize(size, bicubic, antialias=True), v2.PILToTensor()])

    def ids(text: str) -> torch.Tensor:
        return torch.tensor(tokenizer.encode(text).ids)

    def groups():
        samples = webdataset.WebDataset(shards, shardshuffle=False).decode("pilrgb")
        samples = samples.to_tuple("jpg", "txt").map_tuple(transform, ids)
        for images, texts in samples.batched(GROUP, collation_fn=lambda rows: zip(*rows)):
            yield torch.stack(images), torch.stack(texts)

    return groups


def by_simplejpeg(folder: Path, tokenizer: Tokenizer) -> Callable | None:
    if importlib.util.find_spec("simplejpeg") is None:
        return None
    import simplejpeg

    def resized(data: bytes) -> torch.Tensor:
        # The channels stay last in memory, for which torch has vector code.
        image = torch.from_numpy(simplejpeg.decode_jpeg(data, "RGB")).permute(2, 0, 1)
        bicubic = InterpolationMode.BICUBIC
        return v2.functional.resize(image, [SIDE, SIDE], bicubic, antialias=True)

    def groups():
        file = pyarrow.parquet.ParquetFile(folder / "0.parquet")
        for group in range(file.num_row_groups):
            table = file.read_row_group(group)
            pixels = torch.stack([resized(image.as_py()) for image in table["jpg"]])
            encoded = tokenizer.encode_batch(table["caption"].to_pylist())
            yield pixels, torch.tensor([one.ids for one in encoded])

    return groups


def compared(folder: Path) -> dict[str, Took]:
    """The least seconds and processor seconds of a turn, by what makes inputs."""
    write_parquet(folder / "parquet")
    write_tars(folder / "tars")
    captions = [caption for _, caption in rows()]
    model = write_folder(folder / "model", captions, 0, SHAPE)
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    processes = {
        kind: Waiting(BINARY, model, (folder / kind).as_uri(), "1") for kind in ("parquet", "tars")
    }
    calls = {f"superbatch, {kind}": ours(process) for kind, process in processes.items()}
    calls["WebDataset and torchvision, tars"] = theirs(by_webdataset(folder / "tars", tokenizer))
    loop = by_simplejpeg(folder / "parquet", tokenizer)
    if loop:
        calls["simplejpeg and torchvision, parquet"] = theirs(loop)
    else:
        print("SKIPPED: the loop with simplejpeg, which is not installed: pip install simplejpeg")
    found = least(calls, ROUNDS)
    for process in processes.values():
        process.stop()
    return found


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = compared(Path(folder))
    print(f"{ROWS} images of {WIDTH}x{HEIGHT}, of {len(pictures()[0]) // 1000} kB and more")
    print(f"{'':40}{'images/s':>10}{'a second and core':>20}")
    for name, (seconds, processor) in found.items():
        print(f"{name:40}{ROWS / seconds:10.0f}{ROWS / processor:20.0f}")
    for name, (seconds, processor) in found.items():
        if name.startswith("superbatch"):
            continue
        what, kind = name.rsplit(", ", 1)
        wall, own = found[f"superbatch, {kind}"]
        ratio = Ratio(seconds / wall, goal=GOAL, processor=processor / own)
        print(bench.line(f"Inputs from {kind}: speed of {what}", ratio), flush=True)


if __name__ == "__main__":
    sys.exit(main())
