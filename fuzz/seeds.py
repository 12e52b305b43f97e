"""Writes fuzz/seeds anew: small inputs by the writers whose files are read. What lay there before
is deleted; what was found or made by hand lies in fuzz/found.

    .venv/bin/python fuzz/seeds.py

What a target is given before a file (which of several, or what is asked of it) is a byte or two, as
`server/src/fuzzing/` and `fuzz/src/targets.rs` take them.
"""

import io
import json
import struct
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.numpy
from messages import facts, kinds, packs, parts, receipts, requests
from PIL import Image

ROOT = Path(__file__).parent

PATTERNS = [
    "s3://bucket/laion/{00000..00041}.parquet",
    "memory:///data/{train,val/{0..3}}-*.tar",
    "file:///my%20data/x-[0-9a].parquet::file:///other/**/*.parquet",
    "gs://b/a/::gs://b/a::gs://b/c//d",
    "memory:///a.tar::memory://b.tar",
    "https://example.org/pool/{0..10..5}.tar",
    "az://b/%5Bx%5D?.tar",
    "memory:///data",
]

PREDICATES = [
    "similarity > 0.3 and language in ('en', 'de')",
    'not (a = 1 or b <> -2.5e-3) and "c d" is not null',
    "0 < n and n between 1 and 18446744073709551615 or t is null",
    "json[caption] = 'it''s' and nsfw = false",
    "a not in (1, 2.0) or not not b >= 1",
    "a = 1 or a = 2 and (a = 3 or a = 4) and a = 5",
]

CONFIGS = [
    "",
    "listen: 127.0.0.1:0\nstate: s3://bucket/superbatch\ncoordinator:\n  lease_seconds: 9\n",
    "storage:\n  allow_uris: [memory:///]\n  options: {aws_region: eu-west-1, allow_http: true}\n"
    "log: {format: json, filter: debug}\n",
    "SUPERBATCH_COORDINATOR__MAX_RUNS=7\nAWS_REGION=y\n"
    "\0coordinator: {grace_seconds: 1.5}\nmetrics_listen: null\n",
    "allow_insecure: true\nlisten: 0.0.0.0:50051\nstorage: {allow_uris: ['s3://b']}\n",
]

HASH = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
TOKENS = [
    f"tokens:\n- name: trainer\n  sha256: {HASH}\n  scopes: [open, select, push]\n"
    "  runs: ['team-a-*', '*x*y']\n  expires: 2027-01-31T00:00:00Z\n",
    f"tokens: [{{name: a, sha256: {HASH.upper()}, scopes: [admin, worker]}}]\n",
]


def after(first: int, data: bytes) -> bytes:
    return bytes([first]) + data


def texts(all: list[str]) -> dict[str, bytes]:
    return {f"{n:02}": text.encode() for n, text in enumerate(all)}


def tar(members: list[tuple[str, bytes]], form: int) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    # Python fills a tar up to 10 KiB; two records of zeros are its end.
    whole = file.getvalue()
    end = len(whole.rstrip(b"\0")) + 511 & ~511
    return whole[:end] + bytes(1024)


def tars() -> dict[str, bytes]:
    members = []
    for n in range(3):
        entries = {"caption": f"caption {n}", "n": n, "key": f"{n:03}"}
        contents = {"jpg": b"image", "json": json.dumps(entries).encode(), "txt": b"caption"}
        members += [(f"{n:03}.{ending}", content) for ending, content in contents.items()]
    plain = tar(members, tarfile.USTAR_FORMAT)
    jsons = ['{"caption": ["a", null, "b"]}', "", '{"caption": [], "n": 7}']
    lists = []
    for n, text in enumerate(jsons):
        lists += [(f"{n}.png", b"i"), (f"{n}.json", text.encode())]
    long = [(f"{'d' * 120}/0001.jpg", b"image"), (f"{'d' * 120}/0001.txt", b"caption")]
    other = [("näme.jpg", b"image"), ("näme.txt", b"three")]
    return {
        "plain": after(0, plain),
        "filtered": after(4, plain),
        "json": after(2 | 4, plain),
        "lists": after(2 | 8, tar(lists, tarfile.GNU_FORMAT)),
        "long": after(0, tar(long, tarfile.GNU_FORMAT)),
        "pax": after(0, tar(other, tarfile.PAX_FORMAT)),
        "cut": after(1, plain[: len(plain) - 1700]),
    }


def parquet(table: pa.Table, **options) -> bytes:
    file = io.BytesIO()
    pq.write_table(table, file, **options)
    return file.getvalue()


def downloads() -> pa.Table:
    """As img2dataset writes it; the second row's download failed."""
    return pa.table(
        {
            "n": pa.array([1, 2, None, 7], pa.int64()),
            "caption": ["a caption", "b", "c", "a caption"],
            "status": ["success", "failed_to_download", "success", "success"],
            "error_message": pa.array([None, "404", None, None], pa.string()),
            "similarity": [0.3, float("nan"), 0.1, 0.5],
            "jpg": pa.array([b"image 0", None, b"image 2", b"image 3"], pa.binary()),
        }
    )


