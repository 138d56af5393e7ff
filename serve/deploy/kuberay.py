"""KubeRay's manifest of a service, generated: `service.yaml` says what runs, `cluster.yaml` on what machines.

Everything that follows from the two is worked out here, so that nothing is said twice and nothing can disagree: Serve's
configuration, how many nodes a pool may have (from the replicas that Serve may start), the memory of a pod (from the
model's sizes), and every grace time (from `limits.max_session_s`). What cannot work is refused, with the arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field, PositiveFloat, PositiveInt

from causal_forcing.errors import InvalidRequest
from serve.app import DRAIN_MARGIN_S
from serve.config import PoolName, ServiceConfig
from serve.pools import pool_resource
from serve.section import Section

from .packing import Amount, Replicas, full_nodes, nodes_needed
from .pods import (
    METRICS_PORT,
    OBJECT_STORE_BYTES,
    SERVICE_ACCOUNT_PATH,
    WEIGHTS_PATH,
    Pod,
    container_security,
    job,
    pod_template,
)
from .serve_config import deployments, serve_config, to_yaml
from .sizing import GIB, Footprint, decode_tflops, footprints

NODE_BYTES = 3 * GIB // 2
"""Memory of a node before replicas: raylet, agents, log monitor, Serve's proxy. Source: 0.47 GB measured (Ray 2.60)."""

REPLACE_S = 120
"""How long Serve waits for a replacement before it stops a replica of a draining node, seconds."""

FIELDS = {"Gateway": "gateway", "TextEncoder": "text_encoder", "Generator": "generator", "VaeDecoder": "vae_decoder"}
"""The field of `placement`, and of the service, that is about a deployment."""

HEAD_PORTS = {"gcs": 6379, "dashboard": 8265, "client": 10001, "metrics": METRICS_PORT}
"""Ports of Ray's head, beside Serve's."""

GENERATED = "# Generated from service.yaml and cluster.yaml by `make manifests`; edit those.\n"
"""First line of every generated file."""

Gibibytes = Annotated[float, Field(gt=0, le=65536)]


class HeadConfig(Section):
    """The pod with Ray's head; no replica runs there.

    Attributes:
        cpus: CPUs.
        memory_gib: Memory: control store, dashboard, Serve's controller.
    """

    cpus: PositiveInt = 2
    memory_gib: Gibibytes = 4


class PoolConfig(Section):
    """A kind of node.

    Attributes:
        cpus: CPUs of a pod.
        gpus: GPUs of a pod.
        gpu_memory_gib: Memory of each GPU; what is to meet on one must fit.
        gpu_tflops: What a GPU sustains in a VAE decoder; the viewers of all generators must fit.
        surge_nodes: Nodes beyond what all replicas need: a rolling update starts new ones while the old end sessions.
        node_selector: Labels of the machines.
        tolerations: Taints that do not matter.
    """

    cpus: PositiveInt
    gpus: Annotated[int, Field(ge=0, le=16)] = 0
    gpu_memory_gib: Gibibytes | None = None
    gpu_tflops: PositiveFloat | None = None
    surge_nodes: Annotated[int, Field(ge=0, le=100)] = 1
    node_selector: dict[str, str] = Field(default_factory=dict)
    tolerations: tuple[dict[str, str], ...] = ()


class WeightsConfig(Section):
    """The volume with the model files.

    Attributes:
        claim: Name of the volume claim; the pods read it, the download Job writes it.
        revisions: Commit by repository, for files that the preset does not pin.
    """

    claim: PoolName = "model-cache"
    revisions: dict[str, Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]] = Field(default_factory=dict)


class ClusterConfig(Section):
    """The machines of a service on Kubernetes.

    Attributes:
        name: Of the RayService.
        image: Container image of all pods.
        head: Ray's head.
        pools: Kinds of nodes by name, as `placement` of the service names them.
        idle_timeout_s: How long a node without replicas stays.
        weights: Where the model files are; none for an embedded model.
        secrets: Where the pods find secrets: mount path by secret.
    """

    name: PoolName = "causal-forcing"
    image: str
    head: HeadConfig = HeadConfig()
    pools: dict[PoolName, PoolConfig]
    idle_timeout_s: Annotated[int, Field(ge=10, le=86400)] = 300
    weights: WeightsConfig | None = None
    secrets: dict[str, str] = Field(default_factory=dict)


