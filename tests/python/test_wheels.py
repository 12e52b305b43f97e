"""Wheels of the client and of the kernels, of the package and the extension that `make build` made,
used in an environment of their own. `make wheel` does the same with those of its release builds.
"""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {"superbatch": "client/python", "superbatch_kernels": "scoring-kernels/python"}


def pack(name: str, folder: Path, without: str = "") -> Path:
    """The wheel as maturin makes it: its metadata, and the package with its extension."""
    source = ROOT / PACKAGES[name]
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import maturin; maturin.prepare_metadata_for_build_wheel({str(folder)!r})",
        ],
        cwd=source,
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (about,) = folder.glob(f"{name}-*.dist-info")
    tag = (about / "WHEEL").read_text().split("Tag: ")[1].split()[0]
    wheel = folder / f"{about.name.removesuffix('.dist-info')}-{tag}.whl"
    files = {path: about.name + "/" + path.name for path in about.iterdir()}
    for path in (source / "python" / name).rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts and path.name != without:
            files[path] = str(path.relative_to(source / "python"))
    record = f"{about.name}/RECORD"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, place in files.items():
            archive.write(path, place)
        # Without digests, which pip does not ask for.
        archive.writestr(record, "".join(f"{place},,\n" for place in [*files.values(), record]))
    shutil.rmtree(about)
    return wheel


def tried(wheel: Path) -> subprocess.CompletedProcess:
    script = ROOT / "scripts" / "try_wheels.py"
    return subprocess.run([sys.executable, script, wheel], capture_output=True, text=True)


@pytest.mark.parametrize("name", PACKAGES)
def test_it_is_installed_by_itself_and_works(name, tmp_path):
    done = tried(pack(name, tmp_path))
    assert done.returncode == 0, done.stderr
    assert f"installed by itself, and works: {name} 0." in done.stdout


def test_a_wheel_that_does_not_work_is_told(tmp_path):
    extension = "_kernels.abi3.so"
    done = tried(pack("superbatch_kernels", tmp_path, without=extension))
    assert done.returncode == 1 and "_kernels" in done.stderr
    # What it needs and does not name is not there.
    whole = pack("superbatch_kernels", tmp_path)
    forgets = tmp_path / "forgets" / whole.name
    forgets.parent.mkdir()
    with zipfile.ZipFile(whole) as given, zipfile.ZipFile(forgets, "w") as other:
        for entry in given.infolist():
            text = given.read(entry)
            if entry.filename.endswith("METADATA"):
                text = text.replace(b"Requires-Dist: numpy", b"X-Requires: numpy")
            other.writestr(entry, text)
    done = tried(forgets)
    assert done.returncode == 1 and "No module named 'numpy'" in done.stderr
