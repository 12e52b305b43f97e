"""Keeps what is derived in the Helm chart: its README's table of values, and its copies of the
rules and the dashboard.

    python scripts/chart.py           writes them
    python scripts/chart.py --check   names those that are stale, and exits with 1

A value is documented by a comment that begins with `# --` above it; a mapping so documented stands
for all that is in it.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import NamedTuple

import yaml

ROOT = Path(__file__).parents[1]
CHART = ROOT / "deploy" / "helm" / "superbatch"
COPIES = {
    CHART / "files" / "rules.yaml": ROOT / "deploy" / "prometheus" / "rules.yaml",
    CHART / "files" / "superbatch.json": ROOT / "deploy" / "grafana" / "superbatch.json",
}
BEGIN = "<!-- Generated from values.yaml by scripts/chart.py. -->"
KEY = re.compile(r"(?P<indent> *)(?P<key>[A-Za-z][\w-]*):(?P<rest>.*)")


class Value(NamedTuple):
    path: str
    text: str


def documented(lines: list[str]) -> list[Value]:
    """Every value with a comment, in the order of the file."""
    found, above, comment = [], [], []
    for line in lines:
        stripped = line.strip()
        if stripped.startswith("# --"):
            comment = [stripped[4:].strip()]
        elif stripped.startswith("#") and comment:
            comment.append(stripped[1:].strip())
        elif key := KEY.fullmatch(line):
            depth = len(key["indent"]) // 2
            above = [*above[:depth], key["key"]]
            if comment:
                found.append(Value(".".join(above), " ".join(comment)))
            comment = []
        else:
            comment = []
    return found


def at(values: dict, path: str):
    for key in path.split("."):
        values = values[key]
    return values


def leaves(values, path: str = ""):
    """The paths of everything that is no mapping with entries."""
    if not isinstance(values, dict) or not values:
        yield path
        return
    for key, value in values.items():
        yield from leaves(value, f"{path}.{key}" if path else key)


def undocumented(values: dict, known: list[Value]) -> list[str]:
    paths = {value.path for value in known}
    above = [
        [path[: match.start()] for match in re.finditer(r"\.|$", path)] for path in leaves(values)
    ]
    return [prefixes[-1] for prefixes in above if not paths.intersection(prefixes)]


def table(values: dict, known: list[Value]) -> str:
    rows = ["| value | default | meaning |", "|---|---|---|"]
    for value in known:
        default = json.dumps(at(values, value.path), ensure_ascii=False).replace("|", "\\|")
        rows.append(f"| `{value.path}` | `{default}` | {value.text} |")
    return "\n".join(rows) + "\n"


def wanted() -> dict[Path, str]:
    """What each derived file should hold."""
    source = (CHART / "values.yaml").read_text()
    values, known = yaml.safe_load(source), documented(source.splitlines())
    if missing := undocumented(values, known):
        sys.exit(f"values.yaml: no `# --` comment above {', '.join(missing)}")
    readme = CHART / "README.md"
    head, marker, _ = readme.read_text().partition(BEGIN)
    if not marker:
        sys.exit(f"{readme}: there is no line {BEGIN!r}")
    texts = {readme: f"{head}{BEGIN}\n\n{table(values, known)}"}
    return texts | {copy: original.read_text() for copy, original in COPIES.items()}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    stale = [
        path for path, text in wanted().items() if not path.exists() or path.read_text() != text
    ]
    for path in stale:
        if check:
            print(
                f"{path.relative_to(ROOT)} is stale: run `python scripts/chart.py`", file=sys.stderr
            )
        else:
            path.write_text(wanted()[path])
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
