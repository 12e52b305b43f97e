"""Draws pictures at 64 x 64 on white, and the near-duplicates that a crawl is full of."""

import io
import multiprocessing
import random
from collections.abc import Iterable, Sequence

import resvg_py
from PIL import Image, ImageEnhance
from tqdm import tqdm

SIZE = 64


def render(data: bytes, is_svg: bool) -> Image.Image:
    if is_svg:
        data = bytes(resvg_py.svg_to_bytes(
            svg_string=data.decode(), width=SIZE, height=SIZE, background="white", skip_system_fonts=True))
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
    ground.paste(picture.resize((size, size), Image.Resampling.BILINEAR), (rng.randint(0, spare), rng.randint(0, spare)))
    ground = ImageEnhance.Brightness(ground).enhance(rng.uniform(0.75, 1.15))
    squeezed = io.BytesIO()
    ground.save(squeezed, "JPEG", quality=rng.randint(35, 85))
    return Image.open(squeezed).convert("RGB")


def png(picture: Image.Image) -> bytes:
    out = io.BytesIO()
    picture.save(out, "PNG", compress_level=4)
    return out.getvalue()


def render_job(job: tuple[bytes, bool, str | None]) -> bytes | None:
    """PNG bytes of one row (data, is_svg, seed of the near-duplicate or None), or None where it cannot be drawn."""
    data, is_svg, duplicate_seed = job
    try:
        picture = render(data, is_svg)
    except (ValueError, OSError):
        return None
    return png(near_duplicate(picture, random.Random(duplicate_seed)) if duplicate_seed else picture)


def render_all(jobs: Sequence[tuple[bytes, bool, str | None]], processes: int, label: str) -> list[bytes | None]:
    """`render_job` of each, in order, on that many processes, with a progress bar."""
    if processes <= 1:
        return list(progress(map(render_job, jobs), len(jobs), label))
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        return list(progress(pool.imap(render_job, jobs, chunksize=64), len(jobs), label))


def progress(done: Iterable[bytes | None], total: int, label: str) -> Iterable[bytes | None]:
    return tqdm(done, total=total, desc=label, unit="picture", smoothing=0.1)
