"""SigLIP's tokenizer out of spiece.model, beside transformers' own."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import superbatch
from superbatch import siglip
from tokenizers import Tokenizer

CAPTIONS = [
    "A photo of two Dogs, running!",
    "the   small-red cat's (blue) horse...",
    "  UPPER case & 100% café — naïve ﬁsh  ",
    "犬 and Ⅻ ½ №",
    "under_score\tand\nlines",
    "",
    "?!",
    "unseen words: zebra quagga",
    "a " * 200,
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, list[list[int]]]:
    """A folder with spiece.model, and what transformers makes of the captions with it."""
    folder = tmp_path_factory.mktemp("siglip")
    script = Path(__file__).with_name("sentencepiece_ids.py")
    done = subprocess.run(
        [sys.executable, str(script), str(folder)],
        input=json.dumps(CAPTIONS),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


def test_ids_are_those_of_transformers(trained):
    folder, expected = trained
    assert siglip.main([str(folder)]) == 0
    ours = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert len(expected) == len(CAPTIONS)
    for caption, ids in zip(CAPTIONS, expected, strict=True):
        assert ours.encode(caption).ids == ids, caption


def test_what_is_no_such_file_is_refused(tmp_path):
    with pytest.raises(superbatch.Error, match=r"has no spiece\.model"):
        siglip.write_tokenizer(tmp_path)
    (tmp_path / "spiece.model").write_bytes(b"\xff\xff\xff")
    with pytest.raises(superbatch.Error):
        siglip.write_tokenizer(tmp_path)
    assert siglip.main([]) == 2


def field(number: int, wire: int, body: bytes) -> bytes:
    return bytes([number << 3 | wire]) + body


def block(number: int, body: bytes) -> bytes:
    assert len(body) < 128
    return field(number, 2, bytes([len(body)]) + body)


PIECE = block(1, b"a") + field(2, 5, b"\0\0\0\0")


def test_a_whole_model_is_read():
    model = block(1, PIECE) + block(1, block(1, b"b"))
    assert siglip.read(model) == ([("a", 0.0), ("b", 0.0)], b"", 0, siglip.UNIGRAM)


@pytest.mark.parametrize(
    ("model", "what"),
    [
        (block(1, PIECE)[:-1], "a field of 8 bytes ends after 7"),
        (block(1, field(1, 2, b"\x05abc")), "a field of 5 bytes ends after 3"),
        (block(1, block(1, b"a") + field(2, 5, b"\0\0")), "ends after 2"),
        (block(1, block(1, b"a") + field(2, 1, b"\0" * 8)), "no number of 4 bytes"),
        (block(1, block(1, b"a") + field(2, 0, b"\x01")), "another kind"),
        (block(1, field(1, 0, b"\x01")), "another kind"),
        (block(1, block(1, b"\xff")), "no UTF-8"),
        (block(1, field(2, 5, b"\0\0\0\0")), "without text"),
        (field(1, 0, b"\x07"), "another kind"),
        (field(2, 5, b"\0\0\0\0"), "another kind"),
        (block(2, block(3, b"x")), "another kind"),
        (block(3, field(2, 0, b"\x01")), "another kind"),
        (field(1, 3, b""), "wire type 3"),
        (b"\xff" * 20, "does not end"),
        (field(1, 2, b"\xff" * 9 + b"\x01"), "ends after 0"),
        (block(1, PIECE) + block(2, b"\xc0\x02\x07"), "unknown piece is 7 of 1"),
    ],
)
def test_a_damaged_model_is_refused(model, what):
    with pytest.raises(superbatch.Error, match=what) as refused:
        siglip.read(model)
    assert refused.value.metadata["field"] == "folder"


def test_a_damaged_map_of_characters_is_refused(trained, tmp_path):
    whole = (trained[0] / "spiece.model").read_bytes()
    # The later of two fields counts.
    (tmp_path / "spiece.model").write_bytes(whole + block(3, block(2, b"\xff" * 5)))
    with pytest.raises(superbatch.Error, match="its map of characters"):
        siglip.write_tokenizer(tmp_path)


def test_no_cut_and_no_bit_ends_in_another_error(trained):
    whole = (trained[0] / "spiece.model").read_bytes()
    rng = random.Random(5)
    changed = [whole[:at] for at in rng.sample(range(len(whole)), 200)]
    for at in rng.sample(range(len(whole)), 200):
        byte = bytes([whole[at] ^ 1 << rng.randrange(8)])
        changed.append(whole[:at] + byte + whole[at + 1 :])
    refused = 0
    for model in changed:
        try:
            siglip.read(model)
        except superbatch.Error:
            refused += 1
    assert refused > 100
