"""Installs wheels into a fresh environment each and uses them: what `make wheel` ends with.

Usage: python scripts/try_wheels.py WHEEL...

Nothing is fetched. The environment has the wheel and, from the one that runs this, the packages
that the wheel says it needs; so a package that it forgets to name is missing.
"""

import importlib.metadata
import os
import re
import subprocess
import sys
import tempfile
import venv
import zipfile
from email import message_from_string
from pathlib import Path

# What each wheel has to do once it is installed: Python, in its environment.
USES = {
    "superbatch": """
import importlib.metadata, superbatch
superbatch.RunSpec(run_id="a", sources=["file:///pool"], phases=[superbatch.Phase(
    policy="uniform", super_batch_size=2, sub_batch_size=1)])
try:
    # Nobody listens there: it takes the compiled part to find out.
    superbatch.connect("http://127.0.0.1:1", timeout=2)
except superbatch.Unavailable:
    print("superbatch", importlib.metadata.version("superbatch"))
""",
    "superbatch_kernels": """
import numpy, superbatch_kernels
rows = numpy.eye(8, dtype=numpy.float32)
model = superbatch_kernels.Model(rows, rows, 10.0, -5.0)
drawn = superbatch_kernels.select(model, model, sub_batch_size=4, seed=1, n_chunks=2)
assert sorted(drawn.indices.tolist()) == sorted(set(drawn.indices.tolist())), drawn
print("superbatch_kernels", superbatch_kernels.__version__)
""",
    "superbatch_server": """
import pathlib, subprocess, sys
program = pathlib.Path(sys.executable).with_name("superbatch")
told = subprocess.run([program, "check-config", "--defaults"], check=True, capture_output=True)
assert b"127.0.0.1:50051" in told.stdout, told
print("superbatch_server", subprocess.run(
    [program, "--version"], check=True, capture_output=True, text=True).stdout.split()[1])
""",
}


def needed(wheel: Path) -> list[str]:
    """The packages that the wheel's metadata names, without those of extras."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        about = message_from_string(archive.read(name).decode())
    wanted = about.get_all("Requires-Dist") or []
    return [re.match(r"[\w.-]+", text)[0] for text in wanted if "extra ==" not in text]


def lend(packages: list[str], site: Path) -> None:
    """Links what is installed here of these packages into another environment."""
    for package in packages:
        files = importlib.metadata.distribution(package).files or []
        for top in {file.parts[0] for file in files if file.parts[0] != ".."}:
            link = site / top
            if not link.exists():
                link.symlink_to(Path(importlib.metadata.distribution(package).locate_file(top)))


def use(wheel: Path) -> str:
    """What the installed wheel says of itself. Raises `SystemExit` where it cannot be used."""
    name = wheel.name.split("-")[0]
    if name not in USES:
        raise SystemExit(f"{wheel.name}: no such wheel is known here")
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=False)
        python = Path(folder) / "bin" / "python"
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]
        steps = [[*pip, "install", "--quiet", "--no-deps", "--no-index", wheel.resolve()]]
        steps.append([python, "-I", "-c", USES[name]])
        site = subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            check=True,
            capture_output=True,
            text=True,
        )
        lend(needed(wheel), Path(site.stdout.strip()))
        # Where it was built, LibTorch may lie on the libraries' path; elsewhere it does not.
        hidden = ("LD_LIBRARY_PATH", "PYTHONPATH")
        environment = {key: value for key, value in os.environ.items() if key not in hidden}
        for step in steps:
            done = subprocess.run(step, cwd=folder, env=environment, capture_output=True, text=True)
            if done.returncode != 0:
                raise SystemExit(f"{wheel.name} cannot be used:\n{done.stderr[-3000:]}")
        return done.stdout.strip()


if __name__ == "__main__":
    if not sys.argv[1:]:
        raise SystemExit(__doc__)
    for path in sys.argv[1:]:
        print(f"{path}: installed by itself, and works: {use(Path(path))}")