@dataclass(frozen=True)
class NodePool:
    """A pool with what runs there.

    Attributes:
        name: Of the pool.
        config: Its machines.
        deployments: What may run there.
        footprints: Memory of a replica by deployment.
    """

    name: str
    config: PoolConfig
    deployments: tuple[Replicas, ...]
    footprints: Mapping[str, Footprint]

    @property
    def node(self) -> Amount:
        """What one pod offers."""
        return Amount(self.config.cpus, self.config.gpus)

    @property
    def min_nodes(self) -> int:
        """Nodes for the replicas that are always there."""
        return nodes_needed(self.node, [(one.each, one.fewest) for one in self.deployments])

    @property
    def max_nodes(self) -> int:
        """Nodes for all replicas that may be there, and for a rolling update."""
        return nodes_needed(self.node, [(one.each, one.most) for one in self.deployments]) + self.config.surge_nodes

    @property
    def memory_bytes(self) -> int:
        """Memory of a pod whose replicas are the hungriest ones that can meet there."""
        hungriest = max(self._host_bytes(counts) for counts in full_nodes(self.node, self.deployments))
        return -(-(NODE_BYTES + OBJECT_STORE_BYTES + hungriest) // GIB) * GIB

    @property
    def gpu_bytes(self) -> int:
        """Memory of a GPU whose replicas are the hungriest ones that can meet there."""
        one_gpu = Amount(self.config.cpus, 1)
        sharing = tuple(one for one in self.deployments if 0 < one.each.gpus <= 1)
        met = full_nodes(one_gpu, sharing)
        return max(sum(n * self.footprints[d.name].device_bytes for d, n in zip(sharing, c, strict=True)) for c in met)

    def _host_bytes(self, counts: tuple[int, ...]) -> int:
        return sum(n * self.footprints[d.name].host_bytes for d, n in zip(self.deployments, counts, strict=True))


def manifests(config: ServiceConfig, cluster: ClusterConfig) -> dict[str, str]:
    """Return the generated files of an overlay: text by file name.

    Raises:
        InvalidRequest: If the two do not go together; the field and the arithmetic are named.
    """
    files = {"rayservice.yaml": rayservice(config, cluster)}
    if cluster.weights is not None:
        files["download.yaml"] = download_job(config, cluster, cluster.weights)
    return {name: GENERATED + to_yaml(values) for name, values in files.items()}


def rayservice(config: ServiceConfig, cluster: ClusterConfig) -> dict[str, Any]:
    """Return the RayService of a service on a cluster, as plain values.

    Raises:
        InvalidRequest: If the two do not go together; the field and the arithmetic are named.
    """
    pools = node_pools(config, cluster)
    drain_s = drain_seconds(config)
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": cluster.name},
        "spec": {
            "serveConfigV2": to_yaml(serve_config(config)),
            "upgradeStrategy": {"type": "NewCluster"},
            "rayClusterDeletionDelaySeconds": drain_s,
            "excludeHeadPodFromServeSvc": True,
            "serveService": _service(config, cluster),
            "rayClusterConfig": _ray_cluster(config, cluster, pools, drain_s),
        },
    }


def drain_seconds(config: ServiceConfig) -> int:
    """Return how long the last session of anything that is taken away may still need."""
    return int(config.limits.max_session_s + DRAIN_MARGIN_S) + 1


def node_pools(config: ServiceConfig, cluster: ClusterConfig) -> tuple[NodePool, ...]:
    """Return the pools of a cluster with what runs on them, all of it checked.

    Raises:
        InvalidRequest: As :func:`rayservice` does.
    """
    _check_service(config, cluster)
    running: dict[str, list[Replicas]] = {name: [] for name in cluster.pools}
    for deployment in deployments(config):
        field = FIELDS[deployment["name"]]
        pool = getattr(config.placement, field)
        if pool not in running:
            allowed = f"must be one of the cluster's pools: {', '.join(cluster.pools)}"
            raise InvalidRequest(f"placement.{field}", pool, allowed)
        running[pool].append(_replicas(deployment))
    sizes = footprints(config)
    pools = tuple(NodePool(name, c, tuple(running[name]), sizes) for name, c in sorted(cluster.pools.items()))
    for pool in pools:
        _check_pool(pool)
        _check_decoding(config, pool)
    return pools


def _replicas(deployment: Mapping[str, Any]) -> Replicas:
    options, scaling = deployment["ray_actor_options"], deployment.get("autoscaling_config") or {}
    fixed = deployment.get("num_replicas") or 1
    each = Amount(options.get("num_cpus", 1), options.get("num_gpus", 0) or 0)
    if each.cpus <= 0:
        reason = "must be more than 0 on a cluster, which takes away nodes whose resources nobody uses"
        raise InvalidRequest(f"{FIELDS[deployment['name']]}.num_cpus", each.cpus, reason)
    fewest = scaling.get("min_replicas", fixed)
    most = scaling.get("max_replicas", max(fixed, fewest))
    surge = math.ceil(deployment.get("max_surge_percent", 0) / 100 * most)
    return Replicas(deployment["name"], each, fewest, most, surge)


