"""docs/guarantees.md names tests; each has to be there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("server/src", "client/rust", "scoring-kernels", "tests")


def test_every_test_that_a_guarantee_names_exists():
    files = [
        path
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".rs", ".py")
    ]
    known = set(
        re.findall(r"(?:fn|def) (?:test_)?(\w+)\(", "\n".join(path.read_text() for path in files))
    )
    rows = [
        line
        # The sections after the table of promises have tables of figures.
        for line in (ROOT / "docs/guarantees.md").read_text().split("\n## Chaos")[0].splitlines()
        if line.startswith("| ")
    ][1:]
    assert len(rows) > 20
    for row in rows:
        named = re.findall(r"`(\w+)`", row.rsplit("|", 2)[1])
        assert named, row
        assert not set(named) - known, row
