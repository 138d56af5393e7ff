"""Every rendered manifest fits its schema: Kubernetes' own, or the custom resource's definition."""

from __future__ import annotations

from functools import cache
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.k8s.conftest import LOADER, ROOT, Manifest, name_of, of_kind, rendered

KUBERNETES = "1.33"
DEFINITIONS = "shared/crds"
CORE_GROUPS = {"", "apps", "batch", "networking.k8s.io", "policy"}


@cache
def definitions() -> dict[tuple[str, str, str], Any]:
    """Return schemas by group, version and kind; the definitions are not part of this repository."""
    folder = next((p / DEFINITIONS for p in ROOT.parents if (p / DEFINITIONS).is_dir()), None)
    if folder is None:
        pytest.skip(f"no custom resource definitions in {DEFINITIONS}, in a folder around the repository")
    found = {}
    for path in sorted(folder.glob("*.yaml")):
        spec = yaml.load(path.read_bytes(), Loader=LOADER)["spec"]
        for version in spec["versions"]:
            schema = version["schema"]["openAPIV3Schema"]
            found[spec["group"], version["name"], spec["names"]["kind"]] = closed(schema)
    return found


def closed(schema: Any) -> Any:
    """Return a schema that refuses fields which the API server would drop without a word."""
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    copied = {name: closed(value) for name, value in schema.items()}
    keeps = schema.get("x-kubernetes-preserve-unknown-fields") or schema.get("x-kubernetes-embedded-resource")
    if isinstance(schema.get("properties"), dict) and "type" in schema and not keeps:
        copied.setdefault("additionalProperties", False)
    return copied


def check_custom(manifest: Manifest) -> None:
    group, version = manifest["apiVersion"].split("/")
    schema = dict(definitions()[group, version, manifest["kind"]])
    schema["properties"] = {**schema["properties"], "metadata": {"type": "object"}}
    jsonschema.Draft202012Validator(schema).validate(manifest)


def group_of(manifest: Manifest) -> str:
    return manifest["apiVersion"].rpartition("/")[0]


def test_core_kinds_fit(overlay: tuple[Manifest, ...]) -> None:
    core = [manifest for manifest in overlay if group_of(manifest) in CORE_GROUPS]
    assert len(core) > 10
    for manifest in core:
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)


def test_custom_kinds_fit_their_definitions(overlay: tuple[Manifest, ...]) -> None:
    custom = [manifest for manifest in overlay if group_of(manifest) not in CORE_GROUPS]
    assert "RayService" in {manifest["kind"] for manifest in custom}
    for manifest in custom:
        check_custom(manifest)


def test_pods_inside_custom_resources_fit_as_pods(overlay: tuple[Manifest, ...]) -> None:
    (service,) = of_kind(overlay, "RayService")
    cluster = service["spec"]["rayClusterConfig"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        pod = {"apiVersion": "v1", "kind": "Pod", **group["template"]}
        pod["metadata"] = {"name": "pod", **pod["metadata"]}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def test_a_wrong_field_is_noticed() -> None:
    overlay = rendered("overlays/cpu-demo")
    (service,) = of_kind(overlay, "RayService")
    with pytest.raises(jsonschema.ValidationError, match="rayClusterDeletionDelay"):
        check_custom({**service, "spec": {**service["spec"], "rayClusterDeletionDelay": 5}})
    policy = of_kind(overlay, "NetworkPolicy")[0]
    wrong = {**policy, "spec": {**policy["spec"], "polcyTypes": []}}
    with pytest.raises(kubernetes_validate.ValidationError, match="polcyTypes"):
        kubernetes_validate.validate(wrong, KUBERNETES, strict=True)


def test_names_are_unique(overlay: tuple[Manifest, ...]) -> None:
    names = [name_of(manifest) for manifest in overlay]
    assert len(names) == len(set(names))