def _check_service(config: ServiceConfig, cluster: ClusterConfig) -> None:
    if not config.serves_any_peer:
        reason = "would refuse every caller of a cluster: give an `identity`, or say `any` behind a front that has one"
        raise InvalidRequest("peers", config.peers, reason)
    has_files = config.engine == "model" and not config.model_preset.embedded
    if has_files and cluster.weights is None:
        raise InvalidRequest("weights", None, f"must say which volume has the files of {config.preset}")
    if not has_files and cluster.weights is not None:
        raise InvalidRequest("weights", cluster.weights.claim, f"can have no effect: {config.preset} needs no files")


def _check_pool(pool: NodePool) -> None:
    name = f"pools.{pool.name}"
    if not pool.deployments:
        raise InvalidRequest(name, pool.name, "is named by no field of the service's placement")
    for one in pool.deployments:
        if not one.each.fits(pool.node):
            needed = f"must hold a {one.name} of {one.each.cpus:g} CPUs and {one.each.gpus:g} GPUs"
            raise InvalidRequest(name, f"{pool.config.cpus} CPUs, {pool.config.gpus} GPUs", needed)
    for_update = nodes_needed(pool.node, [(one.each, one.most + one.surge) for one in pool.deployments])
    if for_update > pool.max_nodes:
        needed = f"must be {pool.config.surge_nodes + for_update - pool.max_nodes}: an update starts what is new first"
        raise InvalidRequest(f"{name}.surge_nodes", pool.config.surge_nodes, needed)
    if pool.config.gpus and not any(one.each.gpus for one in pool.deployments):
        raise InvalidRequest(f"{name}.gpus", pool.config.gpus, "can have no effect: nothing there uses one")
    limit = pool.config.gpu_memory_gib
    if limit is None:
        return
    if not pool.config.gpus:
        raise InvalidRequest(f"{name}.gpu_memory_gib", limit, "can have no effect without gpus")
    if pool.gpu_bytes > limit * GIB:
        parts = ", ".join(f"{d.name} {pool.footprints[d.name].device_bytes / GIB:.1f} GiB" for d in pool.deployments)
        needed = f"must be at least {pool.gpu_bytes / GIB:.1f}, for what can meet on one GPU ({parts})"
        raise InvalidRequest(f"{name}.gpu_memory_gib", limit, needed)


def _check_decoding(config: ServiceConfig, pool: NodePool) -> None:
    """Refuse decoders that cannot keep up with the viewers of all generators."""
    decoder = next((one for one in pool.deployments if one.name == "VaeDecoder"), None)
    if pool.config.gpu_tflops is None or decoder is None:
        return
    generators = next(_replicas(one) for one in deployments(config) if one["name"] == "Generator")
    viewers = generators.most * config.generator.sessions_per_replica
    each = decode_tflops(config)
    offered = decoder.most * decoder.each.gpus * pool.config.gpu_tflops
    if viewers * each > offered:
        needed = (
            f"must decode {viewers} viewers at {each:.1f} TFLOP/s each ({config.vae}), but {decoder.most} decoders "
            f"with {decoder.each.gpus:g} of such a GPU offer {offered:.0f}; take more, larger ones, or a lighter vae"
        )
        raise InvalidRequest(f"pools.{pool.name}.gpu_tflops", pool.config.gpu_tflops, needed)


def _service(config: ServiceConfig, cluster: ClusterConfig) -> dict[str, Any]:
    """Return the Service in front; its targets are names of ports, which only the gateways' pods have."""
    return {
        "metadata": {"name": cluster.name},
        "spec": {
            "type": "ClusterIP",
            "ports": [
                {"name": "serve", "port": config.http_port, "targetPort": "serve", "appProtocol": "http"},
                {
                    "name": "serve-grpc",
                    "port": config.grpc_port,
                    "targetPort": "serve-grpc",
                    "appProtocol": "kubernetes.io/h2c",
                },
            ],
        },
    }


