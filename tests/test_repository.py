"""What the README and the packaging promise is there."""

from __future__ import annotations

import ast
import os
import pkgutil
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.version import Version

from causal_forcing import cli

ROOT = Path(__file__).parents[1]

LIGHT_MODULES = (
    "causal_forcing.cli",
    "causal_forcing.config",
    "causal_forcing.errors",
    "causal_forcing.presets",
    "causal_forcing.prompts",
    "causal_forcing.script",
    "protos.causal_forcing.v1.video_pb2_grpc",
    "serve.client",
    "serve.commands.sessions",
    "serve.commands.status",
    "serve.commands.stream",
)
"""What a gRPC client imports."""

HEAVY_MODULES = ("av", "numpy", "PIL", "ray", "safetensors", "torch", "tqdm", "transformers")
"""What the base install does not bring."""

PACKAGE_OF = {
    "opentelemetry": "opentelemetry-sdk",
    "PIL": "pillow",
    "google": "protobuf",
    "grpc": "grpcio",
    "grpc_reflection": "grpcio-reflection",
    "jwt": "pyjwt",
    "pynvml": "nvidia-ml-py",
    "yaml": "pyyaml",
}
"""Packages that are not called as what they are imported as."""


def tracked(*patterns: str) -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z", *patterns], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout, so there is no list of its files")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def commands_in(document: Path) -> list[str]:
    """Return the lines of a document's shell blocks, and the commands it quotes inline."""
    text = document.read_text()
    blocks = re.findall(r"```(?:bash|sh|shell|console)\n(.*?)```", text, re.DOTALL)
    lines = [line.removeprefix("$ ").strip() for block in blocks for line in block.splitlines()]
    inline = re.findall(r"`((?:make|causal-forcing) [^`]+)`", text)
    return [line for line in lines + inline if line and not line.startswith("#")]


DOCUMENTS = ("README.md", "CONTRIBUTING.md", "docs/architecture.md")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_command_in_the_documents_exists(name: str) -> None:
    targets = make_targets()
    for line in commands_in(ROOT / name):
        words = line.split()
        if "make" in words:
            for word in words[words.index("make") + 1 :]:
                if not re.fullmatch(r"[a-z-]+", word) or word == "make":
                    break
                assert word in targets, line
        command = next((i for i, word in enumerate(words) if word.endswith("causal-forcing")), None)
        if command is not None and command + 1 < len(words) and words[command + 1].isalpha():
            assert words[command + 1] in cli.COMMANDS, line


def test_the_tour_names_every_part_of_the_engine() -> None:
    tour = (ROOT / "docs/architecture.md").read_text()
    table = tour.partition("| `causal_forcing/` |")[2].partition("\n\n")[0]
    cells = "".join(line.split("|")[1] for line in table.splitlines()[2:])
    named = set(re.findall(r"`([^`]+?)/?`", cells))
    engine = ROOT / "causal_forcing"
    assert [name for name in named if not (engine / name).exists()] == []
    there = {path.name for path in engine.iterdir() if path.suffix == ".py" or (path.is_dir() and path.name[0] != "_")}
    assert there - {"__init__.py"} <= named


def test_links_between_documents_lead_somewhere() -> None:
    documents = tracked("*.md")
    assert len(documents) > 5
    for path in documents:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text()):
            assert "://" in target or (path.parent / target).exists(), f"{path.name}: {target}"


def test_references_in_docstrings_lead_somewhere() -> None:
    references = {
        (path.relative_to(ROOT).as_posix(), name)
        for path in tracked("*.py")
        for name in re.findall(r":[a-z]+:`~?((?:causal_forcing|serve)\.[\w.]+)`", path.read_text())
    }
    assert len(references) > 20
    assert [reference for reference in sorted(references) if not _exists(reference[1])] == []


def _exists(name: str) -> bool:
    """Return whether a dotted name is a module, something in one, or a field that its class only declares."""
    try:
        pkgutil.resolve_name(name)
    except (AttributeError, ImportError):
        owner, _, field = name.rpartition(".")
        return "." in owner and _exists(owner) and field in getattr(pkgutil.resolve_name(owner), "__annotations__", {})
    return True


def test_the_readme_shows_both_main_commands() -> None:
    assert {"make demo", "make test"} <= {" ".join(c.split()[:2]) for c in commands_in(ROOT / "README.md")}


def test_options_in_the_readme_exist(capsys: pytest.CaptureFixture[str]) -> None:
    for line in commands_in(ROOT / "README.md"):
        match = re.match(r"(?:\.venv/bin/)?causal-forcing (\w+)(.*)", line)
        if match is None:
            continue
        with pytest.raises(SystemExit):
            cli.main([match[1], "--help"])
        shown = capsys.readouterr().out
        for option in re.findall(r"(?<=\s)--?[a-z][a-z-]*", match[2].split("#")[0]):
            assert re.search(rf"(?<![\w-]){option}(?![\w-])", shown), line


def test_every_phony_target_is_there_and_explained() -> None:
    text = (ROOT / "Makefile").read_text()
    phony = set(" ".join(re.findall(r"^\.PHONY:((?:.*\\\n)*.*)", text, re.MULTILINE)).replace("\\", " ").split())
    explained = set(re.findall(r"^([a-z-]+):.*## \w", text, re.MULTILINE))
    assert phony == explained == make_targets()


