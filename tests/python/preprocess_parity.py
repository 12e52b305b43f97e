"""Writes images, and what Pillow and transformers make of them, for
server/tests/preprocess_parity.rs.

Usage: preprocess_parity.py FOLDER. The folder gets `cases.json`, the image files, and the expected
arrays as raw bytes.
"""

import io
import json
import sys
from pathlib import Path

import numpy as np
from open_clip.tokenizer import HFTokenizer, SimpleTokenizer
from PIL import Image, ImageOps
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    CLIPImageProcessor,
    PreTrainedTokenizerFast,
    Siglip2ImageProcessor,
    SiglipConfig,
    SiglipImageProcessor,
)

PROCESSORS = {
    "siglip": SiglipImageProcessor(size={"height": 24, "width": 24}),
    "siglip_bilinear": SiglipImageProcessor(size={"height": 40, "width": 28}, resample=2),
    "clip": CLIPImageProcessor(size={"shortest_edge": 24}, crop_size=24),
    "clip_odd": CLIPImageProcessor(
        size={"shortest_edge": 37}, crop_size={"height": 24, "width": 31}
    ),
    "clip_padded": CLIPImageProcessor(
        size={"shortest_edge": 15}, crop_size={"height": 24, "width": 20}, resample=2
    ),
    "siglip2": Siglip2ImageProcessor(patch_size=8, max_num_patches=14),
    "siglip2_bicubic": Siglip2ImageProcessor(patch_size=6, max_num_patches=30, resample=3),
}
SIZES = [(1, 1), (7, 300), (300, 7), (16, 16), (33, 25), (64, 48), (131, 97), (3, 3), (1, 40)]
CAPTIONS = [
    "",
    "a photo of a cat",
    "A Photo, of THE Cat!!!",
    "  spaces\t and\nlines  ",
    "naïve café, Ünïcödé",
    "emoji 🐈‍⬛ and 漢字",
    "word " * 50,
    "</s> special <s> text <pad>",
    "0123456789" * 9,
]

#: What the web has, of which ftfy and html.unescape mend some.
HOSTILE = [
    *CAPTIONS[:-2],
    "a dog\u2019s house &amp; garden",
    "\u201cquoted\u201d \u2018single\u2019 \u02bcn \u201elow\u201f",
    "&lt;b&gt;bold&lt;/b&gt; &amp;lt; &amp;amp;amp; &copy 2020 &notit; &nosuch; &",
    "<p>Fish &amp;amp; chips</p>\n&amp;amp; more",
    "caf&eacute; CAF&EACUTE; STRA&SZLIG;E &#233; &#xe9; &#128; &#x1F600; &#0; &#99999999;",
    "this&not that &ampere &#12ab; &#; &#x;",
    "\ufb02u\ufb03e\ufb06 \u0149 \u01c4 \u0132",
    "\uff2c\uff2f\uff35\uff24\u3000\uff2e\uff2f\uff29\uff33\uff25 \uff80\uff9e \uffe3",
    "e\u0301 n\u0303 A\u030a \u1112\u1161\u11ab \u0958",
    "one\r\ntwo\rthree\u2028four\u2029five\x0bsix\x0cseven",
    "\x1b[36;44mblue\x1b[0m \x1b[x \x07bell\x7f\ufeff \ufffc",
    "non\xa0breaking\u200bzero\u2003wide\u202fnarrow\u00ad",
    "\u0130stanbul \u039f\u0394\u039f\u03a3 STRASSE \u1e9e",
    "snake_case __init__ $5.00 50% #tag @user (c) [x] {y} ~`^|\\",
    "it's they're I'VE we'll 'tis '' \"\"",
    "12345 3\u00bd x\u00b2 \u2460 \u0663\u0664",
    "\u2026\u2014\u2013\u2022\u2122 na\u00efve r\u00e9sum\u00e9 \U0001f469\u200d\U0001f52c",
]


