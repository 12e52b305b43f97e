"""Builds the three sets: `clean/` and `pool/` to train on, `eval/` by a vendor that neither has.

Each set is a folder of Parquet shards as img2dataset writes them (`key`, `png`, `caption`), with
what the demo knows beside it (`kind`, `concept`, ...). The build is a function of the pinned
packages, the recipe and VERSION.

Concepts come into the pool as often as they do into a crawl: drawn by Zipf, so that a few fill much
of it and most are rare. What is drawn again comes as a near-duplicate with a caption of its own.
Test names come once each.
"""

import hashlib
import itertools
import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow
import pyarrow.parquet

from .captions import draw, name_only, with_keywords
from .packages import PACKAGES, fetch
from .pictures import Picture, read_all
from .render import SIZE, Drawings, duplicate_all

VERSION = 2
ROW_GROUP_ROWS = 256
SHARD_ROWS = 4096
SEED = 20240624
UNSEEN_SHARE = 0.12
COLUMNS = [
    "key",
    "png",
    "caption",
    "kind",
    "domain",
    "source",
    "license",
    "concept",
    "name",
    "tags",
    "group",
    "subgroup",
    "skin",
    "dup_of",
    "split",
    "width",
    "height",
]


@dataclass(frozen=True)
class PoolRecipe:
    """What the pool is made of. The exponent `zipf` 0 gives every concept the same share; web pools
    have about 1.
    """

    rows: int
    zipf: float = 1.0
    wrong: float = 0.53
    seed: int = SEED


@dataclass(frozen=True)
class Row:
    """A row before its picture is drawn. `duplicate_of` is the key of the picture that this one
    nearly is.
    """

    picture: Picture
    caption: str
    kind: str
    split: str = "train"
    duplicate_of: str | None = None


def build_dataset(cache: Path, recipe: PoolRecipe, processes: int) -> Path:
    """The folder with `clean/`, `pool/`, `eval/`, `CREDITS.txt` and `dataset.json`; built only
    where it is not there yet.
    """
    about = json.dumps([VERSION, asdict(recipe), sorted(p.sha256 for p in PACKAGES.values())])
    folder = cache / f"dataset-{hashlib.sha256(about.encode()).hexdigest()[:16]}"
    if (folder / "dataset.json").exists():
        return folder
    pictures = read_all(fetch(cache / "packages"))
    sets = plan_sets(pictures, recipe)
    drawings = Drawings.of(
        [row.picture for rows in sets.values() for row in rows], cache, processes
    )
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    counts = write_sets(sets, drawings, partial, processes)
    (partial / "CREDITS.txt").write_text(credits())
    clean = f"{VERSION}-{recipe.seed}-{counts['clean']}"
    (partial / "dataset.json").write_text(
        json.dumps({"recipe": asdict(recipe), "rows": counts, "clean": clean}, indent=2)
    )
    partial.rename(folder)
    return folder


def plan_sets(pictures: Sequence[Picture], recipe: PoolRecipe) -> dict[str, list[Row]]:
    """Which picture goes where under which caption. Vendors are split, and `unseen` concepts are
    kept out of training.
    """
    rng = random.Random(recipe.seed)
    training = [picture for picture in pictures if picture.source != "twitter"]
    held_out = [
        picture
        for picture in pictures
        if picture.source == "twitter" and not picture.skin and picture.group
    ]
    concepts = sorted({p.concept for p in held_out if p.group not in ("people-body", "flags")})
    unseen = set(rng.sample(concepts, int(len(concepts) * UNSEEN_SHARE)))
    training = [picture for picture in training if picture.concept not in unseen]
    clean = [picture for picture in training if is_clean(picture)]
    chosen = {id(picture) for picture in clean}
    pool = [picture for picture in training if id(picture) not in chosen]
    return {
        "eval": eval_rows(held_out, unseen, rng),
        "clean": clean_rows(clean, rng),
        "pool": pool_rows(pool, recipe, rng),
    }


def is_clean(picture: Picture) -> bool:
    drawn_well = picture.source in ("openmoji", "fluent/modern")
    return (
        drawn_well
        and not picture.skin
        and bool(picture.group)
        and not picture.group.startswith("extras")
    )


def eval_rows(pictures: Sequence[Picture], unseen: set[str], rng: random.Random) -> list[Row]:
    """One row a name: a name that two pictures carry could not be scored."""
    named: dict[str, Picture] = {}
    for picture in pictures:
        named.setdefault(picture.name, picture)
    splits = {
        name: "unseen" if p.concept in unseen else rng.choices(["val", "test"], [0.3, 0.7])[0]
        for name, p in named.items()
    }
    return [Row(picture, name, "clean", splits[name]) for name, picture in named.items()]


