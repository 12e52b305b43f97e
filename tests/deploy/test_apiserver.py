"""The chart against a real API server with the custom resources of KEDA, the Prometheus operator
and cert-manager.
"""

import base64
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from control_plane import ControlPlane
from tools import BUILT, CHART, VALUES

NEEDED = [
    "scaledobjects",
    "triggerauthentications",
    "servicemonitors",
    "podmonitors",
    "prometheusrules",
    "certificates",
]
#: What a release may leave of itself, were it not for the chart: every kind that it has.
PATHS = {
    "Deployment": "apis/apps/v1",
    "Service": "api/v1",
    "ConfigMap": "api/v1",
    "Secret": "api/v1",
    "ServiceAccount": "api/v1",
    "PersistentVolumeClaim": "api/v1",
    "NetworkPolicy": "apis/networking.k8s.io/v1",
    "PodDisruptionBudget": "apis/policy/v1",
    "HorizontalPodAutoscaler": "apis/autoscaling/v2",
    "ScaledObject": "apis/keda.sh/v1alpha1",
    "Certificate": "apis/cert-manager.io/v1",
    "ServiceMonitor": "apis/monitoring.coreos.com/v1",
    "PodMonitor": "apis/monitoring.coreos.com/v1",
    "PrometheusRule": "apis/monitoring.coreos.com/v1",
    "ReplicaSet": "apis/apps/v1",
    "Pod": "api/v1",
}
PLURALS = {"NetworkPolicy": "networkpolicies"}


@pytest.fixture(scope="module")
def plane(tmp_path_factory) -> Iterator[ControlPlane]:
    with ControlPlane(tmp_path_factory.mktemp("plane")) as plane:
        definitions = sorted((BUILT.parent / "crds").glob("*.yaml"))
        wanted = [path for path in definitions if path.stem.split("_")[-1] in NEEDED]
        assert len(wanted) == len(NEEDED), "tests/deploy/tools.sh control-plane fetches them"
        plane.define(wanted)
        yield plane


def listed(plane: ControlPlane, kind: str, namespace: str) -> list[dict]:
    plural = PLURALS.get(kind, kind.lower() + "s")
    label = "labelSelector=app.kubernetes.io%2Finstance%3Dsuperbatch"
    return plane.find(f"/{PATHS[kind]}/namespaces/{namespace}/{plural}?{label}")["items"]


def one(plane: ControlPlane, kind: str, namespace: str, name: str) -> dict:
    return next(
        found for found in listed(plane, kind, namespace) if found["metadata"]["name"] == name
    )


def left(plane: ControlPlane, namespace: str) -> list[str]:
    return [
        f"{kind}/{found['metadata']['name']}"
        for kind in PATHS
        for found in listed(plane, kind, namespace)
    ]


@pytest.mark.parametrize("values", VALUES, ids=lambda path: path.stem)
def test_a_release_lives_and_leaves_nothing(plane: ControlPlane, values: Path):
    namespace = values.stem
    full = [
        "--values",
        values,
        "--set",
        "metrics.serviceMonitor.enabled=true,metrics.podMonitor.enabled=true",
    ]
    full += ["--set", "metrics.prometheusRule.enabled=true,metrics.dashboard.enabled=true"]
    where = ["superbatch", CHART, "--namespace", namespace]
    plane.helm("install", *where, "--create-namespace", *full)
    manifest = list(
        yaml.safe_load_all(plane.helm("get", "manifest", "superbatch", "--namespace", namespace))
    )
    wanted = {(each["kind"], each["metadata"]["name"]) for each in manifest if each}
    there = {
        (kind, found["metadata"]["name"])
        for kind in PATHS
        for found in listed(plane, kind, namespace)
    }
    assert wanted <= there

    def secrets() -> dict:
        return {
            found["metadata"]["name"]: found["data"] for found in listed(plane, "Secret", namespace)
        }

    def pod() -> dict:
        return one(plane, "Deployment", namespace, "superbatch-coordinator")["spec"]["template"]

    first, made = pod(), secrets()
    plane.helm("upgrade", *where, *full, "--set", "coordinator.config.coordinator.max_runs=7")
    second = pod()
    checksum = "checksum/config"
    assert second["metadata"]["annotations"][checksum] != first["metadata"]["annotations"][checksum]
    assert secrets() == made, "an upgrade keeps keys and tokens"
    assert (
        "max_runs: 7"
        in one(plane, "ConfigMap", namespace, "superbatch")["data"]["coordinator.yaml"]
    )

    plane.helm("rollback", "superbatch", "1", "--namespace", namespace)
    assert pod() == first
    assert secrets() == made, "so does a rollback"

    plane.helm("uninstall", "superbatch", "--namespace", namespace)
    kept = ["PersistentVolumeClaim/superbatch-state"] if values.stem == "one-node" else []
    plane.wait("the end of the release", lambda: left(plane, namespace) == kept)


def test_a_rollback_brings_back_tokens_that_were_revoked(plane: ControlPlane):
    """What docs/deploy.md warns of: Helm applies the Secret that it stored with the revision."""
    namespace = "revoked"
    path = f"/api/v1/namespaces/{namespace}/secrets/superbatch-tokens"
    where = ["superbatch", CHART, "--namespace", namespace]
    minimal = ["--values", CHART / "tests" / "minimal.yaml"]
    plane.helm("install", *where, "--create-namespace", *minimal)

    def secret() -> dict:
        return plane.find(path)

    made = secret()["data"]
    changed = {**made, "tokens": base64.b64encode(b"tokens: []").decode(), "alice": "c2J0"}
    plane.ask("PUT", path, {**secret(), "data": changed})
    assert secret()["data"] == changed
    plane.helm("upgrade", *where, *minimal)
    assert secret()["data"] == changed, "an upgrade keeps what was revoked and added"
    plane.helm("rollback", "superbatch", "1", "--namespace", namespace)
    assert secret()["data"] == made


def test_pods_are_admitted_under_the_restricted_standard(plane: ControlPlane):
    """The API server's own judgement of the security contexts: a pod that breaks the standard would
    not be created.
    """
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    plane.ask(
        "POST",
        "/api/v1/namespaces",
        {
            "apiVersion": "v1",
            "kind": "Namespace",
            "metadata": {"name": "restricted", "labels": labels},
        },
    )
    plane.helm(
        "install",
        "superbatch",
        CHART,
        "--namespace",
        "restricted",
        "--values",
        CHART / "tests" / "minimal.yaml",
    )

    def pods() -> dict[str, int]:
        roles = [
            found["metadata"]["labels"]["app.kubernetes.io/component"]
            for found in listed(plane, "Pod", "restricted")
        ]
        return {role: roles.count(role) for role in roles}

    plane.wait("the pods", lambda: pods() == {"coordinator": 1, "worker": 2})