def smooth(rng, width, height):
    """A photograph's stand-in: gradients, a disc and mild noise."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    planes = [
        np.sin(x / (5 + 3 * c) + c) * 60 + np.cos(y / (7 + 2 * c)) * 60 + 128 for c in range(3)
    ]
    disc = ((x - width / 2) ** 2 + (y - height / 2) ** 2 < (min(width, height) / 3) ** 2)[..., None]
    image = np.stack(planes, -1) * np.where(disc, 0.6, 1.0) + rng.normal(0, 4, (height, width, 3))
    return image.clip(0, 255).astype(np.uint8)


def noise(rng, width, height):
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def edges(rng, width, height):
    """Black and white: where bicubic overshoots most."""
    return np.repeat(rng.integers(0, 2, (height, width, 1), dtype=np.uint8) * 255, 3, axis=2)


def encoded(image, kind, **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def alpha_of(rng, width, height):
    alpha = rng.integers(0, 256, (height, width), dtype=np.uint8)
    alpha[rng.random((height, width)) < 0.3] = 0
    alpha[rng.random((height, width)) < 0.3] = 255
    return alpha


def png16(array):
    """A 16-bit PNG with any number of channels, which Pillow reads but does not write."""
    import struct
    import zlib

    height, width, channels = array.shape
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    chunk = lambda tag, data: (
        struct.pack(">I", len(data)) + tag + data + struct.pack(">I", zlib.crc32(tag + data))
    )
    header = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def lossless(rng, width, height):
    for make in (smooth, noise, edges):
        image = Image.fromarray(make(rng, width, height))
        yield f"png-rgb-{make.__name__}", encoded(image, "PNG")
        yield f"webp-lossless-{make.__name__}", encoded(image, "WEBP", lossless=True)
    image = Image.fromarray(smooth(rng, width, height))
    rgba = image.copy()
    rgba.putalpha(Image.fromarray(alpha_of(rng, width, height)))
    grey = image.convert("L")
    yield "png-rgba", encoded(rgba, "PNG")
    yield "png-la", encoded(Image.merge("LA", [grey, rgba.getchannel("A")]), "PNG")
    yield "png-grey", encoded(grey, "PNG")
    yield "png-grey-transparent", encoded(grey, "PNG", transparency=int(np.array(grey)[0, 0]))
    yield (
        "png-rgb-transparent",
        encoded(image, "PNG", transparency=tuple(int(v) for v in np.array(image)[0, 0])),
    )
    yield "png-bilevel", encoded(grey.convert("1"), "PNG")
    yield "png-palette", encoded(image.quantize(13), "PNG")
    palette = image.quantize(7)
    yield "png-palette-transparent", encoded(palette, "PNG", transparency=bytes(range(0, 252, 36)))
    yield "png-interlaced-exif", encoded(image, "PNG", exif=orientation(6))
    for channels in (1, 2, 3, 4):
        yield f"png16-{channels}", png16(rng.integers(0, 65536, (height, width, channels)))
    yield "png16-dark", png16(rng.integers(0, 400, (height, width, 1)))
    yield "webp-rgba-lossless", encoded(rgba, "WEBP", lossless=True, exact=True)
    yield "webp-exif", encoded(image, "WEBP", lossless=True, exif=orientation(8))


def lossy_webp(rng, width, height):
    image = Image.fromarray(smooth(rng, width, height))
    yield "webp-q80", encoded(image, "WEBP", quality=80)
    yield "webp-q30-noise", encoded(Image.fromarray(noise(rng, width, height)), "WEBP", quality=30)
    other = Image.fromarray(edges(rng, width, height))
    yield (
        "webp-animation-q80",
        encoded(image, "WEBP", quality=80, save_all=True, append_images=[other]),
    )
    image.putalpha(Image.fromarray(alpha_of(rng, width, height)))
    yield "webp-rgba-q80", encoded(image, "WEBP", quality=80)
    yield (
        "webp-rgba-animation",
        encoded(image, "WEBP", lossless=True, save_all=True, append_images=[other]),
    )


def others(rng, width, height):
    """GIF, BMP and TIFF, of which the first frame or page counts."""
    image = Image.fromarray(smooth(rng, width, height))
    other = Image.fromarray(edges(rng, width, height))
    grey, palette = image.convert("L"), image.quantize(13)
    rgba = image.copy()
    rgba.putalpha(Image.fromarray(alpha_of(rng, width, height)))
    yield "gif-palette", encoded(palette, "GIF")
    yield "gif-grey", encoded(grey, "GIF")
    yield "gif-transparent", encoded(palette, "GIF", transparency=3)
    yield "gif-animation", encoded(image, "GIF", save_all=True, append_images=[other])
    yield "bmp-rgb", encoded(image, "BMP")
    yield "bmp-grey", encoded(grey, "BMP")
    yield "bmp-palette", encoded(palette, "BMP")
    yield "bmp-bilevel", encoded(grey.convert("1"), "BMP")
    yield "tiff-rgb", encoded(image, "TIFF")
    yield "tiff-grey", encoded(grey, "TIFF")
    yield "tiff-rgba", encoded(rgba, "TIFF")
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits"):
        yield f"tiff-{compression}", encoded(image, "TIFF", compression=compression)
    yield "tiff-turned", encoded(image, "TIFF", tiffinfo={0x0112: 6})


def jpegs(rng, width, height):
    image = Image.fromarray(smooth(rng, width, height))
    for quality in (30, 75, 95):
        for subsampling in (0, 1, 2):
            yield (
                f"jpeg-q{quality}-s{subsampling}",
                encoded(image, "JPEG", quality=quality, subsampling=subsampling),
            )
    yield "jpeg-progressive", encoded(image, "JPEG", progressive=True, quality=85)
    yield "jpeg-grey", encoded(image.convert("L"), "JPEG")
    yield "jpeg-cmyk", encoded(image.convert("CMYK"), "JPEG", quality=90)
    yield (
        "jpeg-noise",
        encoded(Image.fromarray(noise(rng, width, height)), "JPEG", quality=90, subsampling=0),
    )
    for tag in range(1, 9):
        yield (
            f"jpeg-exif{tag}",
            encoded(image, "JPEG", quality=90, subsampling=0, exif=orientation(tag)),
        )
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><r tiff:Orientation="3"/></x:xmpmeta>'
    yield "jpeg-xmp", encoded(image, "JPEG", quality=90, subsampling=0, xmp=xmp)


def orientation(tag):
    exif = Image.Exif()
    exif[0x0112] = tag
    return exif.tobytes()


def on_white(data):
    """The definition: oriented, then pasted through its alpha onto white."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        canvas = Image.new("RGB", image.size, (255, 255, 255))
        canvas.paste(image, mask=image.getchannel("A"))
        return canvas
    return image.convert("RGB")


