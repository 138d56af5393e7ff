"""What docs/kubernetes.md has an operator type, and what the images are built with."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

from serve.access.tenants import TenantsFile
from serve.access.watched import parse_section

ROOT = Path(__file__).parents[2]


def test_every_file_of_the_secret_is_made_before(tmp_path: Path) -> None:
    guide = (ROOT / "docs/kubernetes.md").read_text()
    (block,) = (block for block in re.findall(r"```sh\n(.*?)```", guide, re.DOTALL) if "--from-file" in block)
    commands = f"kubectl() {{ printf '%s\\n' \"$@\"; }}\n{block}"
    done = subprocess.run(["bash", "-eu", "-c", commands], cwd=tmp_path, capture_output=True, text=True, check=True)
    wanted = re.findall(r"--from-file=(\S+)", done.stdout)
    assert sorted(wanted) == sorted(path.name for path in tmp_path.iterdir())
    assert parse_section((tmp_path / "tenants.yaml").read_text(), TenantsFile) == TenantsFile()


def test_the_cuda_image_has_what_only_a_gpu_uses() -> None:
    dockerfile = (ROOT / "k8s/Dockerfile").read_text()
    cuda = dockerfile.partition("AS dependencies-cuda\n")[2].partition("\nFROM")[0]
    extras = re.search(r"'\.\[([a-z0-9,]+)\]'", cuda)
    assert extras is not None
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    installed = {re.split(r"[\[<>=]", name)[0] for extra in extras[1].split(",") for name in packages[extra]}
    assert {"ray", "torchao", "nvidia-ml-py"} <= installed
