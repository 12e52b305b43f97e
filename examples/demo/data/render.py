"""Draws pictures at 64 x 64 on white, and the near-duplicates that a crawl is full of."""

import hashlib
import io
import json
import multiprocessing
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pyarrow
import pyarrow.parquet
import resvg_py
from PIL import Image, ImageEnhance

from ..progress import progress
from .packages import PACKAGES
from .pictures import Picture

VERSION = 1
SIZE = 64
# Below this many pictures, starting processes costs more than they save.
PARALLEL_FROM = 256


def render(data: bytes, is_svg: bool) -> Image.Image:
    if is_svg:
        data = bytes(
            resvg_py.svg_to_bytes(
                svg_string=data.decode(),
                width=SIZE,
                height=SIZE,
                background="white",
                skip_system_fonts=True,
            )
        )
    picture = Image.open(io.BytesIO(data)).convert("RGBA")
    picture.thumbnail((SIZE, SIZE), Image.Resampling.LANCZOS)
    ground = Image.new("RGB", (SIZE, SIZE), "white")
    ground.paste(picture, ((SIZE - picture.width) // 2, (SIZE - picture.height) // 2), picture)
    return ground


def near_duplicate(picture: Image.Image, rng: random.Random) -> Image.Image:
    """The same drawing shifted, scaled, on a tinted ground, brighter or darker, through a JPEG."""
    tint = tuple(rng.randint(200, 255) for _ in range(3))
    size = rng.randint(44, SIZE)
    ground = Image.new("RGB", (SIZE, SIZE), tint)
    spare = SIZE - size
    ground.paste(
        picture.resize((size, size), Image.Resampling.BILINEAR),
        (rng.randint(0, spare), rng.randint(0, spare)),
    )
    ground = ImageEnhance.Brightness(ground).enhance(rng.uniform(0.75, 1.15))
    squeezed = io.BytesIO()
    ground.save(squeezed, "JPEG", quality=rng.randint(35, 85))
    return Image.open(squeezed).convert("RGB")


def png(picture: Image.Image) -> bytes:
    out = io.BytesIO()
    picture.save(out, "PNG", compress_level=4)
    return out.getvalue()


def render_job(job: tuple[bytes, bool]) -> bytes | None:
    """PNG bytes of one picture (data, is_svg), or None if it cannot be drawn."""
    try:
        return png(render(*job))
    except (ValueError, OSError):
        return None


def duplicate_job(job: tuple[bytes | None, str | None]) -> bytes | None:
    """PNG bytes of one row (a drawing, seed of the near-duplicate or None)."""
    data, seed = job
    if data is None or seed is None:
        return data
    return png(near_duplicate(Image.open(io.BytesIO(data)), random.Random(seed)))


class Drawings:
    """Every picture as PNG bytes, drawn once and kept in the cache: data sets of any recipe begin
    with them.
    """

    def __init__(self, drawn: dict[tuple[str, str], bytes | None]):
        self.drawn = drawn

    def __getitem__(self, picture: Picture) -> bytes | None:
        return self.drawn[picture.source, picture.path]

    @classmethod
    def of(cls, pictures: Iterable[Picture], cache: Path, processes: int) -> "Drawings":
        """Draws those that the cache lacks."""
        about = json.dumps([VERSION, SIZE, sorted(p.sha256 for p in PACKAGES.values())])
        path = cache / f"drawings-{hashlib.sha256(about.encode()).hexdigest()[:16]}.parquet"
        drawn = {}
        if path.exists():
            columns = [column.to_pylist() for column in pyarrow.parquet.read_table(path).columns]
            drawn = {(source, name): data for source, name, data in zip(*columns, strict=True)}
        missing = {key: p for p in pictures if (key := (p.source, p.path)) not in drawn}
        if missing:
            jobs = [(picture.data, picture.is_svg) for picture in missing.values()]
            drawn |= dict(
                zip(missing, in_parallel(render_job, jobs, processes, "draw pictures"), strict=True)
            )
            table = pyarrow.table(
                {
                    "source": [source for source, _ in drawn],
                    "path": [name for _, name in drawn],
                    "png": list(drawn.values()),
                }
            )
            pyarrow.parquet.write_table(table, path.with_suffix(".partial"))
            path.with_suffix(".partial").rename(path)
        return cls(drawn)


def duplicate_all(
    jobs: Sequence[tuple[bytes | None, str | None]], processes: int, label: str
) -> list[bytes | None]:
    """`duplicate_job` of each, in order; no process is started for what is only passed on."""
    todo = [i for i, (_, seed) in enumerate(jobs) if seed is not None]
    images = [data for data, _ in jobs]
    for i, image in zip(
        todo, in_parallel(duplicate_job, [jobs[i] for i in todo], processes, label), strict=True
    ):
        images[i] = image
    return images


def in_parallel(job: Callable, jobs: Sequence, processes: int, label: str) -> list:
    """`job` of each, in order, on that many processes."""
    if processes <= 1 or len(jobs) < PARALLEL_FROM:
        return list(progress(map(job, jobs), total=len(jobs), desc=label, unit="picture"))
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        return list(
            progress(
                pool.imap(job, jobs, chunksize=64), total=len(jobs), desc=label, unit="picture"
            )
        )
