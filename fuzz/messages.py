"""Seeds of messages: the protocol's, and what a service keeps of a run."""

import json
import struct
from collections.abc import Callable

import pyarrow as pa

Value = int | float | str | bytes


def varint(number: int) -> bytes:
    out = b""
    while number > 127:
        out += bytes([number & 127 | 128])
        number >>= 7
    return out + bytes([number])


def message(*fields: tuple[int, Value]) -> bytes:
    """Protobuf of fields by their numbers; bytes are also messages and packed numbers."""
    out = b""
    for number, value in fields:
        match value:
            case int():
                out += varint(number << 3) + varint(value)
            case float():
                out += varint(number << 3 | 1) + struct.pack("<d", value)
            case _:
                data = value.encode() if isinstance(value, str) else value
                out += varint(number << 3 | 2) + varint(len(data)) + data
    return out


def delimited(data: bytes) -> bytes:
    return varint(len(data)) + data


def packed(*numbers: int) -> bytes:
    return b"".join(varint(number) for number in numbers)


def phase(from_step: int, policy: int) -> bytes:
    return message((1, from_step), (2, policy), (4, 64), (5, 16))


SPEC = message(
    (1, message((1, "memory:///data"), (5, "n > 1"))),
    (2, message((1, "memory:///learner"), (2, 7))),
    (3, message((1, "memory:///reference"), (2, -10.0))),
    (4, phase(0, 1)),
    (4, phase(9, 3)),
    (6, message((2, 4))),
    (9, "url"),
)


def parts() -> dict[str, bytes]:
    def push(stream: int, *field: Value) -> bytes:
        return bytes([stream]) + delimited(message(field))

    def part(stream: int, name: str, shape: list[int], start: list[int], extent: list[int]):
        shapes = [(n, packed(*all)) for n, all in ((3, shape), (4, start), (5, extent)) if all]
        return push(stream, 2, message((1, name), (2, 1), *shapes))

    def data(stream: int, count: int) -> bytes:
        return push(stream, 3, bytes(count))

    whole = [
        part(0, "module.encoder.weight", [3, 4], [0, 0], [2, 4]),
        part(1, "encoder.weight", [3, 4], [2, 0], [1, 4]),
        data(0, 32),
        data(1, 16),
        part(0, "encoder.bias", [4], [0], [4]),
        data(0, 8),
        data(0, 8),
        part(1, "logit_scale", [1], [0], [1]),
        data(1, 4),
        part(1, "pool.ids", [2, 0], [0, 0], [2, 0]),
        part(1, "logit_bias", [], [], []),
        data(1, 4),
    ]
    broken = [*whole[:3], bytes([255, 1]), data(2, 1)]
    return {"whole": b"".join(whole), "broken": b"".join(broken)}


def receipt() -> tuple[pa.Table, dict[str, str]]:
    """A receipt's rows, and the metadata that programs read."""
    columns = {
        "id": pa.array(["0.parquet#0", "0.parquet#1"]),
        "source": pa.array([0, 0], pa.uint32()),
        "shard": pa.array([0, 0], pa.uint32()),
        "row": pa.array([0, 1], pa.uint64()),
        "position": pa.array([40, 41], pa.uint64()),
        "chunk": pa.array([0, 1], pa.uint32()),
        "score": pa.array([0.5, -0.25]),
        "weight": pa.array([1.0, 1.0]),
        "fidelity": pa.array(["full", "full"]),
        "content_hash": pa.array([b"0" * 16, b"1" * 16]),
        "own_score": pa.array([None, 0.25]),
        "column_values": pa.array([None, [0.5, 1.5]], pa.list_(pa.float64())),
    }
    summary = message((1, "run"), (4, 3), (5, 3))
    bad = message((3, message((1, "0.parquet#9"))))
    metadata = {
        "superbatch.summary.protobuf": summary.hex(),
        "superbatch.bad_rows.protobuf": bad.hex(),
    }
    return pa.table(columns), metadata


def receipts(parquet: Callable[..., bytes]) -> dict[str, bytes]:
    rows, metadata = receipt()
    table = rows.replace_schema_metadata(metadata)
    return {"two": parquet(table, compression="none", use_dictionary=False)}


