"""The Helm chart, as far as no cluster is needed: lint, schemas, unit tests, and whether the server
takes its settings.
"""

import subprocess
import sys
from pathlib import Path

import pytest
from tools import BINARY, CHART, KUBERNETES, ROOT, VALUES, call, find, template, tool

SCHEMAS = Path(__file__).parent / "schemas"
MINIMAL = CHART / "tests" / "minimal.yaml"
#: Everything at once that does not exclude each other.
FULL = [
    "--set",
    "metrics.serviceMonitor.enabled=true",
    "--set",
    "metrics.podMonitor.enabled=true",
    "--set",
    "metrics.prometheusRule.enabled=true",
    "--set",
    "metrics.dashboard.enabled=true",
    "--set",
    "worker.diskCache.enabled=true",
    "--set",
    "tests.source=s3://data/small",
    "--set",
    "auth.metrics.enabled=true,coordinator.audit.enabled=true",
    "--set",
    "coordinator.audit.volume.persistentVolumeClaim.claimName=audit",
    "--set",
    "tls.requireClientCertificates=true",
]


def options(values: Path) -> list[str | Path]:
    return ["--values", values, *FULL]


@pytest.mark.parametrize("values", [MINIMAL, *VALUES], ids=lambda path: path.stem)
def test_the_chart_lints(values: Path):
    call(tool("helm"), "lint", "--strict", CHART, "--kube-version", KUBERNETES, *options(values))


@pytest.mark.parametrize(
    "extra", [[], ["--set", "worker.hpa.enabled=true,worker.keda.enabled=false"]], ids=["", "hpa"]
)
@pytest.mark.parametrize("values", [MINIMAL, *VALUES], ids=lambda path: path.stem)
def test_every_object_fits_its_schema(values: Path, extra: list[str]):
    if extra and values.stem == "one-node":
        extra = ["--set", "state.persistence.storageClass=fast"]
    manifest = call(
        tool("helm"),
        "template",
        "superbatch",
        CHART,
        "--namespace",
        "ml",
        "--kube-version",
        KUBERNETES,
        *options(values),
        *extra,
    )
    location = f"{SCHEMAS}/{{{{.ResourceKind}}}}{{{{.KindSuffix}}}}.json"
    call(tool("kubeconform"), "-strict", "-schema-location", location, "-summary", text=manifest)


def test_a_misspelt_field_does_not_fit():
    """The schemas would say nothing if they were open."""
    manifest = call(
        tool("helm"),
        "template",
        "superbatch",
        CHART,
        "--kube-version",
        KUBERNETES,
        *options(MINIMAL),
        "--set",
        "securityContext.runAsNonRoott=true",
    )
    location = f"{SCHEMAS}/{{{{.ResourceKind}}}}{{{{.KindSuffix}}}}.json"
    with pytest.raises(AssertionError, match="runAsNonRoott"):
        call(tool("kubeconform"), "-strict", "-schema-location", location, text=manifest)


def test_unit_tests():
    said = call(tool("helm-unittest"), "--strict", CHART)
    count = int(said.split("Tests:")[1].split("passed")[0].split(",")[-1])
    assert count >= 60, said


def test_what_is_derived_is_not_stale():
    call(sys.executable, ROOT / "scripts" / "chart.py", "--check")


def test_pods_start_anew_exactly_when_their_role_changes():
    def checksums(*extra: str) -> list[str]:
        objects = template(*options(MINIMAL), *extra)
        pods = [
            find(objects, "Deployment", f"superbatch-{role}")["spec"]["template"]
            for role in ("coordinator", "worker")
        ]
        return [pod["metadata"]["annotations"]["checksum/config"] for pod in pods]

    before = checksums()
    assert checksums() == before
    changed = checksums("--set", "coordinator.config.coordinator.max_runs=8")
    assert changed[0] != before[0] and changed[1] == before[1]


@pytest.mark.parametrize("role", ["coordinator", "worker"])
@pytest.mark.parametrize("values", VALUES, ids=lambda path: path.stem)
def test_the_server_takes_the_settings(values: Path, role: str, tmp_path: Path):
    """Names of settings drift; the server refuses those that it does not know."""
    settings = find(template(*options(values)), "ConfigMap", "superbatch")["data"]
    if f"{role}.yaml" not in settings:
        assert values.stem == "one-node" and role == "worker"
        return
    path = tmp_path / "settings.yaml"
    path.write_text(settings[f"{role}.yaml"])
    address = "https://10.0.0.7:50052"
    done = subprocess.run(
        [BINARY, "check-config", "--config", path],
        capture_output=True,
        text=True,
        env={"SUPERBATCH_WORKER_ROLE__ADVERTISE_ADDRESS": address} if role == "worker" else {},
    )
    assert done.returncode == 0, done.stderr
