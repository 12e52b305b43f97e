"""Captions as a crawl would bring them: true, of another picture, cut short, or junk.

`kind` says which, and only the demo ever reads it: the selector sees picture and caption, nothing
else.
"""

import random
from collections.abc import Callable

from .pictures import Picture

# Of the wrong captions, those that belong to another picture (the others are junk); of the right
# ones, those cut short.
SHUFFLED, TRUNCATED = 0.75, 0.19
MISMATCHED = ("shuffled", "junk")


def name_only(picture: Picture) -> str:
    return f"a small icon: {picture.name}" if picture.domain == "icon" else picture.name


def with_keywords(picture: Picture, rng: random.Random) -> str:
    """The name and up to four keywords that it does not hold already."""
    fresh = [tag for tag in picture.tags if tag not in picture.name]
    return ", ".join([name_only(picture), *rng.sample(fresh, min(4, len(fresh)))])


def true_caption(picture: Picture, rng: random.Random) -> str:
    return name_only(picture) if rng.random() < 0.5 else with_keywords(picture, rng)


def truncated(picture: Picture, rng: random.Random) -> str:
    whole = true_caption(picture, rng)
    return whole[: max(3, int(len(whole) * rng.uniform(0.3, 0.7)))].rstrip(" ,:")


def shuffled(picture: Picture, another: Callable[[], Picture], rng: random.Random) -> str:
    """A true caption, of a picture of something else."""
    while True:
        other = another()
        if other.concept != picture.concept and other.name != picture.name:
            return true_caption(other, rng)


def junk(rng: random.Random) -> str:
    number = rng.randrange(10_000)
    return rng.choice(
        [
            f"img_{number:04d}.png",
            f"dsc{number:05d}",
            "untitled",
            "image",
            f"picture {number}",
            "click to enlarge",
            f"hash(0x{rng.randrange(16**8):08x})",
            f"copy of layer {number % 50}",
            f"icon-{number}@2x",
            "download",
            f"https://example.com/i/{rng.randrange(16**6):06x}",
            "no description",
            "thumbnail",
            f"{number} x {number // 2}",
        ]
    )


def draw(
    picture: Picture, another: Callable[[], Picture], wrong: float, rng: random.Random
) -> tuple[str, str]:
    """(kind, caption) of one pool row. `another` gives any row's picture, as often as the pool has
    it.
    """
    if rng.random() < wrong:
        return (
            ("shuffled", shuffled(picture, another, rng))
            if rng.random() < SHUFFLED
            else ("junk", junk(rng))
        )
    if rng.random() < TRUNCATED:
        return "truncated", truncated(picture, rng)
    return "clean", true_caption(picture, rng)