def packs(parquet: Callable[..., bytes]) -> dict[str, bytes]:
    """Packs of three receipts in two row groups, from step 3 on."""
    rows, metadata = receipt()
    steps = [3, 4, 5]
    lists = pa.list_(pa.struct(rows.schema))
    chosen = [rows.slice(0, step % 3).to_pylist() for step in steps]
    texts = [metadata[f"superbatch.{key}.protobuf"] for key in ("summary", "bad_rows")]
    columns = {
        "step": pa.array(steps, pa.uint64()),
        "generation": pa.array([0] * 3, pa.uint32()),
        "hash": pa.array([bytes([step]) * 32 for step in steps], pa.binary(32)),
        "summary": ["{}"] * 3,
        "summary_protobuf": [texts[0]] * 3,
        "bad_rows": ["[]"] * 3,
        "bad_rows_protobuf": [texts[1]] * 3,
        "passed_over": pa.array([None] * 3, pa.string()),
        "chosen": pa.array(chosen, lists),
    }
    table = pa.table(columns)
    forms = {
        "plain": {"compression": "none", "use_dictionary": False},
        "zstd": {"compression": "zstd"},
    }
    return {
        name: bytes([steps[0], len(steps) - 1]) + parquet(table, row_group_size=2, **form)
        for name, form in forms.items()
    }


def facts() -> dict[str, bytes]:
    spec = {"phases": [{"policy": "POLICY_JOINT", "sub_batch_size": 4}], "seed": 7}
    run = {"format": 2, "spec": spec, "manifest": "m", "reference": None, "learner": None}
    objects = [
        {**run, "fork": None, "nonce": "n"},
        {"phases": [{"from_step": 20, "policy": "POLICY_TOP_K"}], "nonce": "n"},
        {"rewound": {"generation": 1, "to_step": 3, "replay": True}, "nonce": "n"},
        {"why": "done", "nonce": "n"},
        {"why": "torn", "nonce": "n"},
        {"incarnation": "a", "nonce": "n"},
    ]
    seeds = {str(n): bytes([n]) + json.dumps(one).encode() for n, one in enumerate(objects)}
    losses = b"SBL1" + b"0" * 32 + bytes(12) + bytes([1]) * 8
    push = {"nonce": "n", "push_id": "g0-s1", "version": 1, "generation": 0, "step": 1}
    push |= {"digest": "ab", "logit_scale": 10.0, "logit_bias": None}
    seeds["6"] = bytes([6]) + losses
    seeds["7"] = bytes([7]) + losses
    seeds["8"] = bytes([8]) + json.dumps(push).encode()
    return seeds


def requests() -> dict[str, bytes]:
    def asked(step: int, *consumed: int) -> bytes:
        named = [(1, "r"), (3, step), (5, 1), (6, "a")]
        return delimited(message(*named, *((8, step) for step in consumed)))

    begin = delimited(
        message(
            *((1, 3), (2, 1), (3, 1), (4, 3), (5, 2), (6, 1.0)),
            *((10, packed(*range(8))), (11, packed(2)), (12, 10.0), (14, 10.0)),
        )
    )
    rows = message((2, 2), (3, 8), (4, 1), (5, b"\1" * 16), (6, b"\1" * 16))
    model = message((1, "ab"), (3, 512), (6, 10.0), (10, message((1, "w"), (2, packed(2, 3)))))
    holes = message((1, message((1, 3), (3, "no image"))))
    seeds = {
        "spec": (0, SPEC),
        "phases": (1, delimited(SPEC) + delimited(phase(20, 3))),
        "ranks": (2, asked(0) + asked(1, 0) + asked(2)),
        "push": (3, message((1, "r"), (3, 1), (9, "memory:///w.safetensors"))),
        "losses": (4, message((1, "r"), (3, 1))),
        "register": (5, delimited(message((1, "http://127.0.0.1:1"), (2, "a")))),
        "model": (6, b"\0" + model),
        "holes": (6, b"\2" + holes),
        "embeddings": (7, b"\1" + delimited(b"") + delimited(rows)),
        "draw": (8, b"\1" + begin),
        "drawn": (8, b"\0" + begin + message((1, packed(0, 1, 3)))),
        "ticket": (9, message((1, "r"), (7, packed(5, 0)), (8, 99))),
    }
    return {name: bytes([kind]) + data for name, (kind, data) in seeds.items()}


def kinds() -> dict[str, bytes]:
    """Messages of whatever kind these numbers are, with all types of fields."""
    everything = message((1, "r"), (2, SPEC), (3, 7), (4, 0.5), (5, packed(1, 2)), (9, b"\0"))
    return {f"{kind:02}": bytes([kind]) + everything for kind in range(0, 96, 8)}
