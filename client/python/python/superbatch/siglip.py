"""SigLIP's tokenizer as the service reads it: `python -m superbatch.siglip FOLDER` makes
`tokenizer.json` of the `spiece.model` that transformers saves.
"""

from __future__ import annotations

import os
import string
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ._errors import invalid

END = "</s>"
UNIGRAM = 1


def write_tokenizer(folder: str | os.PathLike, length: int = 64) -> Path:
    """Writes `tokenizer.json` of the folder's `spiece.model`: lower case, no punctuation, and an
    end token, as SiglipTokenizer does it.

    length: ids of a caption, to which they are padded with the end token.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    folder = Path(folder)
    source = folder / "spiece.model"
    if not source.exists():
        raise invalid("folder", f"{folder} has no spiece.model")
    vocabulary, charsmap, unknown, kind = read(source.read_bytes())
    if kind != UNIGRAM or not any(piece == END for piece, _ in vocabulary):
        raise invalid("folder", f"{source} is no unigram model with {END}: not SigLIP's")
    made = Tokenizer(models.Unigram(vocabulary, unknown, False))
    punctuation = "[" + "".join("\\" + character for character in string.punctuation) + "]"
    steps = [
        normalizers.Lowercase(),
        normalizers.Replace(Regex(punctuation), ""),
        normalizers.Replace(Regex(r"\s+"), " "),
        normalizers.Strip(),
        *precompiled(charsmap),
        normalizers.Replace(Regex(" {2,}"), " "),
    ]
    made.normalizer = normalizers.Sequence(steps)
    made.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    end = made.token_to_id(END)
    made.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, end)]
    )
    made.enable_truncation(length)
    made.enable_padding(length=length, pad_id=end, pad_token=END)
    made.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def read(model: bytes) -> tuple[list[tuple[str, float]], bytes, int, int]:
    """Of a SentencePiece model: pieces with their scores, the map of characters that its normalizer
    applies, the id of the unknown piece, and the kind of model.
    """
    vocabulary, charsmap, unknown, kind = [], b"", 0, UNIGRAM
    for field, value in fields(model):
        if field == 1:
            piece = dict(fields(of(value, bytes)))
            if 1 not in piece:
                raise damaged("it has a piece without text")
            text = of(piece[1], bytes)
            try:
                vocabulary.append((text.decode(), score(piece)))
            except UnicodeDecodeError:
                raise damaged(f"its piece {text!r} is no UTF-8") from None
        elif field == 2:
            trainer = dict(fields(of(value, bytes)))
            unknown, kind = of(trainer.get(40, 0), int), of(trainer.get(3, UNIGRAM), int)
        elif field == 3:
            charsmap = of(dict(fields(of(value, bytes))).get(2, b""), bytes)
    if vocabulary and not 0 <= unknown < len(vocabulary):
        raise damaged(f"its unknown piece is {unknown} of {len(vocabulary)} pieces")
    return vocabulary, charsmap, unknown, kind


def precompiled(charsmap: bytes) -> list[Any]:
    """The normalizer of a map of characters, if there is one."""
    from tokenizers import normalizers

    try:
        return [normalizers.Precompiled(charsmap)] if charsmap else []
    except Exception as error:
        raise damaged(f"its map of characters: {error}") from None


def score(piece: dict[int, Any]) -> float:
    found = of(piece.get(2, Fixed(4)), Fixed)
    if len(found) != 4:
        raise damaged("the score of a piece is no number of 4 bytes")
    return struct.unpack("<f", found)[0]


class Fixed(bytes):
    """A number of 4 or 8 bytes, as it is stored."""


def of(value: Any, kind: type) -> Any:
    """The value of a field that must be of this kind: int, bytes, or Fixed."""
    if type(value) is not kind:
        raise damaged("a field is of another kind than SentencePiece's")
    return value


def damaged(what: str) -> Exception:
    message = f"spiece.model is damaged, or no SentencePiece model: {what}; download it again"
    return invalid("folder", message)


def fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protobuf message: int, bytes, or Fixed."""
    at = 0
    while at < len(message):
        tag, at = number(message, at)
        wire = tag & 7
        if wire == 0:
            value, at = number(message, at)
        elif wire in (1, 5):
            value, at = taken(message, at, 8 if wire == 1 else 4)
            value = Fixed(value)
        elif wire == 2:
            size, at = number(message, at)
            value, at = taken(message, at, size)
        else:
            raise damaged(f"a field has the wire type {wire}")
        yield tag >> 3, value


def taken(message: bytes, at: int, size: int) -> tuple[bytes, int]:
    if size > len(message) - at:
        raise damaged(f"a field of {size} bytes ends after {len(message) - at}")
    return message[at : at + size], at + size


def number(message: bytes, at: int) -> tuple[int, int]:
    value, shift = 0, 0
    # 64 bits in groups of 7.
    for byte in message[at : at + 10]:
        value, at, shift = value | (byte & 127) << shift, at + 1, shift + 7
        if byte < 128:
            return value, at
    raise damaged("a number does not end")


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        usage = (
            "usage: python -m superbatch.siglip FOLDER  (makes FOLDER/tokenizer.json of "
            "spiece.model)"
        )
        print(usage, file=sys.stderr)
        return 2
    print(write_tokenizer(arguments[0]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
