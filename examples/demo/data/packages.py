"""Fetches the packages that hold the pictures, with npm itself, and checks each against its
SHA-256.
"""

import hashlib
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from ..progress import Stage


class DemoError(RuntimeError):
    """Something that the person at the keyboard can put right; its text says what and how."""


@dataclass(frozen=True)
class Package:
    """One pinned npm package and what may be done with its pictures."""

    name: str
    version: str
    sha256: str
    megabytes: float
    license: str
    credit: str

    @property
    def archive(self) -> str:
        return f"{self.name.lstrip('@').replace('/', '-')}-{self.version}.tgz"


PACKAGES = {
    "google": Package(
        "emoji-datasource-google",
        "16.0.0",
        "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
        74.3,
        "Apache-2.0",
        "Noto Emoji by Google, packaged by emoji-data",
    ),
    "twitter": Package(
        "emoji-datasource-twitter",
        "16.0.0",
        "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
        61.7,
        "CC-BY-4.0",
        "Twemoji, copyright Twitter, Inc. and other contributors, packaged by emoji-data",
    ),
    "openmoji": Package(
        "openmoji",
        "17.0.0",
        "55ee7d13485dec86e9f38c1f3a645a13382d33ff97c0cd845ee824b0aef45e68",
        4.3,
        "CC-BY-SA-4.0",
        "OpenMoji, the open-source emoji and icon project",
    ),
    "fluent": Package(
        "fluentui-emoji",
        "1.3.0",
        "ec892e607e854859b812c7d827801756adc19955b0ef56d4ae8afcddd19492c5",
        23.8,
        "MIT",
        "Fluent Emoji, copyright Microsoft Corporation",
    ),
}


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(cache: Path) -> dict[str, Path]:
    """The archives of PACKAGES by source name, downloaded into `cache` where they are not there
    yet.

    Raises DemoError where npm is missing, cannot fetch, or brings other bytes than those pinned.
    """
    cache.mkdir(parents=True, exist_ok=True)
    missing = [
        p
        for p in PACKAGES.values()
        if not (cache / p.archive).exists() or sha256(cache / p.archive) != p.sha256
    ]
    if missing and shutil.which("npm") is None:
        raise DemoError(
            "npm is missing: the demo's pictures come from npm packages. Install it (Debian: "
            "apt-get install npm) and run `make demo` again."
        )
    total = sum(p.megabytes for p in missing)
    stage = Stage("fetch packages", round(total), "MB", silent=not missing)
    # Together: a registry takes longer to answer than the bytes take to come.
    with ThreadPoolExecutor(max_workers=len(PACKAGES)) as pool:
        coming = {pool.submit(download, package, cache): package for package in missing}
        for done in as_completed(coming):
            done.result()
            stage.update(round(coming[done].megabytes))
    stage.close()
    return {source: cache / package.archive for source, package in PACKAGES.items()}


def download(package: Package, cache: Path) -> None:
    wanted = f"{package.name}@{package.version}"
    command = [
        "npm",
        "pack",
        wanted,
        "--silent",
        "--ignore-scripts",
        "--pack-destination",
        str(cache),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise DemoError(
            f"`npm pack {wanted}` failed; is the registry reachable? npm "
            f"said:\n{done.stderr.strip()}"
        )
    found = sha256(cache / package.archive)
    if found != package.sha256:
        (cache / package.archive).unlink()
        raise DemoError(
            f"{wanted} has SHA-256 {found}, not the pinned {package.sha256}; it was thrown away."
        )


def members(archive: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """(path below `package/`, bytes) of the archive's files that `wanted` says yes to, in the
    archive's order.
    """
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            path = member.name.removeprefix("package/")
            if member.isfile() and wanted(path):
                yield path, tar.extractfile(member).read()
