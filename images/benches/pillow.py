"""Pillow's part of benches/pillow.rs.

pillow.py write FOLDER                        writes the images, prints their names
pillow.py version FOLDER                      prints Pillow's version and what it decodes JPEG with
pillow.py measure FOLDER NAME SIDE REPEATS    prints the least seconds to decode, and to resize, and
                                              to decode JPEG by simplejpeg, if it is installed
"""

import io
import sys
import time
from pathlib import Path

import numpy as np
import PIL
from PIL import Image, features

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

SIZES = [(256, 256), (640, 480), (1600, 1200)]


def photograph(width, height):
    """A photograph's stand-in: smooth areas, edges and mild noise, so that it compresses like
    one.
    """
    rng = np.random.default_rng(width)
    small = Image.fromarray(rng.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8))
    smooth = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
    return Image.fromarray((smooth + rng.normal(0, 5, smooth.shape)).clip(0, 255).astype(np.uint8))


def write(folder):
    for width, height in SIZES:
        image = photograph(width, height)
        for kind, options in (
            ("jpg", {"quality": 85}),
            ("progressive.jpg", {"quality": 85, "progressive": True}),
            ("webp", {"quality": 85}),
            ("png", {}),
        ):
            name = f"{width}x{height}.{kind}"
            image.save(folder / name, **options)
            print(name)


def measure(data, side, repeats, is_jpeg):
    decode = resize = fast = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        image = Image.open(io.BytesIO(data)).convert("RGB")
        decoded = time.perf_counter()
        image.resize((side, side), Image.Resampling.BICUBIC)
        resized = time.perf_counter()
        decode, resize = min(decode, decoded - began), min(resize, resized - decoded)
        if simplejpeg and is_jpeg:
            began = time.perf_counter()
            simplejpeg.decode_jpeg(data, "RGB")
            fast = min(fast, time.perf_counter() - began)
    print(decode, resize, *([fast] if simplejpeg and is_jpeg else []))


if __name__ == "__main__":
    what, folder = sys.argv[1], Path(sys.argv[2])
    if what == "write":
        write(folder)
    elif what == "version":
        jpeg = "simplejpeg " + simplejpeg.__version__ if simplejpeg else "SKIPPED: no simplejpeg"
        print(PIL.__version__, "with libjpeg-turbo", features.version("libjpeg_turbo"), "and", jpeg)
    else:
        name, side, repeats = sys.argv[3:]
        measure((folder / name).read_bytes(), int(side), int(repeats), name.endswith("jpg"))
