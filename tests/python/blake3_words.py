"""BLAKE3 in its mode of deriving keys, for inputs of one chunk: what the service makes the key of
an image by (https://github.com/BLAKE3-team/BLAKE3-specs, section 2).
"""

import struct

IV = (
    0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A,
    0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19,
)  # fmt: skip
PERMUTED = (2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8)
COLUMNS = ((0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15))
DIAGONALS = ((0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14))
CHUNK_START, CHUNK_END, ROOT, CONTEXT, MATERIAL = 1, 2, 8, 32, 64
BLOCK, CHUNK, ROUNDS, MASK = 64, 1024, 7, 0xFFFFFFFF


def turned(word: int, bits: int) -> int:
    return (word >> bits | word << (32 - bits)) & MASK


def mix(v: list[int], at: tuple[int, ...], words: tuple[int, int]) -> None:
    a, b, c, d = at
    for word, first, second in ((words[0], 16, 12), (words[1], 8, 7)):
        v[a] = (v[a] + v[b] + word) & MASK
        v[d] = turned(v[d] ^ v[a], first)
        v[c] = (v[c] + v[d]) & MASK
        v[b] = turned(v[b] ^ v[c], second)


def compressed(chain: tuple[int, ...], block: bytes, flags: int) -> tuple[int, ...]:
    """The chaining value after a block of the first chunk."""
    words = list(struct.unpack("<16I", block.ljust(BLOCK, b"\0")))
    v = [*chain, *IV[:4], 0, 0, len(block), flags]
    for _ in range(ROUNDS):
        for n, at in enumerate((*COLUMNS, *DIAGONALS)):
            mix(v, at, (words[2 * n], words[2 * n + 1]))
        words = [words[i] for i in PERMUTED]
    return tuple(v[i] ^ v[i + 8] for i in range(8))


def hashed(key: tuple[int, ...], data: bytes, mode: int) -> tuple[int, ...]:
    """The first 32 bytes of output as words, of at most one chunk."""
    assert len(data) <= CHUNK, "of one chunk"
    blocks = [data[i : i + BLOCK] for i in range(0, len(data), BLOCK)] or [b""]
    for n, block in enumerate(blocks):
        flags = mode | CHUNK_START * (n == 0) | (CHUNK_END | ROOT) * (n == len(blocks) - 1)
        key = compressed(key, block, flags)
    return key


def derived_word(context: str, material: bytes) -> int:
    """The first eight bytes that are derived from `material`, as a whole number."""
    first, second, *_ = hashed(hashed(IV, context.encode(), CONTEXT), material, MATERIAL)
    return first | second << 32
