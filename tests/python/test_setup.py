"""Which Python `make setup` takes, with interpreters that say which version they are."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "python.sh"


def choose(
    folder: Path, interpreters: dict[str, tuple[int, int]], python: str = "", venv: bool = True
):
    """Runs the script where these interpreters are, by name and version."""
    folder.mkdir()
    for tool in ("bash", "env"):
        (folder / tool).symlink_to(shutil.which(tool))
    for name, version in interpreters.items():
        path = folder / name
        lines = [
            f"#!{sys.executable}",
            "import sys",
            f"sys.version_info = ({version[0]}, {version[1]}, 0)",
            "sys.modules['ensurepip'] = sys" if venv else "sys.modules['ensurepip'] = None",
            "exec(sys.argv[2])",
        ]
        path.write_text("\n".join(lines) + "\n")
        path.chmod(0o755)
    return subprocess.run(
        ["bash", SCRIPT],
        env={"PATH": str(folder), "PYTHON": python},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("interpreters", "python", "chosen"),
    [
        ({"python3": (3, 11)}, "", "python3"),
        ({"python3": (3, 13), "python3.11": (3, 11)}, "", "python3"),
        ({"python3": (3, 10), "python3.12": (3, 12), "python3.11": (3, 11)}, "", "python3.12"),
        ({"python3": (3, 14), "python3.11": (3, 11)}, "", "python3.11"),
        ({"python3": (3, 13), "mine": (3, 12)}, "mine", "mine"),
    ],
)
def test_the_first_that_suits_is_taken(tmp_path, interpreters, python, chosen):
    done = choose(tmp_path / "bin", interpreters, python)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{chosen}\n", "")


@pytest.mark.parametrize(
    ("interpreters", "python", "venv", "said"),
    [
        ({}, "", True, "missing: Python 3.11, 3.12 or 3.13. Get it with: apt-get install python3"),
        ({"python3": (3, 10)}, "", True, "missing: Python 3.11, 3.12 or 3.13."),
        (
            {"python3": (3, 13), "old": (3, 9)},
            "old",
            True,
            "PYTHON=old is no Python 3.11, 3.12 or 3.13.",
        ),
        (
            {"python3": (3, 12)},
            "",
            False,
            "missing: Python's venv module. Get it with: apt-get install python3.12-venv",
        ),
    ],
)
def test_what_is_missing_is_said(tmp_path, interpreters, python, venv, said):
    done = choose(tmp_path / "bin", interpreters, python, venv)
    assert (done.returncode, done.stdout) == (1, "") and done.stderr.startswith(said)
