"""`causal-forcing config`: check a configuration file, show what it means, and turn it into what clusters take."""

from __future__ import annotations

import argparse
from pathlib import Path

from serve.config import ServiceConfig, load_config, load_section


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the actions of `config`."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, summary in (
        ("check", "say whether the file is right; the first problem is named"),
        ("show", "print the whole configuration, defaults included"),
        ("serve", "print Ray Serve's configuration for `serve deploy`"),
    ):
        action = actions.add_parser(name, help=summary, description=summary)
        action.add_argument("file", type=Path, help="YAML file of the service")
    summary = "write KubeRay's manifests"
    kuberay = actions.add_parser("kuberay", help=summary, description=summary)
    kuberay.add_argument("file", type=Path, help="YAML file of the service")
    kuberay.add_argument("cluster", type=Path, help="YAML file of the machines")
    kuberay.add_argument("--output", "-o", type=Path, default=Path(), metavar="DIR", help="where to (default: here)")


def run(args: argparse.Namespace) -> int:
    """Do what was asked and return 0.

    Raises:
        InvalidRequest: If the file cannot be read, or a value in it is not allowed.
    """
    config = load_config(args.file)
    if args.action == "kuberay":
        return _write_manifests(config, args.cluster, args.output)
    print({"check": _check, "show": _show, "serve": _serve}[args.action](config))
    return 0


def _check(config: ServiceConfig) -> str:
    height, width = config.allowed_sizes[0]
    return f"right: preset {config.preset} ({config.engine}) on {config.device}, {height}x{width}, VAE {config.vae}"


def _show(config: ServiceConfig) -> str:
    from serve.deploy.serve_config import to_yaml

    return to_yaml(config.model_dump(mode="json")).rstrip()


def _serve(config: ServiceConfig) -> str:
    from serve.deploy.serve_config import serve_config, to_yaml

    return to_yaml(serve_config(config)).rstrip()


def _write_manifests(config: ServiceConfig, cluster: Path, output: Path) -> int:
    from serve.deploy.kuberay import ClusterConfig, manifests

    for name, text in manifests(config, load_section(ClusterConfig, cluster)).items():
        (output / name).write_text(text)
        print(f"wrote {output / name}")
    return 0
