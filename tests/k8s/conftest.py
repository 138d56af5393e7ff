"""The overlays as kustomize renders them."""

from __future__ import annotations

import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
OVERLAYS = ("cpu-demo", "gpu", "gpu-redis", "gpu-tls")

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""The definitions are a megabyte each, which the loader in Python takes ten seconds for."""

Manifest = dict[str, Any]


@cache
def kustomize() -> tuple[str, ...]:
    """Return the command that renders: kustomize itself, or the one inside kubectl."""
    if shutil.which("kustomize"):
        return ("kustomize", "build")
    if shutil.which("kubectl"):
        return ("kubectl", "kustomize")
    pytest.skip("neither kustomize nor kubectl is installed, so nothing can be rendered")


@cache
def rendered(folder: str) -> tuple[Manifest, ...]:
    """Return the manifests of a kustomization, rendered."""
    done = subprocess.run([*kustomize(), str(ROOT / "k8s" / folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return tuple(yaml.load_all(done.stdout, Loader=LOADER))


def of_kind(manifests: tuple[Manifest, ...], *kinds: str) -> list[Manifest]:
    """Return the manifests of some kinds."""
    return [manifest for manifest in manifests if manifest["kind"] in kinds]


def containers(service: Manifest) -> list[Manifest]:
    """Return Ray's container of every pod of a RayService, the head's first."""
    cluster = service["spec"]["rayClusterConfig"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"]["spec"]["containers"][0] for group in groups]


def name_of(manifest: Manifest) -> str:
    """Return what to call a manifest in a failure."""
    return f"{manifest['kind']} {manifest['metadata']['name']}"


@pytest.fixture(params=OVERLAYS)
def overlay(request: pytest.FixtureRequest) -> tuple[Manifest, ...]:
    """Every overlay in turn."""
    return rendered(f"overlays/{request.param}")