def processed(processor, rgb, **options):
    # The channel order is stated: for an image of 1 or 3 rows transformers would guess wrong.
    if not isinstance(processor, Siglip2ImageProcessor):
        options["data_format"] = "channels_last"
    found = processor(
        rgb,
        input_data_format="channels_last",
        return_tensors="np",
        **options,
    )
    pixels = found["pixel_values"][0]
    # Patches are padded later, on the way to the device.
    return pixels[found["pixel_attention_mask"][0] == 1] if pixels.ndim == 2 else pixels


def write_images(folder, rng):
    cases = []
    for width, height in SIZES:
        groups = (
            ("lossless", lossless),
            ("webp", lossy_webp),
            ("jpeg", jpegs),
            ("lossless", others),
        )
        for group, make in groups:
            for name, data in make(rng, width, height):
                name = f"{name}-{width}x{height}"
                rgb = on_white(data)
                (folder / name).write_bytes(data)
                (folder / f"{name}.rgb").write_bytes(np.array(rgb).tobytes())
                for key, processor in PROCESSORS.items():
                    pixels = processed(processor, rgb, do_rescale=False, do_normalize=False)
                    assert pixels.dtype == np.uint8, pixels.dtype
                    (folder / f"{name}.{key}").write_bytes(pixels.tobytes())
                cases.append(
                    {"name": name, "group": group, "width": rgb.width, "height": rgb.height}
                )
    return cases


