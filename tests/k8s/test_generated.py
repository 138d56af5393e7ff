"""The generated files in the repository are what their two sources make; nobody edited them, nobody forgot them."""

from __future__ import annotations

import pytest
import yaml

from serve.config import ServiceConfig, load_config, load_section
from serve.deploy.kuberay import REPLACE_S, ClusterConfig, drain_seconds, manifests
from serve.deploy.serve_config import serve_config
from serve.local import ENVIRONMENT
from tests.k8s.conftest import OVERLAYS, ROOT, containers, of_kind, rendered

GENERATED = [name for name in OVERLAYS if (ROOT / "k8s/overlays" / name / "cluster.yaml").exists()]


def sources(overlay: str) -> tuple[ServiceConfig, ClusterConfig]:
    folder = ROOT / "k8s/overlays" / overlay
    return load_config(folder / "service.yaml"), load_section(ClusterConfig, folder / "cluster.yaml")


@pytest.mark.parametrize("overlay", GENERATED)
def test_files_are_what_their_sources_make(overlay: str) -> None:
    for name, text in manifests(*sources(overlay)).items():
        path = ROOT / "k8s/overlays" / overlay / name
        assert path.read_text() == text, f"run `make manifests`: {path} is not what service.yaml and cluster.yaml make"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_serve_gets_our_configuration_and_every_grace_time_follows_from_it(overlay: str) -> None:
    config, _ = sources(overlay if overlay in GENERATED else "gpu")
    (service,) = of_kind(rendered(f"overlays/{overlay}"), "RayService")
    spec = service["spec"]
    assert yaml.safe_load(spec["serveConfigV2"]) == serve_config(config)
    drain_s = drain_seconds(config)
    assert drain_s > config.limits.max_session_s
    assert spec["rayClusterDeletionDelaySeconds"] == drain_s
    for group in spec["rayClusterConfig"]["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        (leave,) = [c["lifecycle"]["preStop"]["exec"]["command"][-1] for c in pod["containers"]]
        assert f"drain --timeout {drain_s + REPLACE_S};" in leave
        assert pod["terminationGracePeriodSeconds"] > drain_s + REPLACE_S


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_pod_has_what_a_local_service_gives_to_rays_processes(overlay: str) -> None:
    (service,) = of_kind(rendered(f"overlays/{overlay}"), "RayService")
    for container in containers(service):
        given = {one["name"]: one["value"] for one in container["env"]}
        own = {name: value for name, value in ENVIRONMENT.items() if name != "RAY_SERVE_LOG_TO_STDERR"}
        assert own.items() <= given.items()
        assert int(given["RAY_max_direct_call_object_size"]) > 600_000, "a chunk's latents would take the object store"