def _ray_cluster(
    config: ServiceConfig, cluster: ClusterConfig, pools: tuple[NodePool, ...], drain_s: int
) -> dict[str, Any]:
    import ray

    return {
        "rayVersion": ray.__version__,
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": {
            "version": "v2",
            "upscalingMode": "Default",
            "idleTimeoutSeconds": cluster.idle_timeout_s,
            "resources": {
                "requests": {"cpu": "500m", "memory": "1Gi"},
                "limits": {"memory": "1Gi"},
            },
            "securityContext": container_security(),
            "volumeMounts": [
                {"name": "tmp", "mountPath": "/tmp"},
                {"name": "kubernetes-api", "mountPath": SERVICE_ACCOUNT_PATH, "readOnly": True},
            ],
        },
        "headGroupSpec": _head(config, cluster),
        "workerGroupSpecs": [_workers(config, cluster, pool, drain_s) for pool in pools],
    }


def _serve_ports(config: ServiceConfig) -> dict[str, int]:
    return {"serve": config.http_port, "serve-grpc": config.grpc_port}


def _head(config: ServiceConfig, cluster: ClusterConfig) -> dict[str, Any]:
    """Return Ray's head; only its autoscaler gets at the Kubernetes API."""
    pod = Pod(
        component="head",
        image=cluster.image,
        cpus=cluster.head.cpus,
        memory_bytes=int(cluster.head.memory_gib * GIB),
        ports={**HEAD_PORTS, **_serve_ports(config)},
    )
    template = pod_template(pod)
    token = {
        "sources": [
            {"serviceAccountToken": {"path": "token", "expirationSeconds": 3600}},
            {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
            {"downwardAPI": {"items": [{"path": "namespace", "fieldRef": {"fieldPath": "metadata.namespace"}}]}},
        ]
    }
    template["spec"]["volumes"].append({"name": "kubernetes-api", "projected": token})
    start = {"num-cpus": "0", "object-store-memory": str(OBJECT_STORE_BYTES)}
    return {"rayStartParams": start, "template": template}


def _workers(config: ServiceConfig, cluster: ClusterConfig, pool: NodePool, drain_s: int) -> dict[str, Any]:
    serves = any(one.name == "Gateway" for one in pool.deployments)
    only_serves = all(one.name == "Gateway" for one in pool.deployments)
    pod = Pod(
        component=pool.name,
        image=cluster.image,
        cpus=pool.config.cpus,
        memory_bytes=pool.memory_bytes,
        gpus=pool.config.gpus,
        ports={"metrics": METRICS_PORT, **(_serve_ports(config) if serves else {})},
        ready_path="/-/healthz" if serves else "/api/healthz",
        **({"ready_port": config.http_port} if serves else {}),
        drain_s=drain_s + REPLACE_S,
        node_selector=pool.config.node_selector,
        tolerations=pool.config.tolerations,
        weights_claim=cluster.weights.claim if cluster.weights and not only_serves else None,
        secrets=cluster.secrets if serves else {},
    )
    resources = {"CPU": str(pool.config.cpus), pool_resource(pool.name): "1"}
    if pool.config.gpus:
        resources["GPU"] = str(pool.config.gpus)
    return {
        "groupName": pool.name,
        "replicas": pool.min_nodes,
        "minReplicas": pool.min_nodes,
        "maxReplicas": pool.max_nodes,
        "resources": resources,
        "rayStartParams": {"object-store-memory": str(OBJECT_STORE_BYTES)},
        "template": pod_template(pod),
    }


def download_job(config: ServiceConfig, cluster: ClusterConfig, weights: WeightsConfig) -> dict[str, Any]:
    """Return the Job that fetches and verifies the preset's files, each of them pinned.

    Raises:
        InvalidRequest: If the contents of a file could change without being noticed.
    """
    files = {part: file for part, file in config.model_preset.files if not part.startswith("vae/")}
    files[f"vae/{config.vae}"] = config.model_preset.files.vaes[config.vae]
    for part, file in files.items():
        if not file.is_pinned and file.repo not in weights.revisions:
            raise InvalidRequest("weights.revisions", weights.revisions, f"must pin {file.repo}, for {part}")
    pins = {file.repo: weights.revisions.get(file.repo, file.revision) for file in files.values()}
    command = ["causal-forcing", "download", config.preset, "--weights-dir", WEIGHTS_PATH, "--quiet"]
    command += [word for part in files for word in ("--part", part)]
    command += [word for repo, commit in weights.revisions.items() for word in ("--revision", f"{repo}={commit}")]
    sums = {part: f"sha256:{file.sha256 or 'not known'} {file.repo}@{pins[file.repo]}" for part, file in files.items()}
    return job(
        f"download-{config.preset}-{config.vae}",
        image=cluster.image,
        command=command,
        claim=weights.claim,
        annotations={f"causal-forcing/{part.replace('/', '-')}": text for part, text in sums.items()},
    )
