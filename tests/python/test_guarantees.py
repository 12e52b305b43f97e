"""docs/guarantees.md names tests; each has to be there, and what is skipped has to be said."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
GUARANTEES = ROOT / "docs/guarantees.md"
FOLDERS = ("server/src", "client/rust", "scoring-kernels", "tests")


def named_by(section: str) -> list[str]:
    """The cells of a table that name tests: the last ones of the promises, the first of needs."""
    cell = 1 if section else -2
    text = GUARANTEES.read_text()
    text = text.split(f"\n## {section}\n")[1] if section else text
    rows = [line for line in text.split("\n## ")[0].splitlines() if line.startswith("| ")][1:]
    named = [re.findall(r"`(\w+)`", re.split(r"(?<!\\)\|", row)[cell]) for row in rows]
    assert all(named), rows
    return [name for names in named for name in names]


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
    promised = named_by("")
    assert len(promised) > 100
    assert not set(promised) - known


def test_tests_of_promises_that_may_skip_are_listed_with_what_they_need():
    """By what the files of the tests say: the reason of a skip, or a fixture that skips."""
    listed = named_by("What a machine may lack")
    assert set(listed) <= set(named_by(""))
    skips = re.compile(r"pytest\.skip\(|importorskip|from azure_store import|open_browser")
    for path in (ROOT / "tests/python").glob("test_*.py"):
        text = path.read_text()
        if path.name == Path(__file__).name or not skips.search(text):
            continue
        in_file = set(re.findall(r"def test_(\w+)\(", text))
        assert in_file & set(named_by("")) <= set(listed), path.name


def test_a_promise_that_was_not_tested_is_named_at_the_end(tmp_path):
    folder = tmp_path / "tests" / "python"
    folder.mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    shutil.copy(GUARANTEES, tmp_path / "docs")
    shutil.copy(Path(__file__).with_name("conftest.py"), folder)
    skipped = named_by("What a machine may lack")[0]
    text = "import pytest\n"
    for name in (skipped, "another"):
        text += f"def test_{name}():\n    pytest.skip('NOT TESTED: no such tool')\n"
    (folder / "test_some.py").write_text(text)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", folder]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == 0, ended.stdout
    told = ended.stdout.split("promises that were NOT TESTED here")[1]
    assert f"{skipped}: NOT TESTED: no such tool" in told
    assert "another" not in told
