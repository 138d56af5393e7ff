"""The pods of a cluster, as plain values: without rights, on a read-only root, probed, with time to end sessions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from serve.local import ENVIRONMENT

LABELS = {"app.kubernetes.io/name": "causal-forcing", "app.kubernetes.io/part-of": "causal-forcing"}
"""On every pod; network policies and budgets select by them."""

COMPONENT = "app.kubernetes.io/component"
"""Label that holds the pool's name, or `head`."""

USER = 10001
"""User and group of the image."""

WEIGHTS_PATH = "/weights"
"""Where the volume with the models is mounted."""

OBJECT_STORE_BYTES = 512 << 20
"""Shared memory of a node for what travels between processes: a few chunks a session."""

HEALTH_PORT = 52365
"""Port of Ray's agent, which answers for the node's raylet."""

METRICS_PORT = 8080
"""Port that Prometheus scrapes on every pod."""

SERVICE_ACCOUNT_PATH = "/var/run/secrets/kubernetes.io/serviceaccount"

_LOCAL_ONLY = {"RAY_SERVE_LOG_TO_STDERR"}

_MIB = 1 << 20


@dataclass(frozen=True)
class Pod:
    """What differs from pod to pod.

    Attributes:
        component: Pool's name, or `head`.
        image: Container image.
        cpus: CPUs.
        memory_bytes: Memory, requested and at most.
        gpus: Whole GPUs.
        ports: Ports by name.
        ready_path: HTTP path on ``ready_port`` that says whether the pod takes part.
        ready_port: Port of that path.
        drain_s: Longest time that sessions need to end; None for a pod that has none.
        node_selector: Labels of the machines it may run on.
        tolerations: Taints it does not mind.
        weights_claim: Volume claim with the models, if it reads any.
        secrets: Mount path by secret.
    """

    component: str
    image: str
    cpus: int
    memory_bytes: int
    gpus: int = 0
    ports: Mapping[str, int] = field(default_factory=dict)
    ready_path: str = "/api/healthz"
    ready_port: int = HEALTH_PORT
    drain_s: int | None = None
    node_selector: Mapping[str, str] = field(default_factory=dict)
    tolerations: tuple[Mapping[str, Any], ...] = ()
    weights_claim: str | None = None
    secrets: Mapping[str, str] = field(default_factory=dict)


def job(name: str, *, image: str, command: list[str], claim: str, annotations: Mapping[str, str]) -> dict[str, Any]:
    """Return a Job that writes the volume with the models; it alone of all pods may reach the network outside."""
    labels = {**LABELS, COMPONENT: "download"}
    resources = {"cpu": "1", "memory": "2Gi", "ephemeral-storage": "1Gi"}
    container = {
        "name": "download",
        "image": image,
        "command": command,
        "env": [{"name": "HOME", "value": "/tmp"}],
        "resources": {"requests": resources, "limits": {"memory": "2Gi", "ephemeral-storage": "2Gi"}},
        "securityContext": container_security(),
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}, {"name": "weights", "mountPath": WEIGHTS_PATH}],
    }
    pod = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "restartPolicy": "OnFailure",
        "securityContext": pod_security(),
        "containers": [container],
        "volumes": [
            {"name": "tmp", "emptyDir": {"sizeLimit": "1Gi"}},
            {"name": "weights", "persistentVolumeClaim": {"claimName": claim}},
        ],
    }
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name, "labels": labels, "annotations": dict(annotations)},
        "spec": {
            "backoffLimit": 10,
            "ttlSecondsAfterFinished": 86400,
            "template": {"metadata": {"labels": labels}, "spec": pod},
        },
    }


def pod_template(pod: Pod) -> dict[str, Any]:
    """Return the template of a pod with its one container; KubeRay adds the command that starts Ray."""
    spec: dict[str, Any] = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": pod_security(),
        "terminationGracePeriodSeconds": 30 if pod.drain_s is None else pod.drain_s + 60,
        "containers": [_container(pod)],
        "volumes": _volumes(pod),
    }
    if pod.component != "head":
        spec["topologySpreadConstraints"] = [_spread(pod.component, key) for key in ("zone", "host")]
    if pod.node_selector:
        spec["nodeSelector"] = dict(pod.node_selector)
    if pod.tolerations:
        spec["tolerations"] = [dict(toleration) for toleration in pod.tolerations]
    return {"metadata": {"labels": {**LABELS, COMPONENT: pod.component}}, "spec": spec}


