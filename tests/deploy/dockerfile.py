"""What the Dockerfile says, and what .dockerignore lets through to the builder."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from tools import ROOT

DOCKERFILE = ROOT / "docker" / "Dockerfile"
#: Folders that hold what is built, not what images are built from. Nobody looks into them.
BUILT = {".git", ".venv", "target", "node_modules", "__pycache__"}


class Instruction(NamedTuple):
    stage: str
    name: str
    text: str


def instructions() -> list[Instruction]:
    """The Dockerfile's instructions, each on one line, with the stage that it is in."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#")]
    found, stage = [], ""
    for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        name, _, text = line.strip().partition(" ")
        if name == "FROM":
            stage = text.split(" AS ")[-1]
        if name:
            found.append(Instruction(stage, name, text.strip()))
    return found


def stages() -> set[str]:
    return {each.stage for each in instructions() if each.name == "FROM"}


def arguments() -> dict[str, str]:
    """The defaults of the build's arguments."""
    given = (each.text.split("=") for each in instructions() if each.name == "ARG")
    return {name: default[0] for name, *default in given if default}


def from_context() -> Iterator[tuple[str, str]]:
    """Every path that an instruction takes out of the builder's context, with its stage."""
    for each in instructions():
        words = shlex.split(each.text)
        options = [word for word in words if word.startswith("--")]
        if each.name in ("COPY", "ADD") and not any(o.startswith("--from=") for o in options):
            for source in [word for word in words if not word.startswith("--")][:-1]:
                yield each.stage, source
        mounts = [o.removeprefix("--mount=") for o in options if o.startswith("--mount=")]
        for mount in mounts if each.name == "RUN" else []:
            fields = dict(field.partition("=")[::2] for field in mount.split(","))
            if fields.get("type") == "bind" and "from" not in fields:
                yield each.stage, fields["source"]


def expression(pattern: str) -> re.Pattern:
    """A pattern of .dockerignore: `*` stays within a folder, `**` stands for any folders."""
    parts = re.split(r"(\*\*/?|\*|\?)", pattern)
    signs = {"**/": r"(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return re.compile("".join(signs.get(part) or re.escape(part) for part in parts))


def rules() -> list[tuple[bool, re.Pattern]]:
    """The patterns of .dockerignore in their order, each with whether it ignores."""
    lines = (line.strip() for line in (ROOT / ".dockerignore").read_text().splitlines())
    return [
        (not line.startswith("!"), expression(line.removeprefix("!").strip("/")))
        for line in lines
        if line and not line.startswith("#")
    ]


def passes(path: str) -> bool:
    """Whether a file reaches the builder: the last pattern that matches it or a folder above it
    decides.
    """
    pure = PurePosixPath(path)
    above = [str(pure), *(str(parent) for parent in pure.parents if str(parent) != ".")]
    ignored = False
    for ignores, pattern in rules():
        if any(pattern.fullmatch(each) for each in above):
            ignored = ignores
    return not ignored


def files(folder: Path = ROOT) -> Iterator[Path]:
    """The files of the repository."""
    for path in sorted(folder.iterdir()):
        if path.is_dir() and path.name not in BUILT:
            yield from files(path)
        elif path.is_file():
            yield path


def context() -> list[str]:
    """The files that the builder gets, by their paths from the root."""
    names = (path.relative_to(ROOT).as_posix() for path in files())
    return [name for name in names if passes(name)]
