"""Packs the server's binary as a wheel, which runs on the LibTorch of the torch beside it.

Usage: python scripts/server_wheel.py BINARY FOLDER
"""

import base64
import hashlib
import re
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LAUNCHER = '''"""The superbatch server: `superbatch serve`, as a program that pip installs."""

import importlib.util
import os
import sys
from pathlib import Path


def main() -> None:
    """Becomes the binary, with the libraries of the installed torch on its path."""
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        raise SystemExit("superbatch needs LibTorch: pip install torch==TORCH")
    libraries = [str(Path(torch.origin).parent / "lib"), os.environ.get("LD_LIBRARY_PATH", "")]
    os.environ["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, libraries))
    binary = Path(__file__).with_name("superbatch")
    os.execv(binary, ["superbatch", *sys.argv[1:]])
'''


def found(pattern: str, path: str) -> str:
    return re.search(pattern, (ROOT / path).read_text(), re.MULTILINE)[1]


def pack(binary: Path, folder: Path) -> Path:
    """Returns the wheel's path."""
    version = found(r'^version = "(.+)"', "Cargo.toml")
    torch = found(r"^torch==(\S+)", "requirements.txt")
    platform = re.sub(r"[-.]", "_", sysconfig.get_platform())
    name, about = "superbatch_server", f"superbatch_server-{version}.dist-info"
    with tempfile.NamedTemporaryFile() as stripped:
        # Symbols for debuggers are most of its bytes.
        subprocess.run(["strip", "-o", stripped.name, binary], check=True)
        program = Path(stripped.name).read_bytes()
    files = {
        f"{name}/__init__.py": LAUNCHER.replace("TORCH", torch).encode(),
        f"{name}/superbatch": program,
        f"{about}/METADATA": (
            f"Metadata-Version: 2.1\nName: superbatch-server\nVersion: {version}\n"
            "Summary: The server of Superbatch: chooses batches for your learner\n"
            f"License: Apache-2.0\nRequires-Python: >=3.11\nRequires-Dist: torch=={torch}\n"
        ).encode(),
        f"{about}/WHEEL": (
            "Wheel-Version: 1.0\nGenerator: superbatch\nRoot-Is-Purelib: false\n"
            f"Tag: py3-none-{platform}\n"
        ).encode(),
        f"{about}/entry_points.txt": f"[console_scripts]\nsuperbatch = {name}:main\n".encode(),
    }
    record = f"{about}/RECORD"
    lines = [f"{path},sha256={digest(data)},{len(data)}" for path, data in files.items()]
    files[record] = "\n".join([*lines, f"{record},,", ""]).encode()
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / f"{name}-{version}-py3-none-{platform}.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, data in files.items():
            # A fixed date, so that the same binary makes the same wheel.
            member = zipfile.ZipInfo(path, (1980, 1, 1, 0, 0, 0))
            member.external_attr = (0o100755 if data is program else 0o100644) << 16
            member.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(member, data)
    return wheel


def digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


if __name__ == "__main__":
    print(pack(Path(sys.argv[1]), Path(sys.argv[2])))