def clean_rows(pictures: Sequence[Picture], rng: random.Random) -> list[Row]:
    rows = [
        Row(picture, caption, "clean")
        for picture in pictures
        for caption in dict.fromkeys([name_only(picture), with_keywords(picture, rng)])
    ]
    rng.shuffle(rows)
    return rows


def pool_rows(pictures: Sequence[Picture], recipe: PoolRecipe, rng: random.Random) -> list[Row]:
    """Concepts by their popularity, and of each any of its pictures: the first time as it is, then
    nearly so.
    """
    by_concept: dict[str, list[Picture]] = {}
    for picture in pictures:
        by_concept.setdefault(picture.concept, []).append(picture)
    concepts = sorted(by_concept)
    rng.shuffle(concepts)
    popularity = list(
        itertools.accumulate((rank + 1) ** -recipe.zipf for rank in range(len(concepts)))
    )

    def any_picture() -> Picture:
        (concept,) = rng.choices(concepts, cum_weights=popularity)
        return rng.choice(by_concept[concept])

    rows, seen = [], set()
    for _ in range(recipe.rows):
        picture = any_picture()
        kind, caption = draw(picture, any_picture, recipe.wrong, rng)
        rows.append(
            Row(picture, caption, kind, duplicate_of=picture.path if id(picture) in seen else None)
        )
        seen.add(id(picture))
    return rows


def write_sets(
    sets: dict[str, list[Row]], drawings: Drawings, folder: Path, processes: int
) -> dict[str, int]:
    """Writes each set; a picture that is in an earlier set byte for byte is left out of the later
    ones.
    """
    counts, taken = {}, set()
    for name, rows in sets.items():
        jobs = [
            (drawings[row.picture], f"{SEED}:{name}:{i}" if row.duplicate_of else None)
            for i, row in enumerate(rows)
        ]
        images = duplicate_all(jobs, processes, f"draw {name}")
        kept = [
            (row, image)
            for row, image in zip(rows, images, strict=True)
            if image and digest(image) not in taken
        ]
        if name == "eval":
            kept = sole_pictures(kept)
        taken |= {digest(image) for _, image in kept}
        counts[name] = len(kept)
        write_shards(
            [record(name, i, row, image) for i, (row, image) in enumerate(kept)], folder / name
        )
    return counts


def digest(image: bytes) -> bytes:
    return hashlib.blake2b(image, digest_size=16).digest()


def sole_pictures(rows: list[tuple[Row, bytes]]) -> list[tuple[Row, bytes]]:
    """Without pictures that carry two names, such as the flags of Norway and of Bouvet Island."""
    count: dict[bytes, int] = {}
    for _, image in rows:
        count[image] = count.get(image, 0) + 1
    return [(row, image) for row, image in rows if count[image] == 1]


def record(name: str, index: int, row: Row, image: bytes) -> dict:
    picture = row.picture
    return {
        "key": f"{index:09d}",
        "png": image,
        "caption": row.caption,
        "kind": row.kind,
        "domain": picture.domain,
        "source": picture.source,
        "license": picture.license,
        "concept": picture.concept,
        "name": picture.name,
        "tags": ", ".join(picture.tags),
        "group": picture.group,
        "subgroup": picture.subgroup,
        "skin": picture.skin,
        "dup_of": row.duplicate_of,
        "split": row.split,
        "width": SIZE,
        "height": SIZE,
    }


def write_shards(records: list[dict], folder: Path) -> None:
    """`00000.parquet`, ... of SHARD_ROWS rows in row groups of ROW_GROUP_ROWS."""
    folder.mkdir(parents=True)
    types = {"png": pyarrow.binary(), "width": pyarrow.int32(), "height": pyarrow.int32()}
    schema = pyarrow.schema([(column, types.get(column, pyarrow.string())) for column in COLUMNS])
    for shard, start in enumerate(range(0, len(records), SHARD_ROWS)):
        table = pyarrow.Table.from_pylist(records[start : start + SHARD_ROWS], schema)
        pyarrow.parquet.write_table(
            table, folder / f"{shard:05d}.parquet", row_group_size=ROW_GROUP_ROWS
        )


def credits() -> str:
    lines = [
        "Pictures in these shards, by source. They were built on this machine from npm packages; "
        "do not pass them on",
        "without reading the licences (OpenMoji is share-alike, Twemoji asks for attribution).",
        "",
    ]
    lines += [
        f"{source}: {p.credit}; npm {p.name} {p.version}; {p.license}"
        for source, p in PACKAGES.items()
    ]
    return "\n".join([*lines, ""])
