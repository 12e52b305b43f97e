"""The server as a wheel: installed by pip, it runs on the torch that is there."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from cluster import BINARY

SCRIPT = Path(__file__).parents[2] / "scripts" / "server_wheel.py"


def pip(*arguments: str | Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments],
        capture_output=True,
        text=True,
        check=True,
    )


def test_it_is_installed_and_runs(tmp_path):
    done = subprocess.run(
        [sys.executable, SCRIPT, BINARY, tmp_path / "wheels"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    wheel = Path(done.stdout.strip())
    again = subprocess.run(
        [sys.executable, SCRIPT, BINARY, tmp_path / "again"], capture_output=True, text=True
    )
    assert Path(again.stdout.strip()).read_bytes() == wheel.read_bytes()

    pip("install", "--no-deps", "--no-index", "--target", tmp_path / "installed", wheel)
    # Where the binary was built, it finds LibTorch beside the sources; here it may not.
    environment = {name: value for name, value in os.environ.items() if name != "LD_LIBRARY_PATH"}
    torch = Path(importlib.util.find_spec("torch").origin).parents[1]
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path / "installed"), str(torch)])
    command = [tmp_path / "installed" / "bin" / "superbatch", "check-config", "--defaults"]
    said = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    assert "127.0.0.1:50051" in said.stdout

    # Without torch it says what is missing.
    code = (
        "import sys; sys.modules['torch'] = None; import superbatch_server; "
        "superbatch_server.main()"
    )
    said = subprocess.run(
        [sys.executable, "-S", "-c", code],
        env={**environment, "PYTHONPATH": str(tmp_path / "installed")},
        capture_output=True,
        text=True,
    )
    assert said.returncode == 1 and "pip install torch==" in said.stderr
