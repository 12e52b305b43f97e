"""The demo's data set, built from a handful of pictures that need no network."""

import random
from collections import Counter

import pyarrow.parquet
import pytest

from examples.demo.data import build, captions, packages, pictures
from examples.demo.data.build import PoolRecipe
from examples.demo.data.pictures import Picture
from examples.demo.data.render import Drawings

COLOURS = ("red", "green", "blue", "navy", "teal", "olive", "gold", "pink", "plum", "tan")


def svg(colour: str, radius: int) -> bytes:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 24 24">'
        f'<circle cx="12" cy="12" r="{radius}" fill="{colour}"/></svg>'
    ).encode()


def drawings(source: str, radius: int) -> list[Picture]:
    """Ten concepts by one vendor."""
    return [
        Picture(
            source,
            f"{source}/{colour}.svg",
            svg(colour, radius),
            "emoji",
            f"concept-{colour}",
            f"{colour} dot",
            ("round", "spot", "ball", "point", "disc", "circle"),
            "objects",
        )
        for colour in COLOURS
    ]


@pytest.fixture(scope="module")
def everything() -> list[Picture]:
    return [
        *drawings("openmoji", 4),
        *drawings("fluent/modern", 5),
        *drawings("google", 6),
        *drawings("fluent/flat", 7),
        *drawings("twitter", 8),
    ]


def recipe(seed: int = 1, zipf: float = 1.0) -> PoolRecipe:
    return PoolRecipe(rows=60, zipf=zipf, seed=seed)


def test_vendors_and_unseen_concepts_are_kept_apart(everything):
    sets = build.plan_sets(everything, recipe())
    assert {row.picture.source for row in sets["eval"]} == {"twitter"}
    assert {row.picture.source for row in sets["clean"]} == {"openmoji", "fluent/modern"}
    assert {row.picture.source for row in sets["pool"]} == {"google", "fluent/flat"}
    unseen = {row.picture.concept for row in sets["eval"] if row.split == "unseen"}
    trained = {row.picture.concept for name in ("clean", "pool") for row in sets[name]}
    assert len(unseen) == 1 and not unseen & trained


def test_the_same_seed_plans_the_same_rows(everything):
    def rows(seed):
        return [
            (row.picture.path, row.caption, row.kind)
            for row in build.plan_sets(everything, recipe(seed))["pool"]
        ]

    assert rows(3) == rows(3)
    assert rows(3) != rows(4)


def test_shards_are_img2dataset_parquet_and_no_picture_is_in_two_sets(everything, tmp_path):
    drawings = Drawings.of(everything, tmp_path, processes=1)
    counts = build.write_sets(
        build.plan_sets(everything, recipe()), drawings, tmp_path / "set", processes=1
    )
    seen: dict[str, set[bytes]] = {}
    for name, count in counts.items():
        files = sorted((tmp_path / "set" / name).glob("*.parquet"))
        assert [file.name for file in files] == ["00000.parquet"]
        table = pyarrow.parquet.read_table(files[0])
        assert table.num_rows == count and table.column_names == build.COLUMNS
        assert table.schema.field("png").type == "binary" and table["png"][0].as_py().startswith(
            b"\x89PNG"
        )
        assert len(set(table["key"].to_pylist())) == count
        seen[name] = set(table["png"].to_pylist())
    assert not seen["eval"] & (seen["clean"] | seen["pool"]) and not seen["clean"] & seen["pool"]


def test_row_groups_stay_small(tmp_path):
    records = [
        dict.fromkeys(build.COLUMNS, None) | {"key": str(i), "png": b"x", "caption": "c"}
        for i in range(600)
    ]
    build.write_shards(records, tmp_path / "s")
    groups = pyarrow.parquet.ParquetFile(tmp_path / "s" / "00000.parquet")
    assert [groups.metadata.row_group(i).num_rows for i in range(groups.num_row_groups)] == [
        256,
        256,
        88,
    ]


