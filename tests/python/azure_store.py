"""A real Azure Blob service (azurite) in a process of its own, with one container."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from azure.storage.blob import BlobServiceClient

CONTAINER = "superbatch"
ACCOUNT = "devstoreaccount1"
#: The key that azurite publishes for its only account.
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
VERSION = "3.35.0"
#: Beside the environment, so that it is installed once.
FOLDER = Path(sys.prefix) / "azurite"
SCRIPT = FOLDER / "node_modules" / "azurite" / "dist" / "src" / "blob" / "main.js"


def install() -> None:
    """Installs azurite where npm is, which takes half a minute; skips the tests where it is not."""
    if SCRIPT.exists():
        return
    if not (shutil.which("npm") and shutil.which("node")):
        pytest.skip("NOT TESTED: Azure, since npm is missing (apt-get install npm)")
    command = ["npm", "install", "--no-audit", "--no-fund", "--prefix", FOLDER]
    subprocess.run([*command, f"azurite@{VERSION}"], check=True, capture_output=True)


class Azurite:
    def __init__(self):
        install()
        self.process = subprocess.Popen(
            ["node", SCRIPT, "--blobHost", "127.0.0.1", "--blobPort", "0"]
            + ["--skipApiVersionCheck", "--disableTelemetry", "--inMemoryPersistence", "--silent"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        said = ""
        for line in self.process.stdout:
            said += line
            if found := re.search(r"listens on http://127\.0\.0\.1:(\d+)", line):
                self.port = int(found.group(1))
                break
        else:
            raise AssertionError(f"azurite did not come up:\n{said}")
        self.endpoint = f"http://127.0.0.1:{self.port}/{ACCOUNT}"
        connection = f"AccountName={ACCOUNT};AccountKey={KEY};BlobEndpoint={self.endpoint};"
        service = BlobServiceClient.from_connection_string(
            "DefaultEndpointsProtocol=http;" + connection
        )
        self.container = service.create_container(CONTAINER)

    def upload(self, folder: Path) -> None:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                name = path.relative_to(folder).as_posix()
                self.container.upload_blob(name, path.read_bytes())

    def keys(self, prefix: str) -> list[str]:
        return list(self.container.list_blob_names(name_starts_with=prefix))

    @property
    def environment(self) -> dict[str, str]:
        """How a deployment tells processes where Azure is and who they are."""
        return {
            "AZURE_STORAGE_ACCOUNT_NAME": ACCOUNT,
            "AZURE_STORAGE_ACCOUNT_KEY": KEY,
            "AZURE_STORAGE_ENDPOINT": self.endpoint,
            "AZURE_ALLOW_HTTP": "true",
        }

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