def write_processors(folder, rng):
    rgb = Image.fromarray(smooth(rng, 50, 40))
    (folder / "normalised.png").write_bytes(encoded(rgb, "PNG"))
    for key, processor in PROCESSORS.items():
        processor.save_pretrained(folder / key)
        (folder / f"normalised.{key}").write_bytes(
            processed(processor, rgb).astype("<f4").tobytes()
        )
    return list(PROCESSORS)


def write_tokenizer(folder):
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<unk>", "<pad>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(CAPTIONS + ["the quick brown fox jumps over the lazy dog"] * 9, trainer)
    ends = [(token, bpe.token_to_id(token)) for token in ("<s>", "</s>")]
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        sep_token="</s>",
    )
    tokenizer.save_pretrained(folder / "tokenizer")
    length = 16
    ids = tokenizer(CAPTIONS, padding="max_length", truncation=True, max_length=length)["input_ids"]
    shape = {"length": length, "pad_id": tokenizer.pad_token_id, "eos_id": tokenizer.eos_token_id}
    return {**shape, "vocab_size": len(tokenizer), "captions": CAPTIONS, "ids": ids}


def write_open_clip(folder, length):
    """What open_clip's two kinds of tokenizers make of hostile captions, cleaned as they do it."""
    path = str(folder / "tokenizer")
    cases = []
    for clean, strips in (
        ("whitespace", False),
        ("lower", False),
        ("canonicalize", False),
        ("whitespace", True),
    ):
        own = HFTokenizer(path, context_length=length, clean=clean, strip_sep_token=strips)
        ids = own(HOSTILE).tolist()
        cases.append({"clean": clean, "strips": strips, "captions": HOSTILE, "ids": ids})
    own = SimpleTokenizer()
    write_built_in(folder / "built_in", own)
    ids = own(HOSTILE).tolist()
    cases.append({"clean": "built_in", "strips": False, "captions": HOSTILE, "ids": ids})
    return cases


def write_built_in(folder, own):
    """The vocabulary of open_clip's built-in tokenizer, as CLIP's older folders have it."""
    folder.mkdir()
    named = {own.sot_token_id: "<|startoftext|>", own.eot_token_id: "<|endoftext|>"}
    vocabulary = {named.get(id, token): id for token, id in own.encoder.items()}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    merges = sorted(own.bpe_ranks, key=own.bpe_ranks.get)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines))
    config = {"model_cfg": {"embed_dim": 512}, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))


def write_siglip2(folder):
    """A SigLIP 2 of one size: a tokenizer like Gemma's, and no padding in its configuration."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Replace(" ", "\u2581")
    made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=pieces, show_progress=False)
    made.train_from_iterator(["a photo of a cat", "the quick brown fox"] * 9, trainer)
    made.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", special.index("<eos>"))]
    )
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, padding_side="right", **names)
    tokenizer.save_pretrained(folder)
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    tower["num_attention_heads"] = 2
    config = SiglipConfig(
        vision_config={**tower, "image_size": 16, "patch_size": 8},
        text_config={**tower, "vocab_size": len(tokenizer), "max_position_embeddings": 64},
    ).to_dict()
    for part in (config, config["text_config"]):
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            part.pop(name, None)
    (folder / "config.json").write_text(json.dumps(config))
    SiglipImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    found = tokenizer(CAPTIONS, padding="max_length", truncation=True, max_length=64)
    return {"captions": CAPTIONS, "ids": found["input_ids"]}


def main(folder):
    rng = np.random.default_rng(7)
    cases = {
        "images": write_images(folder, rng),
        "processors": write_processors(folder, rng),
        "tokens": write_tokenizer(folder),
    }
    cases["open_clip"] = write_open_clip(folder, length=80)
    cases["siglip2"] = write_siglip2(folder / "siglip2-fixed")
    (folder / "cases.json").write_text(json.dumps(cases))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