def test_constraints_pin_every_dependency() -> None:
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {_canonical(line.partition("==")[0]) for line in pins if line and not line.startswith("#")}
    assert all(line.startswith("#") or re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9._!+]+", line) for line in pins)
    assert "torch==2.13.0" in pins
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert declared(*project["optional-dependencies"]) - {"causal-forcing-serve"} <= pinned


def declared(*extras: str) -> set[str]:
    """Return the packages that the base install and some extras bring, those of a dependency not among them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(name for extra in extras for name in project["optional-dependencies"][extra])]
    return {_canonical(re.split(r"[\[<>=!~; ]", requirement)[0]) for requirement in wanted}


def packages_imported(pattern: str, *but: str) -> set[str]:
    """Return the packages that modules import, this one and Python's own left out."""
    found = {name for path in ROOT.glob(pattern) for name in _imported(path)} - set(sys.stdlib_module_names)
    return {PACKAGE_OF.get(name, _canonical(name)) for name in found - {"causal_forcing", "protos", "serve", *but}}


def test_what_the_service_imports_is_in_its_extra() -> None:
    """What comes in through another package today may not come tomorrow."""
    packages = packages_imported("serve/**/*.py")
    assert "ray" in packages
    assert packages <= declared("media", "server")


def test_what_the_engine_imports_is_in_scopes_extra() -> None:
    packages = packages_imported("causal_forcing/**/*.py", "torchao", "scope", "pluggy", "pydantic")  # these Scope has
    assert "torch" in packages
    assert packages <= declared("media", "scope")
    assert "ray" not in declared("scope")


def test_the_least_versions_are_those_that_the_generated_code_needs() -> None:
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    least = dict(re.fullmatch(r"([a-z-]+)>=([\d.]+)", dependency).groups() for dependency in dependencies)
    for path in sorted((ROOT / "protos/causal_forcing").rglob("*_pb2*.py")):
        needed = re.search(r"(?:Python Version:|GENERATED_VERSION =) '?([\d.]+)", path.read_text())
        package = "grpcio" if path.stem.endswith("_grpc") else "protobuf"
        assert needed is not None, path
        assert Version(least[package]) >= Version(needed[1]), path


def test_scopes_versions_are_enough_for_its_extra() -> None:
    """Read from uv.lock of daydreamlive/scope@68b0f95, whose installer lets no plugin go below or a major above."""
    held = {
        "av": "16.1.0",
        "ftfy": "6.3.1",
        "grpcio": "1.78.1",
        "huggingface-hub": "0.36.0",
        "numpy": "2.4.1",
        "pillow": "12.1.0",
        "protobuf": "6.33.5",
        "safetensors": "0.7.0",
        "tokenizers": "0.22.2",
        "torch": "2.9.1",
        "tqdm": "4.67.1",
        "transformers": "4.57.5",
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for requirement in (*project["dependencies"], *extras["media"], *extras["scope"]):
        name, _, least = requirement.partition(">=")
        if name in held:
            assert Version(least) <= Version(held.pop(name)), requirement
    assert not held


def _imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            names.add(node.module.partition(".")[0])
    return names


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("module", LIGHT_MODULES)
def test_a_client_imports_without_the_server_extra(module: str) -> None:
    blocked = f"""
import importlib, sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HEAVY_MODULES!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Block())
importlib.import_module({module!r})
"""
    done = subprocess.run([sys.executable, "-c", blocked], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_readme_has_the_numbers_of_the_result_files() -> None:
    done = subprocess.run([sys.executable, "benchmarks/readme.py", "--check"], cwd=ROOT, check=False)
    assert done.returncode == 0, "run `make readme-numbers`"


def test_the_generated_protos_are_current(tmp_path: Path) -> None:
    includes = ["--proto_path=.", "--proto_path=protos/third_party"]
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    sources = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "protos/causal_forcing").rglob("*.proto"))]
    command = [sys.executable, "-m", "grpc_tools.protoc", *includes, *outputs, *sources]
    environment = {**os.environ, "PYTHONPATH": str(Path(sys.prefix) / "protoc")}  # put there by `make setup`
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    fresh = {path.relative_to(tmp_path): path.read_text() for path in tmp_path.rglob("*_pb2*.py*")}
    assert len(fresh) == 3 * len(sources)
    assert {name: (ROOT / name).read_text() for name in fresh} == fresh, "run `make protos`"


def test_type_checkers_see_the_types_of_every_package() -> None:
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    packages = tool["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert [name for name in packages if not (ROOT / name / "py.typed").exists()] == []


def test_the_changelog_has_a_section_for_what_is_not_released() -> None:
    assert re.search(r"^## Unreleased\n\n### \w+\n\n- ", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_no_file_names_a_machine() -> None:
    forbidden = re.compile(r"(?<![\w.}])/(?:root|work)/|file:///|\+cpu$", re.MULTILINE)
    for path in tracked():
        if path.suffix not in {".safetensors", ".png", ".pb"} and path != Path(__file__):
            assert forbidden.search(path.read_text(errors="ignore")) is None, path


def test_the_licence_is_apache_2() -> None:
    assert "Apache License" in (ROOT / "LICENSE").read_text()[:200]
