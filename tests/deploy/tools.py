"""The tools that the tests of deployment run, and where the things under test are."""

import os
import shutil
import subprocess
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "deploy" / "helm" / "superbatch"
RULES = ROOT / "deploy" / "prometheus" / "rules.yaml"
DASHBOARD = ROOT / "deploy" / "grafana" / "superbatch.json"
BINARY = Path(os.environ.get("SUPERBATCH_BINARY") or ROOT / "target" / "debug" / "superbatch")
VALUES = sorted((CHART / "values").glob("*.yaml"))
#: The version that templates are rendered for.
KUBERNETES = "1.34.0"
#: Where `tests/deploy/tools.sh` builds to.
BUILT = Path(
    subprocess.run(
        [Path(__file__).parent / "tools.sh", "where"], check=True, capture_output=True, text=True
    ).stdout.strip()
)


def tool(name: str) -> str:
    """The path of a tool: the one that was built, else the system's."""
    built = BUILT / name
    found = (
        str(built)
        if built.exists()
        else shutil.which(name) or shutil.which(str(ROOT / ".venv" / "bin" / name))
    )
    assert found, f"{name} is missing: `make test-deploy` builds it where Go is"
    return found


def call(*command: str | Path, environment: dict | None = None, text: str | None = None) -> str:
    """What the command prints; its errors are shown when it fails."""
    done = subprocess.run(
        [str(part) for part in command],
        input=text,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
    )
    assert done.returncode == 0, (
        f"{command} exited with {done.returncode}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    )
    return done.stdout


def template(*options: str | Path) -> list[dict]:
    """The objects of a release called `superbatch`."""
    text = call(
        tool("helm"),
        "template",
        "superbatch",
        CHART,
        "--namespace",
        "ml",
        "--kube-version",
        KUBERNETES,
        *options,
    )
    return [found for found in yaml.safe_load_all(text) if found]


def find(objects: list[dict], kind: str, name: str) -> dict:
    found = [each for each in objects if each["kind"] == kind and each["metadata"]["name"] == name]
    assert len(found) == 1, f"{len(found)} objects {kind}/{name}"
    return found[0]
