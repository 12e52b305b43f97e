"""Reads the packages into one list of pictures with the names that people gave them."""

import json
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .packages import PACKAGES, members

SKINS = ("medium-light", "medium-dark", "light", "medium", "dark")
TONES = {
    "1F3FB": "light",
    "1F3FC": "medium-light",
    "1F3FD": "medium",
    "1F3FE": "medium-dark",
    "1F3FF": "dark",
}


@dataclass(frozen=True)
class Picture:
    """One drawing. `concept` is the same for all vendors' drawings of one thing, skin tones
    apart.
    """

    source: str
    path: str
    data: bytes
    domain: str
    concept: str
    name: str
    tags: tuple[str, ...] = ()
    group: str = ""
    subgroup: str = ""
    skin: str = ""

    @property
    def license(self) -> str:
        return PACKAGES[self.source.split("/")[0]].license

    @property
    def is_svg(self) -> bool:
        return self.path.endswith(".svg")


def slug(text: str) -> str:
    plain = (
        unicodedata.normalize("NFKD", text)
        .encode("ascii", "ignore")
        .decode()
        .lower()
        .replace("'", "")
    )
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")


def hexcode(text: str) -> str:
    """A code point sequence without its variation selectors, which vendors write or not as they
    please.
    """
    return "-".join(part for part in text.upper().split("-") if part != "FE0F")


def split_tags(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(tag.strip().lower() for tag in text.split(",") if tag.strip()))


class Unicode:
    """What OpenMoji's table says about each emoji: name, keywords, group and base concept."""

    def __init__(self, archive: Path):
        ((_, table),) = members(archive, lambda path: path == "data/openmoji.json")
        self.records = {hexcode(record["hexcode"]): record for record in json.loads(table)}
        bases = [
            r
            for r in self.records.values()
            if not r["skintone"] and not r["group"].startswith("extras")
        ]
        self.by_slug = {slug(record["annotation"]): record for record in bases}

    def describe(self, record: dict, skin: str = "") -> dict:
        base = hexcode(record["skintone_base_hexcode"] or record["hexcode"])
        name = record["annotation"].lower()
        if skin and "skin tone" not in name:
            name = f"{name}: {skin} skin tone"
        return {
            "concept": base,
            "name": name,
            "tags": split_tags(f"{record['tags']},{record['openmoji_tags']}"),
            "group": record["group"],
            "subgroup": record["subgroups"],
            "skin": skin,
        }


def openmoji(archive: Path, table: Unicode) -> Iterator[Picture]:
    for path, data in members(archive, lambda path: path.startswith("color/svg/")):
        record = table.records.get(hexcode(Path(path).stem))
        if record is not None:
            skin = "toned" if record["skintone"] else ""
            yield Picture(
                "openmoji", path, data, "emoji", **{**table.describe(record), "skin": skin}
            )


def fluent(archive: Path, table: Unicode) -> Iterator[Picture]:
    for path, data in members(
        archive, lambda path: path.startswith("icons/") and path.endswith(".svg")
    ):
        _, style, file = path.split("/")
        yield Picture(
            f"fluent/{style}", path, data, "emoji", **fluent_name(file.removesuffix(".svg"), table)
        )


def fluent_name(stem: str, table: Unicode) -> dict:
    """`traffic-light` is a name that ends like a skin tone, so whole names are looked up first."""
    skin = ""
    if stem not in table.by_slug:
        for ending in (*SKINS, "default"):
            if stem.endswith(f"-{ending}"):
                stem, skin = stem.removesuffix(f"-{ending}"), "" if ending == "default" else ending
                break
    if stem in table.by_slug:
        return table.describe(table.by_slug[stem], skin)
    name = stem.replace("-", " ")
    return {
        "concept": f"fluent:{stem}",
        "name": f"{name}: {skin} skin tone" if skin else name,
        "skin": skin,
    }


def emoji_data(source: str, archive: Path, table: Unicode) -> Iterator[Picture]:
    """The sheets of emoji-data, one PNG a picture: `google` and `twitter`."""
    named = {}
    ((_, records),) = members(archive, lambda path: path == "emoji.json")
    for record in json.loads(records):
        named[record["image"]] = (
            record["unified"],
            record["name"] or record["short_name"].replace("_", " "),
        )
        for variation in record.get("skin_variations", {}).values():
            named[variation["image"]] = (variation["unified"], record["name"])
    for path, data in members(
        archive, lambda path: path.startswith(f"img/{source}/64/") and path.endswith(".png")
    ):
        unified, name = named.get(Path(path).name, (None, None))
        if unified is None:
            continue
        record = table.records.get(hexcode(unified))
        skin = next((TONES[part] for part in unified.split("-") if part in TONES), "")
        about = (
            table.describe(record, skin)
            if record
            else {"concept": hexcode(unified), "name": name.lower(), "skin": skin}
        )
        yield Picture(source, path, data, "emoji", **about)


def read_all(archives: dict[str, Path]) -> list[Picture]:
    """Every usable picture of every package, in a fixed order."""
    table = Unicode(archives["openmoji"])
    readers = [
        openmoji(archives["openmoji"], table),
        fluent(archives["fluent"], table),
        emoji_data("google", archives["google"], table),
        emoji_data("twitter", archives["twitter"], table),
    ]
    return [
        picture
        for reader in readers
        for picture in sorted(reader, key=lambda picture: picture.path)
    ]
