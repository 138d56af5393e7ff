"""What a service needs of its machines: the arithmetic, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from causal_forcing import cli
from causal_forcing.errors import InvalidRequest
from causal_forcing.text_encoder import DEFAULT_CACHE_BYTES
from serve.config import load_config, load_section
from serve.deploy.kuberay import NODE_BYTES, ClusterConfig, download_job, node_pools
from serve.deploy.packing import Amount, Replicas, full_nodes, nodes_needed
from serve.deploy.pods import OBJECT_STORE_BYTES
from serve.deploy.sizing import CONTEXT_BYTES, GIB, decode_tflops, footprints

OVERLAYS = Path(__file__).parents[3] / "k8s/overlays"


def pools_of(overlay: str, cluster: dict[str, Any] | None = None, **service: Any) -> dict[str, Any]:
    """Return the pools of an overlay with some fields replaced, by name."""
    config = load_config(OVERLAYS / overlay / "service.yaml", **service)
    machines = load_section(ClusterConfig, OVERLAYS / overlay / "cluster.yaml", **(cluster or {}))
    return {pool.name: pool for pool in node_pools(config, machines)}


@pytest.mark.parametrize(
    ("node", "replicas", "nodes"),
    [
        (Amount(4, 1), [(Amount(2, 0.8), 3), (Amount(1, 0.2), 3)], 3),
        (Amount(4, 1), [(Amount(2, 0.5), 3)], 2),
        (Amount(4), [(Amount(1.5), 4)], 2),
        (Amount(4), [(Amount(0.1), 40)], 1),
        (Amount(4), [(Amount(0.1), 41)], 2),
        (Amount(4), [], 0),
    ],
)
def test_replicas_are_packed(node: Amount, replicas: list[tuple[Amount, int]], nodes: int) -> None:
    assert nodes_needed(node, replicas) == nodes


def test_a_replica_larger_than_a_node_has_no_packing() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        nodes_needed(Amount(4), [(Amount(4, 1), 1)])


def test_what_can_meet_on_a_node() -> None:
    big, small = Replicas("Big", Amount(2, 0.8), 1, 5), Replicas("Small", Amount(1, 0.2), 0, 1)
    assert set(full_nodes(Amount(4, 1), (big, small))) == {(0, 0), (0, 1), (1, 0), (1, 1)}


def test_pools_follow_the_replicas() -> None:
    pools = pools_of("gpu")
    assert (pools["generator"].min_nodes, pools["generator"].max_nodes) == (1, 8 + 1)
    assert (pools["gateway"].min_nodes, pools["gateway"].max_nodes) == (2, 4 + 1)
    pools = pools_of("gpu", generator={"num_cpus": 4, "num_gpus": 1, "replicas": 3})
    assert (pools["generator"].min_nodes, pools["generator"].max_nodes) == (3, 3 + 1)


def test_memory_follows_the_preset() -> None:
    config = load_config(OVERLAYS / "gpu/service.yaml")
    sizes = footprints(config)
    # Two bytes for each of 1,418,996,800 weights; keys and values of 21 frames of 1560 tokens in 30 layers of 1536.
    at_least = 2 * 1_418_996_800 + 21 * 1560 * 1536 * 30 * 2 * 2
    assert at_least + CONTEXT_BYTES < sizes["Generator"].device_bytes < 1.05 * at_least + CONTEXT_BYTES
    assert sizes["TextEncoder"].device_bytes > 11.36e9 + DEFAULT_CACHE_BYTES + CONTEXT_BYTES
    assert sizes["VaeDecoder"].device_bytes > config.vae_decoder.cache_bytes
    pod = pools_of("gpu")["generator"].memory_bytes
    assert pod >= NODE_BYTES + OBJECT_STORE_BYTES + sizes["Generator"].host_bytes
    assert pod % GIB == 0
    smaller = footprints(load_config(OVERLAYS / "gpu/service.yaml", preset="longlive", max_window_frames=12))
    assert smaller["Generator"].device_bytes < sizes["Generator"].device_bytes


def test_decoding_takes_what_is_known_of_the_autoencoders() -> None:
    # Counted in the reference: 13.550, 0.863 and 0.544 TFLOP a latent frame; ours does less, of the same convolutions.
    for vae, reference in (("wan", 13.550), ("lightvae", 0.863), ("tae", 0.544)):
        each = decode_tflops(load_config(OVERLAYS / "gpu/service.yaml", vae=vae))
        assert 0.8 < each / (4 * reference) <= 1, vae


def codec(**changes: Any) -> dict[str, Any]:
    cluster = load_section(ClusterConfig, OVERLAYS / "gpu/cluster.yaml").model_dump()
    cluster["pools"]["codec"] |= changes
    return {"pools": cluster["pools"]}


def demo_without_room() -> dict[str, Any]:
    cluster = load_section(ClusterConfig, OVERLAYS / "cpu-demo/cluster.yaml").model_dump()
    cluster["pools"]["codec"]["surge_nodes"] = 0
    return {"pools": cluster["pools"]}


REFUSED: list[tuple[str, dict[str, Any], dict[str, Any], str, str]] = [
    ("cpu-demo", {}, {"peers": "loopback"}, "peers", "refuse every caller"),
    ("cpu-demo", {}, {"placement": {}}, "placement.gateway", "one of the cluster's pools: gateway, generator, codec"),
    ("cpu-demo", {}, {"generator": {}}, "generator.num_cpus", "takes away nodes"),
    ("cpu-demo", {"weights": {}}, {}, "weights", "needs no files"),
    ("cpu-demo", {}, {"vae_decoder": {"num_cpus": 2}}, "pools.codec", "must hold a VaeDecoder of 2 CPUs"),
    ("cpu-demo", demo_without_room(), {}, "pools.codec.surge_nodes", "must be 1: an update starts"),
    ("gpu", {"weights": None}, {}, "weights", "causal-forcing-framewise"),
    (
        "gpu",
        codec(gpus=0, gpu_memory_gib=None, gpu_tflops=None),
        {},
        "pools.codec",
        "TextEncoder of 1 CPUs and 0.2 GPUs",
    ),
    ("gpu", codec(gpu_memory_gib=20), {}, "pools.codec.gpu_memory_gib", "must be at least 22.7"),
    ("gpu", codec(gpu_tflops=60), {}, "pools.codec.gpu_tflops", "8 viewers at 51.7 TFLOP/s each (wan)"),
]


@pytest.mark.parametrize(("overlay", "cluster", "service", "field", "message"), REFUSED)
def test_what_cannot_work_is_refused_with_the_arithmetic(
    overlay: str, cluster: dict[str, Any], service: dict[str, Any], field: str, message: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        pools_of(overlay, cluster, **service)
    assert caught.value.metadata["field"] == field
    assert message in caught.value.message


def test_small_decoder_gpus_do_for_the_light_autoencoder() -> None:
    small = codec(gpu_tflops=60, gpu_memory_gib=23)
    pools = pools_of("gpu", small, vae="lightvae")
    assert pools["codec"].gpu_bytes < 23 * GIB


def test_a_download_is_pinned_or_refused() -> None:
    config = load_config(OVERLAYS / "gpu/service.yaml", vae="lightvae")
    cluster = load_section(ClusterConfig, OVERLAYS / "gpu/cluster.yaml")
    assert cluster.weights is not None
    with pytest.raises(InvalidRequest, match="must pin lightx2v/Autoencoders"):
        download_job(config, cluster, cluster.weights)
    pinned = cluster.weights.model_copy(update={"revisions": {"lightx2v/Autoencoders": "0" * 40}})
    (container,) = download_job(config, cluster, pinned)["spec"]["template"]["spec"]["containers"]
    assert container["command"][-2:] == ["--revision", f"lightx2v/Autoencoders={'0' * 40}"]


def test_the_command_writes_the_manifests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = OVERLAYS / "gpu"
    files = [str(folder / "service.yaml"), str(folder / "cluster.yaml")]
    assert cli.main(["config", "kuberay", *files, "--output", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"rayservice.yaml", "download.yaml"}
    assert (tmp_path / "rayservice.yaml").read_text() == (folder / "rayservice.yaml").read_text()
    assert "rayservice.yaml" in capsys.readouterr().out
