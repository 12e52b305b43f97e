"""Writes tests/deploy/schemas: what kubeconform holds the chart's objects against, without a
network.

    tests/deploy/tools.sh control-plane && python tests/deploy/schemas.py

They are the API server's own, of Kubernetes and of the custom resources' definitions, without
descriptions, and closed: a field that is not known does not fit. Run it after a version in tools.sh
changed.
"""

import json
import tempfile
from pathlib import Path

from control_plane import ControlPlane
from tools import BUILT

FOLDER = Path(__file__).parent / "schemas"
KINDS = {
    "api/v1": ["ConfigMap", "PersistentVolumeClaim", "Pod", "Secret", "Service", "ServiceAccount"],
    "apis/apps/v1": ["Deployment"],
    "apis/autoscaling/v2": ["HorizontalPodAutoscaler"],
    "apis/cert-manager.io/v1": ["Certificate"],
    "apis/keda.sh/v1alpha1": ["ScaledObject"],
    "apis/monitoring.coreos.com/v1": ["PodMonitor", "PrometheusRule", "ServiceMonitor"],
    "apis/networking.k8s.io/v1": ["NetworkPolicy"],
    "apis/policy/v1": ["PodDisruptionBudget"],
}
PREFIX = "#/components/schemas/"
QUANTITY = {"type": ["string", "number", "integer"]}
WITHOUT = {"description", "default", "example"}


def closed(schema, known: dict):
    """The schema without words, its references resolved within one file, and closed to other
    fields.
    """
    if isinstance(schema, list):
        return [closed(each, known) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if len(schema.get("allOf", [])) == 1 and "properties" not in schema:
        return closed(schema["allOf"][0], known)
    if reference := schema.get("$ref"):
        name = reference.removeprefix(PREFIX)
        if name.endswith((".Quantity", ".IntOrString")):
            return QUANTITY
        return {"$ref": f"#/definitions/{name}"}
    made = {}
    for key, value in schema.items():
        if key == "properties":
            made[key] = {name: closed(each, known) for name, each in value.items()}
        elif key not in WITHOUT and not key.startswith("x-"):
            made[key] = closed(value, known)
    if schema.get("x-kubernetes-int-or-string") or schema.get("format") == "int-or-string":
        return QUANTITY
    if "properties" in made and "additionalProperties" not in made:
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            made["additionalProperties"] = False
    # A field that is nothing is as one that is absent.
    if isinstance(made.get("type"), str):
        made["type"] = [made["type"], "null"]
    return made


def referred(schema) -> set[str]:
    if isinstance(schema, list):
        return set().union(*(referred(each) for each in schema)) if schema else set()
    if not isinstance(schema, dict):
        return set()
    own = (
        {schema["$ref"].removeprefix("#/definitions/")}
        if isinstance(schema.get("$ref"), str)
        else set()
    )
    return own.union(*(referred(value) for value in schema.values()))


def standalone(kind: str, known: dict) -> dict:
    name = next(
        name
        for name, schema in known.items()
        if any(each["kind"] == kind for each in schema.get("x-kubernetes-group-version-kind", []))
    )
    root = closed(known[name], known)
    definitions, waiting = {}, referred(root)
    while waiting:
        name = waiting.pop()
        definitions[name] = closed(known[name], known)
        waiting |= referred(definitions[name]) - definitions.keys()
    return {**root, "definitions": dict(sorted(definitions.items()))} if definitions else root


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for old in FOLDER.glob("*-v*.json"):
        old.unlink()
    with tempfile.TemporaryDirectory() as folder, ControlPlane(Path(folder)) as plane:
        plane.define(sorted((BUILT.parent / "crds").glob("*.yaml")))
        for path, kinds in KINDS.items():
            plane.wait(
                path,
                lambda path=path, kinds=kinds: has_all(plane.find(f"/openapi/v3/{path}"), kinds),
            )
            known = plane.find(f"/openapi/v3/{path}")["components"]["schemas"]
            _, *group, version = path.split("/")
            suffix = "-".join([part.split(".")[0] for part in group] + [version])
            for kind in kinds:
                text = json.dumps(standalone(kind, known), separators=(",", ":"), sort_keys=True)
                (FOLDER / f"{kind.lower()}-{suffix}.json").write_text(text + "\n")


def has_all(page: dict | None, kinds: list[str]) -> bool:
    schemas = (page or {}).get("components", {}).get("schemas", {}).values()
    told = {
        each["kind"]
        for schema in schemas
        for each in schema.get("x-kubernetes-group-version-kind", [])
    }
    return set(kinds) <= told


if __name__ == "__main__":
    main()