def photos() -> pa.Table:
    """As Hugging Face datasets writes it, with several captions a row."""
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = [{"bytes": b"one", "path": None}, {"bytes": b"two", "path": None}]
    table = pa.table(
        {
            "photo": pa.array(images, image),
            "caption": pa.array([["a", None, "bc"], None], pa.list_(pa.string())),
        }
    )
    features = {"info": {"features": {"photo": {"_type": "Image"}}}}
    return table.replace_schema_metadata({"huggingface": json.dumps(features)})


def by_path(rows: int) -> pa.Table:
    """Rows whose images lie beside them, some nowhere."""
    paths = ["a.jpg", "gone.jpg", "../a.jpg", None, "./a.jpg", "https://x.org/a.jpg", ""]
    captions = ["a caption", "b", None]
    return pa.table(
        {
            "file_name": pa.array([paths[row % len(paths)] for row in range(rows)], pa.string()),
            "caption": pa.array([captions[row % 3] for row in range(rows)], pa.string()),
            "n": pa.array([row % 9 for row in range(rows)], pa.int64()),
        }
    )


def hinted() -> pa.Schema:
    """Columns as they were before they were written, by which readers give them back."""
    number = pa.int64()
    runs = pa.run_end_encoded(pa.int32(), number)
    return pa.schema(
        {
            "jpg": pa.large_binary(),
            "caption": pa.dictionary(pa.int8(), pa.string()),
            "n": pa.timestamp("us", "UTC"),
            "both": pa.struct({"n": pa.duration("s")}),
            "list": pa.list_(pa.int32(), 2),
            "runs": runs,
            "either": pa.dense_union([pa.field("a", number), pa.field("b", pa.string())]),
        }
    )


def photos_by_path() -> pa.Table:
    """As Hugging Face datasets writes images that it has not embedded, and one that it has."""
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = [{"bytes": None, "path": "a.jpg"}, {"bytes": b"two", "path": "gone.jpg"}, None]
    return pa.table({"image": pa.array(images, image), "caption": ["a", "b", "c"]})


def parquets() -> dict[str, bytes]:
    plain = {"compression": "none", "use_dictionary": False}
    return {
        "plain": after(0, parquet(downloads(), row_group_size=2, **plain)),
        "filtered": after(4, parquet(downloads(), row_group_size=2, **plain)),
        "dictionary": after(4, parquet(downloads(), compression="snappy")),
        "photos": after(0, parquet(photos(), row_group_size=1, **plain)),
        "zstd": after(8, parquet(photos(), compression="zstd", data_page_version="2.0")),
        "paths": after(16, parquet(by_path(7), row_group_size=4, **plain)),
        "cut": after(4 | 16, parquet(by_path(1100), compression="snappy")),
        "photo_paths": after(16, parquet(photos_by_path(), **plain)),
        "schema": after(32, bytes(hinted().serialize())),
    }


def lists() -> dict[str, bytes]:
    npy = io.BytesIO()
    np.save(npy, np.array([(1, 2), (3, 4)], np.dtype("u8,u8")))
    ids = pa.table({"uid": ["00ff", "a", "a"]})
    uris = "memory:///data/0.parquet\n\n0.parquet\nmemory:///data/{0..2}*\n"
    return {
        "npy": after(0, npy.getvalue()),
        "ids": after(1, parquet(ids, compression="none", use_dictionary=False)),
        "uris": after(2, uris.encode()),
    }


def weights() -> dict[str, bytes]:
    tensors = {
        "a.weight": np.array([[1, -1], [2, 0]], np.float16),
        "b.bias": np.array(1, np.float32),
        "position_ids": np.array([7], np.int64),
    }
    return {"two": safetensors.numpy.save(tensors)}


def stream(*tables: pa.Table) -> bytes:
    file = io.BytesIO()
    with pa.ipc.new_stream(file, tables[0].schema) as writer:
        for table in tables:
            writer.write_table(table)
    return file.getvalue()


def sent(rows: list[int], text: str) -> pa.Table:
    """Rows as a worker or a coordinator sends them."""
    values = [f"{text} {n}" if n % 3 else None for n in rows]
    hashes = pa.array([bytes([n]) * 16 for n in rows], pa.binary(16))
    images = pa.array([value and value.encode() for value in values], pa.binary())
    return pa.table(
        {text: pa.array(values, pa.string()), "image": images, "_superbatch_content_hash": hashes}
    )


