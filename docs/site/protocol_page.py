"""Writes docs/protocol.md from the comments of selection.proto."""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from google.protobuf import descriptor_pb2
from grpc_tools import protoc

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/protocol.md"
SOURCE = "superbatch/v1/selection.proto"
HEAD = """# Protocol

What a trainer in any language speaks: gRPC, by
[selection.proto](../proto/superbatch/v1/selection.proto). [The recipe for gRPC](recipes/grpc.md) is
a client of a few calls. Failed calls carry a reason of
[errors.proto](../proto/superbatch/v1/errors.proto): [each with its cause and remedy](errors.md). A
field of proto3 that is not set is zero, and takes the default that its text names.

Generated from the protocol's comments by `make docs`.
"""
SCALARS = {
    number: name.removeprefix("TYPE_").lower()
    for name, number in descriptor_pb2.FieldDescriptorProto.Type.items()
}
REPEATED = descriptor_pb2.FieldDescriptorProto.LABEL_REPEATED


def parsed() -> descriptor_pb2.FileDescriptorProto:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "set"
        given = [
            "protoc",
            f"-I{ROOT / 'proto'}",
            "--include_source_info",
            f"--descriptor_set_out={out}",
        ]
        if protoc.main([*given, SOURCE]) != 0:
            sys.exit(f"protoc cannot read {SOURCE}")
        return descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes()).file[0]


class Comments:
    """The comments of a file, by the path of what they stand at."""

    def __init__(self, file: descriptor_pb2.FileDescriptorProto) -> None:
        self.found = {tuple(place.path): place for place in file.source_code_info.location}

    def at(self, *path: int) -> str:
        place = self.found[path]
        lines = f"{place.leading_comments}\n{place.trailing_comments}".splitlines()
        return "\n".join(line.strip() for line in lines).strip()


def cell(text: str) -> str:
    """Text in one cell of a table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def link(name: str) -> str:
    """A link to a message's or an enum's heading."""
    short = name.removeprefix(".superbatch.v1.")
    return f"[{short}](#{short.replace('.', '').lower()})"


def kind(field: descriptor_pb2.FieldDescriptorProto, maps: dict[str, str]) -> str:
    if field.type_name in maps:
        return maps[field.type_name]
    local = field.type_name.startswith(".superbatch.")
    name = link(field.type_name) if local else field.type_name.lstrip(".") or SCALARS[field.type]
    if field.label == REPEATED:
        return f"repeated {name}"
    return f"optional {name}" if field.proto3_optional else name


def message(
    one: descriptor_pb2.DescriptorProto, comments: Comments, path: tuple[int, ...], outer: str
) -> Iterator[str]:
    name = f"{outer}{one.name}"
    yield f"### {name}\n"
    if text := comments.at(*path):
        yield f"{text}\n"
    maps = {}
    for nested in one.nested_type:
        if nested.options.map_entry:
            key, value = (SCALARS[field.type] for field in nested.field)
            maps[f".superbatch.v1.{name}.{nested.name}"] = f"map of {key} to {value}"
    if one.field:
        yield "| field | type | meaning |\n|---|---|---|"
    for index, field in enumerate(one.field):
        text = cell(comments.at(*path, 2, index))
        if field.HasField("oneof_index") and not field.proto3_optional:
            text = f"One of `{one.oneof_decl[field.oneof_index].name}`. {text}".strip()
        yield f"| `{field.name}` = {field.number} | {kind(field, maps)} | {text} |"
    yield ""
    for index, nested in enumerate(one.nested_type):
        if not nested.options.map_entry:
            yield from message(nested, comments, (*path, 3, index), f"{name}.")
    for index, nested in enumerate(one.enum_type):
        yield from enum(nested, comments, (*path, 4, index), f"{name}.")


def enum(
    one: descriptor_pb2.EnumDescriptorProto, comments: Comments, path: tuple[int, ...], outer: str
) -> Iterator[str]:
    yield f"### {outer}{one.name}\n"
    if text := comments.at(*path):
        yield f"{text}\n"
    yield "| value | meaning |\n|---|---|"
    for index, value in enumerate(one.value):
        yield f"| `{value.name}` = {value.number} | {cell(comments.at(*path, 2, index))} |"
    yield ""


def calls(file: descriptor_pb2.FileDescriptorProto, comments: Comments) -> Iterator[str]:
    for index, service in enumerate(file.service):
        yield f"## {service.name}\n"
        yield f"{comments.at(6, index)}\n"
        for number, call in enumerate(service.method):
            asked = ("stream of " if call.client_streaming else "") + link(call.input_type)
            told = ("stream of " if call.server_streaming else "") + link(call.output_type)
            yield f"### {call.name}\n"
            yield f"{asked} → {told}\n"
            if text := comments.at(6, index, 2, number):
                yield f"{text}\n"


def page() -> str:
    file = parsed()
    comments = Comments(file)
    lines = [HEAD, *calls(file, comments), "## Messages\n"]
    for index, one in enumerate(file.message_type):
        lines += message(one, comments, (4, index), "")
    lines.append("## Enums\n")
    for index, one in enumerate(file.enum_type):
        lines += enum(one, comments, (5, index), "")
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
