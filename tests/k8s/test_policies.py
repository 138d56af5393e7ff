"""What every pod of every overlay keeps to, whoever wrote its manifest."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from serve.deploy.pods import SERVICE_ACCOUNT_PATH
from serve.local import ENVIRONMENT
from tests.k8s.conftest import Manifest, name_of, of_kind, rendered

OURS = {"app.kubernetes.io/part-of": "causal-forcing"}


def pods(overlay: tuple[Manifest, ...]) -> Iterator[tuple[str, Manifest, Manifest]]:
    """Yield name, labels and spec of every pod there can be."""
    for manifest in overlay:
        if manifest["kind"] == "RayService":
            cluster = manifest["spec"]["rayClusterConfig"]
            groups = [("head", cluster["headGroupSpec"])] + [(g["groupName"], g) for g in cluster["workerGroupSpecs"]]
            templates = [(name, group["template"]) for name, group in groups]
        elif manifest["kind"] in {"Job", "StatefulSet", "Deployment"}:
            templates = [(name_of(manifest), manifest["spec"]["template"])]
        else:
            continue
        for name, template in templates:
            yield name, template["metadata"]["labels"], template["spec"]


def containers(overlay: tuple[Manifest, ...]) -> Iterator[tuple[str, Manifest]]:
    for name, _, spec in pods(overlay):
        for container in spec["containers"] + spec.get("initContainers", []):
            yield f"{name}/{container['name']}", container


def test_pods_have_no_rights(overlay: tuple[Manifest, ...]) -> None:
    for name, _, spec in pods(overlay):
        assert spec["automountServiceAccountToken"] is False, name
        assert "serviceAccountName" not in spec, name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec), name
        assert not any("hostPath" in volume for volume in spec.get("volumes", [])), name
        security = spec["securityContext"]
        assert security["runAsNonRoot"] is True, name
        assert security["runAsUser"] > 0, name
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}, name


def test_containers_cannot_gain_rights_or_write_outside_of_volumes(overlay: tuple[Manifest, ...]) -> None:
    (service,) = of_kind(overlay, "RayService")
    autoscaler = service["spec"]["rayClusterConfig"]["autoscalerOptions"]
    for name, container in [*containers(overlay), ("autoscaler", autoscaler)]:
        security = container["securityContext"]
        assert security["allowPrivilegeEscalation"] is False, name
        assert security["readOnlyRootFilesystem"] is True, name
        assert security["capabilities"] == {"drop": ["ALL"]}, name
        assert "privileged" not in security, name


def test_containers_say_what_they_take(overlay: tuple[Manifest, ...]) -> None:
    for name, container in containers(overlay):
        resources = container["resources"]
        assert {"cpu", "memory", "ephemeral-storage"} <= set(resources["requests"]), name
        assert resources["limits"]["memory"] == resources["requests"]["memory"], name


def test_all_of_rays_processes_run_with_what_a_local_service_sets(overlay: tuple[Manifest, ...]) -> None:
    """Above all with chunks inside of calls, which every process of a cluster must agree on."""
    wanted = {name: value for name, value in ENVIRONMENT.items() if name != "RAY_SERVE_LOG_TO_STDERR"}
    assert "RAY_max_direct_call_object_size" in wanted
    rays = {name: found for name, found in containers(overlay) if name.endswith(("/ray-head", "/ray-worker"))}
    assert len(rays) > 1
    for name, container in rays.items():
        given = {entry["name"]: entry.get("value") for entry in container["env"]}
        assert wanted.items() <= given.items(), name


def test_images_have_a_tag_that_says_something(overlay: tuple[Manifest, ...]) -> None:
    for name, container in containers(overlay):
        tag = container["image"].rpartition(":")[2]
        assert tag not in {"", "latest", container["image"]}, name


def test_what_serves_is_probed_in_every_phase(overlay: tuple[Manifest, ...]) -> None:
    for name, labels, spec in pods(overlay):
        for container in spec["containers"]:
            wanted = {"startupProbe", "livenessProbe", "readinessProbe"}
            if labels["app.kubernetes.io/component"] == "download":
                assert not wanted & set(container), name
            else:
                assert wanted <= set(container), name


def test_only_the_autoscaler_gets_at_the_kubernetes_api(overlay: tuple[Manifest, ...]) -> None:
    for name, container in containers(overlay):
        assert all(mount["mountPath"] != SERVICE_ACCOUNT_PATH for mount in container["volumeMounts"]), name
    (service,) = of_kind(overlay, "RayService")
    cluster = service["spec"]["rayClusterConfig"]
    mounts = {mount["name"]: mount["mountPath"] for mount in cluster["autoscalerOptions"]["volumeMounts"]}
    assert mounts["kubernetes-api"] == SERVICE_ACCOUNT_PATH
    volumes = {volume["name"] for volume in cluster["headGroupSpec"]["template"]["spec"]["volumes"]}
    assert set(mounts) <= volumes


def test_secrets_are_named_not_told(overlay: tuple[Manifest, ...]) -> None:
    assert not of_kind(overlay, "Secret")
    for name, container in containers(overlay):
        for variable in container.get("env", []):
            is_secret = any(word in variable["name"].lower() for word in ("password", "token", "key"))
            is_secret = is_secret and variable["name"] != "TOKENIZERS_PARALLELISM"
            assert not (is_secret and "value" in variable), f"{name}: {variable['name']}"


def test_the_namespace_lets_no_other_pods_in(overlay: tuple[Manifest, ...]) -> None:
    (namespace,) = of_kind(overlay, "Namespace")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    for manifest in overlay:
        if manifest["kind"] != "Namespace":
            assert manifest["metadata"]["namespace"] == namespace["metadata"]["name"], name_of(manifest)


def matches(selector: Manifest, labels: Manifest) -> bool:
    """Return whether a label selector takes a pod."""
    for one in selector.get("matchExpressions", []):
        inside = labels.get(one["key"]) in one["values"]
        assert one["operator"] in {"In", "NotIn"}
        if inside != (one["operator"] == "In"):
            return False
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())


def policies_of(overlay: tuple[Manifest, ...], labels: Manifest, way: str) -> list[Manifest]:
    chosen = [policy["spec"] for policy in of_kind(overlay, "NetworkPolicy") if way in policy["spec"]["policyTypes"]]
    return [spec for spec in chosen if matches(spec["podSelector"], labels)]


def test_every_pod_is_closed_in_both_directions(overlay: tuple[Manifest, ...]) -> None:
    for name, labels, _ in pods(overlay):
        for way in ("Ingress", "Egress"):
            assert policies_of(overlay, labels, way), f"{name}: {way}"


def ways_in(overlay: tuple[Manifest, ...], labels: Manifest) -> dict[Any, list[Manifest]]:
    """Return who may reach a pod, by port; None is every port."""
    found: dict[Any, list[Manifest]] = {}
    for spec in policies_of(overlay, labels, "Ingress"):
        for rule in spec.get("ingress", []):
            assert rule.get("from"), f"{spec}: from anywhere"
            for port in rule.get("ports", [{"port": None}]):
                found.setdefault(port["port"], []).extend(rule["from"])
    return found


def test_rays_ports_are_open_to_rays_pods_alone(overlay: tuple[Manifest, ...]) -> None:
    for name, labels, spec in pods(overlay):
        if spec["containers"][0]["name"] not in {"ray-head", "ray-worker"}:
            continue
        ways = ways_in(overlay, labels)
        assert set(ways) <= {None, 8000, 8080, 8265, 9000, 44217, 44227}, name
        assert not {6379, 10001} & set(ways), name
        for peer in ways[None]:
            assert "namespaceSelector" not in peer, name
            assert matches(peer["podSelector"], labels), name
            for other, foreign in (("download", {**OURS, "app.kubernetes.io/component": "download"}), ("none", {})):
                assert not matches(peer["podSelector"], foreign), f"{name} from {other}"


def test_the_dashboard_is_open_to_the_operator_alone(overlay: tuple[Manifest, ...]) -> None:
    head = {**OURS, "app.kubernetes.io/component": "head"}
    for peer in ways_in(overlay, head)[8265]:
        assert matches(peer["podSelector"], {"app.kubernetes.io/name": "kuberay-operator"})
        assert not matches(peer["podSelector"], {"app.kubernetes.io/name": "anything"})
    for component in ("gateway", "generator", "codec"):
        assert 8265 not in ways_in(overlay, {**OURS, "app.kubernetes.io/component": component})


def test_clients_reach_gateways_alone(overlay: tuple[Manifest, ...]) -> None:
    open_to = {
        labels["app.kubernetes.io/component"] for _, labels, _ in pods(overlay) if 9000 in ways_in(overlay, labels)
    }
    assert open_to == {"gateway"}
    named = {
        labels["app.kubernetes.io/component"]
        for _, labels, spec in pods(overlay)
        if any(port["name"] == "serve-grpc" for port in spec["containers"][0].get("ports", []))
    }
    assert named == {"gateway", "head"}  # KubeRay reads the Service's ports off the head, and then leaves the head out
    (service,) = of_kind(overlay, "RayService")
    assert service["spec"]["excludeHeadPodFromServeSvc"] is True
    ports = service["spec"]["serveService"]["spec"]["ports"]
    assert [port["targetPort"] for port in ports] == ["serve", "serve-grpc"]
    assert ports[1]["appProtocol"] == "kubernetes.io/h2c"


def test_every_pool_has_a_budget_that_works_without_a_controller(overlay: tuple[Manifest, ...]) -> None:
    budgets = of_kind(overlay, "PodDisruptionBudget")
    for name, labels, spec in pods(overlay):
        if spec["containers"][0]["name"] in {"ray-head", "ray-worker"}:
            (budget,) = [b["spec"] for b in budgets if matches(b["spec"]["selector"], labels)]
            assert isinstance(budget["minAvailable"], int), name


def test_pools_spread_over_zones_and_hosts(overlay: tuple[Manifest, ...]) -> None:
    for name, labels, spec in pods(overlay):
        if spec["containers"][0]["name"] != "ray-worker":
            continue
        keys = {spread["topologyKey"] for spread in spec["topologySpreadConstraints"]}
        assert keys == {"kubernetes.io/hostname", "topology.kubernetes.io/zone"}, name
        for spread in spec["topologySpreadConstraints"]:
            assert matches(spread["labelSelector"], labels), name


def test_the_head_runs_no_replicas(overlay: tuple[Manifest, ...]) -> None:
    (service,) = of_kind(overlay, "RayService")
    head = service["spec"]["rayClusterConfig"]["headGroupSpec"]
    assert head["rayStartParams"]["num-cpus"] == "0"


def test_rays_autoscaler_finds_a_pool_for_every_replica(overlay: tuple[Manifest, ...]) -> None:
    """Ray's own reading of the manifest: the node types that its autoscaler will start."""
    from ray.autoscaler._private.kuberay.autoscaling_config import _generate_available_node_types_from_ray_cr_spec

    (service,) = of_kind(overlay, "RayService")
    types = _generate_available_node_types_from_ray_cr_spec(service["spec"]["rayClusterConfig"])
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    for deployment in application["deployments"]:
        options = deployment["ray_actor_options"]
        needs = {"CPU": options["num_cpus"], **options["resources"]}
        if options.get("num_gpus"):
            needs["GPU"] = options["num_gpus"]
        homes = [n for n, t in types.items() if all(t["resources"].get(k, 0) >= v for k, v in needs.items())]
        assert len(homes) == 1, deployment["name"]
        assert types[homes[0]]["max_workers"] > 0


@pytest.mark.parametrize("name", ["gpu", "gpu-redis"])
def test_models_are_fetched_once_pinned_and_read_only_by_pods(name: str) -> None:
    overlay = rendered(f"overlays/{name}")
    (job,) = of_kind(overlay, "Job")
    sums = job["metadata"]["annotations"].values()
    assert len(sums) == 4
    assert all(len(text.split("@")[1]) == 40 and text.startswith("sha256:") for text in sums)
    readers = [spec for _, _, spec in pods(overlay) if spec["containers"][0]["name"] == "ray-worker"]
    mounts = [m for spec in readers for m in spec["containers"][0]["volumeMounts"] if m["name"] == "weights"]
    assert len(mounts) == 2
    assert all(mount["readOnly"] for mount in mounts)
    way_out = policies_of(overlay, job["spec"]["template"]["metadata"]["labels"], "Egress")
    assert any(rule.get("ports") == [{"port": 443, "protocol": "TCP"}] for s in way_out for rule in s.get("egress", []))
