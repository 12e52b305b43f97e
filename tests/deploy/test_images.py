"""What images are built from: the Dockerfile is clean, and compose.yaml fits it and the server's
settings.
"""

import re
import shutil
import subprocess
from pathlib import Path

import yaml
from tools import BINARY, ROOT, call

DOCKERFILE = ROOT / "docker" / "Dockerfile"
COMPOSE = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
SETTINGS = (ROOT / "docs" / "configuration.md").read_text()


def hadolint() -> str:
    return shutil.which("hadolint") or str(ROOT / ".venv" / "bin" / "hadolint")


def targets() -> set[str]:
    return set(re.findall(r"^FROM \S+ AS (\S+)$", DOCKERFILE.read_text(), re.MULTILINE))


def test_the_dockerfile_is_clean():
    call(hadolint(), DOCKERFILE)


def test_compose_builds_targets_that_there_are():
    built = {
        service["build"]["target"] for service in COMPOSE["services"].values() if "build" in service
    }
    assert built <= targets()
    assert {"coordinator", "worker-cpu", "worker-cuda", "trainer-demo"} <= targets()


def test_compose_sets_settings_that_there_are():
    """The server ignores variables of other programs, so a misspelt one would do nothing."""
    for name, service in COMPOSE["services"].items():
        if name in ("trainer", "bucket", "s3"):
            continue
        variables = [key for key in service.get("environment", {}) if key.startswith("SUPERBATCH_")]
        for variable in variables:
            path = variable.removeprefix("SUPERBATCH_").lower().replace("__", ".")
            path = "storage.options" if path.startswith("storage.options.") else path
            assert f"| `{path}` |" in SETTINGS, f"{name}: {variable}"


def test_only_this_machine_reaches_what_compose_publishes():
    ports = [port for service in COMPOSE["services"].values() for port in service.get("ports", [])]
    assert ports and all(port.startswith("127.0.0.1:") for port in ports)


def test_what_compose_mounts_is_there():
    for service in COMPOSE["services"].values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (ROOT / "docker" / source).resolve().is_file(), source


def test_the_servers_of_compose_take_their_settings():
    for name in ("coordinator", "worker-1", "worker-2"):
        done = subprocess.run(
            [BINARY, "check-config"],
            env=COMPOSE["services"][name]["environment"],
            capture_output=True,
            text=True,
            cwd=Path("/"),
        )
        assert done.returncode == 0, f"{name}: {done.stderr}"