def kinds_of_columns() -> pa.Table:
    """Columns of the kinds that Parquet has, in lists and structs too."""
    text = ["a", None, "a text that is too long for a view"]
    return pa.table(
        {
            "bool": [True, None, False],
            "none": pa.nulls(3),
            "large": pa.array(text, pa.large_string()),
            "view": pa.array(text, pa.string_view()),
            "bytes": pa.array([b"x", b"", None], pa.binary_view()),
            "decimal": pa.array([1, None, 2], pa.decimal128(9, 2)),
            "time": pa.array([1, 2, None], pa.timestamp("ms", "UTC")),
            "list": pa.array([[1, None], [], None], pa.large_list(pa.int16())),
            "lists": pa.array([[["a"], []], None, [None]], pa.list_(pa.list_(pa.string()))),
            "fixed": pa.array([[1, 2], None, [3, 4]], pa.list_(pa.float32(), 2)),
            "views": pa.array([["a"], None, []], pa.list_view(pa.string())),
            "map": pa.array([[("k", 1)], [], None], pa.map_(pa.string(), pa.int8())),
            "struct": pa.array(
                [{"a": 1, "b": [b"c"]}, None, {}],
                pa.struct([("a", pa.float16()), ("b", pa.list_(pa.binary(1)))]),
            ),
        }
    )


def rows() -> dict[str, bytes]:
    head = bytes([3, 100])
    seeds = {"three": head + stream(sent([1, 2], "caption"), sent([3], "caption"))}
    kinds = kinds_of_columns()
    for n in range(0, kinds.num_columns - 2, 3):
        some = kinds.select([n, n + 1, n + 2]).rename_columns(["image", "caption", "n"])
        seeds[f"kinds{n}"] = head + stream(some.slice(0, 2), some.slice(2))
    return seeds


def streams() -> dict[str, bytes]:
    own = stream(sent([3, 2, 1], "_superbatch_id"))
    theirs = stream(sent([1, 2], "caption"), sent([3], "caption"))
    return {
        "batch": after(0, theirs),
        "photos": after(0, stream(photos())),
        "kinds": after(0, stream(kinds_of_columns())),
        "categories": after(0, stream(pa.table({"a": pa.array(["b"]).dictionary_encode()}))),
        "rows": after(1, struct.pack("<H", len(own)) + own + theirs),
    }


def images() -> dict[str, bytes]:
    values = np.arange(16 * 12 * 3, dtype=np.uint16).reshape(12, 16, 3)
    picture = Image.fromarray((values * 7 % 256).astype(np.uint8))
    alpha = picture.copy()
    alpha.putalpha(100)
    turned = Image.Exif()
    turned[0x0112] = 6

    def encoded(image: Image.Image, form: str, **options) -> bytes:
        file = io.BytesIO()
        image.save(file, form, **options)
        return file.getvalue()

    return {
        "rgb.png": encoded(picture, "PNG"),
        "grey.png": encoded(alpha.convert("LA"), "PNG", exif=turned),
        "rgb.jpg": encoded(picture, "JPEG", exif=turned),
        "steps.jpg": encoded(picture, "JPEG", progressive=True),
        "cmyk.jpg": encoded(picture.convert("CMYK"), "JPEG"),
        "rgb.gif": encoded(picture.convert("P"), "GIF"),
        "rgb.bmp": encoded(picture, "BMP"),
        "rgb.tiff": encoded(picture, "TIFF"),
        "lossy.webp": encoded(picture, "WEBP", exif=turned),
        "alpha.webp": encoded(alpha, "WEBP", lossless=True),
        "moves.webp": encoded(picture, "WEBP", save_all=True, append_images=[alpha]),
        "lying.webp": lying_webp(encoded(picture, "WEBP", lossless=True)),
    }


def lying_webp(file: bytes) -> bytes:
    """A picture whose metadata claim 4 GiB."""
    size = struct.pack("<HBHB", 15, 0, 11, 0)
    extended = b"VP8X" + struct.pack("<II", 10, 8) + size
    chunks = b"WEBP" + extended + file[12:] + b"EXIF" + struct.pack("<I", 0xFFFFFFFE) + b"II*\0"
    return b"RIFF" + struct.pack("<I", len(chunks)) + chunks


def main(folder: Path) -> None:
    targets = {
        "tar": tars(),
        "parquet": parquets(),
        "lists": lists(),
        "uri_pattern": texts(PATTERNS),
        "predicate": texts(PREDICATES),
        "safetensors": weights(),
        "parts": parts(),
        "rows": rows(),
        "receipt": receipts(parquet),
        "pack": packs(parquet),
        "facts": facts(),
        "config": texts(CONFIGS),
        "tokens": texts(TOKENS),
        "requests": requests(),
        "message": kinds(),
        "arrow_ipc": streams(),
        "image": images(),
    }
    for target, seeds in targets.items():
        (folder / target).mkdir(parents=True, exist_ok=True)
        for old in (folder / target).iterdir():
            old.unlink()
        for name, content in seeds.items():
            (folder / target / name).write_bytes(content)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "seeds")
