"""What images are built from: the Dockerfile is clean and finds what it copies, images have what
their programs import, and compose.yaml fits the Dockerfile and the server's settings.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from dockerfile import DOCKERFILE, arguments, context, from_context, instructions, passes, stages
from imports import distributions, foreign, installed
from tools import BINARY, ROOT, call

COMPOSE = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
SETTINGS = (ROOT / "docs" / "configuration.md").read_text()


def hadolint() -> str:
    return shutil.which("hadolint") or str(ROOT / ".venv" / "bin" / "hadolint")


def run_with_pip(stage: str) -> str:
    """The command by which a stage installs Python packages."""
    runs = [each.text for each in instructions() if each.stage == stage and each.name == "RUN"]
    (found,) = [text for text in runs if "pip install" in text]
    for name, default in arguments().items():
        found = found.replace(f"${{{name}}}", default)
    return found


def packages(stage: str) -> list[str]:
    """The packages of PyPI that a stage asks pip for."""
    (command,) = [part for part in run_with_pip(stage).split("&&") if "pip install" in part]
    words = shlex.split(command.split("pip install")[1])
    options = {"--constraint"}
    values = [word for before, word in zip(words, words[1:], strict=False) if before in options]
    return [word for word in words if word[0] not in "-/" and word not in values]


def test_the_dockerfile_is_clean():
    call(hadolint(), DOCKERFILE)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("transport/src/lib.rs", True),
        ("client/python/pyproject.toml", True),
        ("requirements.txt", True),
        ("docs/deploy.md", False),
        ("server/target/debug/superbatch", False),
        ("target", False),
        ("tests/src/lib.rs", True),
        ("tests/deploy/tools.py", False),
        ("client/python/python/superbatch/_superbatch.so", False),
        ("somewhere/client", False),
    ],
)
def test_dockerignore_is_read_as_builders_do(path: str, expected: bool):
    assert passes(path) is expected


def test_what_the_dockerfile_copies_reaches_the_builder():
    """COPY of what .dockerignore leaves out ends the build."""
    sources = list(from_context())
    assert ("trainer-demo", "requirements.txt") in sources
    names = context()
    for stage, source in sources:
        if source.startswith("docker/given/"):
            # Built by whoever says BINARY=given.
            assert passes(source), f"{stage}: {source}"
            continue
        below = [name for name in names if source in (".", name) or name.startswith(f"{source}/")]
        assert below, f"{stage} copies {source}, of which .dockerignore leaves nothing"


def test_the_workspace_loads_from_what_reaches_the_builder(tmp_path: Path):
    """cargo reads the manifest of every member before it builds any."""
    for name in context():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, path)
    read = ("metadata", "--no-deps", "--offline", "--format-version", "1", "--manifest-path")
    found = json.loads(call("cargo", *read, tmp_path / "Cargo.toml"))
    everything = json.loads(call("cargo", *read, ROOT / "Cargo.toml"))
    names = [{each["name"] for each in workspace["packages"]} for workspace in (found, everything)]
    assert names[0] == names[1]
    for each in found["packages"]:
        for target in each["targets"]:
            assert Path(target["src_path"]).is_file(), target["src_path"]


@pytest.mark.parametrize(
    ("stage", "module"), [("trainer-demo", "demo.train"), ("s3-demo", "demo.secrets")]
)
def test_images_have_what_their_programs_import(stage: str, module: str):
    there = installed(packages(stage))
    imports = foreign(module)
    assert imports
    missing = {package: by for package, by in imports.items() if not distributions(package) & there}
    assert not missing, f"{stage} does not install what these modules import: {missing}"


def test_the_walk_of_imports_sees_what_is_imported_on_the_way():
    imports = foreign("demo.train")
    assert imports["boto3"] == "demo.train"
    assert imports["resvg_py"] == "examples.demo.data.render"
    assert "pyarrow" in imports and "json" not in imports and "examples" not in imports


def test_pip_takes_the_pins_of_the_trainer(tmp_path: Path):
    """All of them are installed here, so nothing is fetched. pip refuses a file of constraints that
    names extras.
    """
    run = run_with_pip("trainer-demo")
    expression = re.search(r"sed '(.+?)' /pins/requirements.txt > /constraints.txt", run)
    assert expression and "--constraint /constraints.txt" in run
    pins = tmp_path / "pins.txt"
    pins.write_text(call("sed", expression[1], ROOT / "requirements.txt"))
    pip = (sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", "--no-deps")
    call(*pip, "--constraint", pins, *packages("trainer-demo"))


def test_compose_builds_targets_that_there_are():
    built = {
        service["build"]["target"] for service in COMPOSE["services"].values() if "build" in service
    }
    assert built <= stages()
    assert {"coordinator", "worker-cpu", "worker-cuda", "trainer-demo"} <= stages()


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
