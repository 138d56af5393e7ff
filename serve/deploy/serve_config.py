"""Ray Serve's own configuration, generated from ours: what `serve deploy` takes and KubeRay's `serveConfigV2` holds.

The deployments are read off the built application, so that nothing is said twice: what :mod:`serve.app` decides appears
here, and an operator sees (and may lower or raise) it in one place.
"""

from __future__ import annotations

from typing import Any

import yaml

from serve.app import APP_NAME, SERVICER, build
from serve.config import ServiceConfig

IMPORT_PATH = "serve.app:app"
"""What Serve calls with the configuration's fields."""

SHOWN = (
    "name",
    "num_replicas",
    "autoscaling_config",
    "max_ongoing_requests",
    "max_queued_requests",
    "graceful_shutdown_timeout_s",
    "health_check_period_s",
    "health_check_timeout_s",
    "ray_actor_options",
)
"""Options of a deployment that the file repeats; the others stay in the code."""


def serve_config(config: ServiceConfig) -> dict[str, Any]:
    """Return Serve's configuration of a service, as plain values.

    The application's arguments are the options that were given, not their defaults: a version with better defaults uses
    them.
    """
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": "0.0.0.0", "port": config.http_port},
        "grpc_options": {"port": config.grpc_port, "grpc_servicer_functions": [SERVICER]},
        "applications": [
            {
                "name": APP_NAME,
                "route_prefix": "/",
                "import_path": IMPORT_PATH,
                "args": config.model_dump(mode="json", exclude_unset=True),
                "deployments": [_shown(schema) for schema in deployments(config)],
            }
        ],
    }


def deployments(config: ServiceConfig) -> list[dict[str, Any]]:
    """Return what Serve will run, deployment by deployment, in the order of their names."""
    from ray.serve._private.build_app import build_app  # as `serve build` does
    from ray.serve.deployment import deployment_to_schema

    built = build_app(build(config), name=APP_NAME).deployments
    schemas = [deployment_to_schema(deployment).model_dump(mode="json", exclude_unset=True) for deployment in built]
    return sorted(schemas, key=lambda schema: str(schema["name"]))


def _shown(schema: dict[str, Any]) -> dict[str, Any]:
    """Return what the file repeats of a deployment; a scaling policy of our own is left to the code.

    Such a policy names the admission actor, which belongs to one version of the code; Serve would take a stale name
    from the file, and replaces the whole `autoscaling_config` by what it finds there.
    """
    shown = {name: schema[name] for name in SHOWN if name in schema}
    if "policy" in (shown.get("autoscaling_config") or {}):
        del shown["autoscaling_config"]
    return shown


def to_yaml(values: object) -> str:
    """Return plain values as YAML in their own order, texts of several lines as blocks."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, width=120, default_flow_style=False)


class _Dumper(yaml.SafeDumper):
    """Writes what people read: no aliases, blocks for texts of several lines, lists indented under their key."""

    def ignore_aliases(self, data: object) -> bool:  # noqa: ARG002
        """Write equal values out, every time."""
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:  # noqa: ARG002
        """Indent lists under their key."""
        return super().increase_indent(flow, indentless=False)


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)
