"""What `make build` does to the extensions that running Python processes have mapped."""

import mmap
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUILT = {"EXTENSION": "lib_superbatch.so", "KERNELS_EXTENSION": "lib_kernels.so"}


def copies(settings: list[str]) -> list[str]:
    """The lines of the recipe that write the extensions."""
    recipe = subprocess.run(
        ["make", "-n", "build", *settings], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    return [line for line in recipe.splitlines() if any(name in line for name in BUILT.values())]


def test_an_extension_that_is_in_use_is_replaced_and_not_written_over(tmp_path):
    (tmp_path / "target/debug").mkdir(parents=True)
    mapped = {}
    for setting, name in BUILT.items():
        (tmp_path / "target/debug" / name).write_bytes(b"new " * 1024)
        installed = tmp_path / f"{setting}.so"
        installed.write_bytes(b"old " * 1024)
        with installed.open("rb") as file:
            mapped[installed] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    lines = copies([f"{setting}={setting}.so" for setting in BUILT])
    assert len(lines) == len(BUILT), lines
    for line in lines:
        subprocess.run(["bash", "-euo", "pipefail", "-c", line], cwd=tmp_path, check=True)
    for installed, old in mapped.items():
        assert installed.read_bytes() == b"new " * 1024
        assert old[:] == b"old " * 1024, "the process goes on with what it had loaded"
    assert len(list(tmp_path.iterdir())) == 1 + len(BUILT), "nothing is left beside them"