def test_a_few_concepts_fill_much_of_a_long_tailed_pool(everything):
    def shares(zipf):
        pool = build.plan_sets(everything, PoolRecipe(rows=3000, zipf=zipf))["pool"]
        return sorted(
            (count / len(pool) for count in Counter(row.picture.concept for row in pool).values()),
            reverse=True,
        )

    harmonic = sum(1 / rank for rank in range(1, 10))
    assert shares(1.0)[:3] == pytest.approx([1 / rank / harmonic for rank in range(1, 4)], abs=0.03)
    assert shares(0.0) == pytest.approx([1 / 9] * 9, abs=0.03)


def test_what_is_drawn_again_is_a_near_duplicate(everything, tmp_path):
    sets = build.plan_sets(everything, recipe())
    firsts = [row.picture.path for row in sets["pool"] if row.duplicate_of is None]
    assert len(firsts) == len(set(firsts)) < len(sets["pool"])
    build.write_sets(
        sets, Drawings.of(everything, tmp_path, processes=1), tmp_path / "set", processes=1
    )
    rows = pyarrow.parquet.read_table(tmp_path / "set" / "pool").to_pylist()
    images = {row["png"] for row in rows if row["dup_of"]}
    assert len(images) > 0.9 * sum(row["dup_of"] is not None for row in rows)
    assert not images & {row["png"] for row in rows if row["dup_of"] is None}


def test_pictures_are_drawn_once(everything, tmp_path, monkeypatch):
    first = Drawings.of(everything, tmp_path, processes=1)

    def drawn_again(*_):
        raise AssertionError("pictures were drawn again")

    monkeypatch.setattr("examples.demo.data.render.render", drawn_again)
    assert Drawings.of(everything, tmp_path, processes=1).drawn == first.drawn


def test_captions_go_wrong_as_often_as_they_should(everything):
    rng, pool = random.Random(0), drawings("google", 6)
    drawn = [
        (picture, *captions.draw(picture, lambda: rng.choice(pool), 0.53, rng))
        for picture in pool
        for _ in range(400)
    ]
    shares = Counter(kind for _, kind, _ in drawn)
    for kind, share in {"clean": 0.38, "shuffled": 0.40, "junk": 0.13, "truncated": 0.09}.items():
        assert shares[kind] / len(drawn) == pytest.approx(share, abs=0.03)
    for picture, kind, caption in drawn:
        assert (picture.name in caption) == (kind == "clean") or kind in ("truncated", "junk")


def test_a_fluent_file_name_is_a_name_with_or_without_a_skin_tone():
    table = pictures.Unicode.__new__(pictures.Unicode)
    base = {
        "skintone_base_hexcode": "",
        "tags": "",
        "openmoji_tags": "",
        "group": "g",
        "subgroups": "s",
    }
    table.by_slug = {
        "traffic-light": {**base, "annotation": "traffic light", "hexcode": "1F6A5"},
        "waving-hand": {**base, "annotation": "waving hand", "hexcode": "1F44B"},
    }
    assert pictures.fluent_name("traffic-light", table)["skin"] == ""
    dark = pictures.fluent_name("waving-hand-medium-dark", table)
    assert (dark["concept"], dark["name"], dark["skin"]) == (
        "1F44B",
        "waving hand: medium-dark skin tone",
        "medium-dark",
    )
    assert pictures.fluent_name("waving-hand-default", table)["name"] == "waving hand"
    assert pictures.fluent_name("odd-thing-light", table)["concept"] == "fluent:odd-thing"


def test_variation_selectors_do_not_make_another_concept():
    assert pictures.hexcode("0023-fe0f-20e3") == pictures.hexcode("0023-20E3")


def test_other_bytes_than_the_pinned_ones_are_thrown_away(tmp_path, monkeypatch):
    package = packages.PACKAGES["openmoji"]

    def other_bytes(command, **_):
        (tmp_path / package.archive).write_bytes(b"something else")
        return packages.subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(packages.subprocess, "run", other_bytes)
    with pytest.raises(packages.DemoError, match="pinned"):
        packages.download(package, tmp_path)
    assert not (tmp_path / package.archive).exists()


def test_missing_npm_is_said_plainly(tmp_path, monkeypatch):
    monkeypatch.setattr(packages.shutil, "which", lambda name: None)
    with pytest.raises(packages.DemoError, match="npm is missing"):
        packages.fetch(tmp_path)