def pod_security() -> dict[str, Any]:
    """Return as whom a pod runs."""
    return {
        "runAsNonRoot": True,
        "runAsUser": USER,
        "runAsGroup": USER,
        "fsGroup": USER,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def container_security() -> dict[str, Any]:
    """Return what a container may not do."""
    return {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def environment(weights: bool) -> list[dict[str, str]]:
    """Return the environment of Ray's processes: that of a local service, and no way to a model hub."""
    values = {name: value for name, value in ENVIRONMENT.items() if name not in _LOCAL_ONLY}
    values |= {"HF_HUB_OFFLINE": "1", "HOME": "/tmp"}
    if weights:
        values["CAUSAL_FORCING_WEIGHTS"] = WEIGHTS_PATH
    return [{"name": name, "value": value} for name, value in sorted(values.items())]


def _container(pod: Pod) -> dict[str, Any]:
    resources: dict[str, Any] = {
        "requests": {"cpu": str(pod.cpus), "memory": _mebibytes(pod.memory_bytes), "ephemeral-storage": "2Gi"},
        "limits": {"memory": _mebibytes(pod.memory_bytes), "ephemeral-storage": "10Gi"},
    }
    if pod.gpus:
        resources["limits"]["nvidia.com/gpu"] = pod.gpus
    container: dict[str, Any] = {
        "name": "ray-head" if pod.component == "head" else "ray-worker",
        "image": pod.image,
        "imagePullPolicy": "IfNotPresent",
        "env": environment(pod.weights_claim is not None),
        "ports": [{"name": name, "containerPort": port} for name, port in pod.ports.items()],
        "resources": resources,
        "securityContext": container_security(),
        "startupProbe": _probe("/api/healthz", HEALTH_PORT, period_s=5, failures=60),
        "livenessProbe": _probe("/api/healthz", HEALTH_PORT, period_s=10, failures=12),
        "readinessProbe": _probe(pod.ready_path, pod.ready_port, period_s=5, failures=2),
        "volumeMounts": _mounts(pod),
    }
    if pod.drain_s is not None:
        leave = f"causal-forcing drain --timeout {pod.drain_s}; ray stop --grace-period 10"
        container["lifecycle"] = {"preStop": {"exec": {"command": ["/bin/sh", "-c", leave]}}}
    return container


def _probe(path: str, port: int, *, period_s: int, failures: int) -> dict[str, Any]:
    return {
        "httpGet": {"path": path, "port": port},
        "periodSeconds": period_s,
        "timeoutSeconds": 5,
        "failureThreshold": failures,
    }


def _volumes(pod: Pod) -> list[dict[str, Any]]:
    volumes: list[dict[str, Any]] = [
        {"name": "tmp", "emptyDir": {"sizeLimit": "8Gi"}},
        {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": _mebibytes(2 * OBJECT_STORE_BYTES)}},
    ]
    if pod.weights_claim is not None:
        claim = {"claimName": pod.weights_claim, "readOnly": True}
        volumes.append({"name": "weights", "persistentVolumeClaim": claim})
    volumes += [{"name": name, "secret": {"secretName": name, "defaultMode": 0o440}} for name in pod.secrets]
    return volumes


def _mounts(pod: Pod) -> list[dict[str, Any]]:
    mounts: list[dict[str, Any]] = [
        {"name": "tmp", "mountPath": "/tmp"},
        {"name": "shared-memory", "mountPath": "/dev/shm"},
    ]
    if pod.weights_claim is not None:
        mounts.append({"name": "weights", "mountPath": WEIGHTS_PATH, "readOnly": True})
    mounts += [{"name": name, "mountPath": path, "readOnly": True} for name, path in pod.secrets.items()]
    return mounts


def _spread(component: str, key: str) -> dict[str, Any]:
    topology = {"zone": "topology.kubernetes.io/zone", "host": "kubernetes.io/hostname"}[key]
    return {
        "maxSkew": 1,
        "topologyKey": topology,
        "whenUnsatisfiable": "ScheduleAnyway",
        "labelSelector": {"matchLabels": {**LABELS, COMPONENT: component}},
    }


def _mebibytes(size: int) -> str:
    return f"{-(-size // _MIB)}Mi"
