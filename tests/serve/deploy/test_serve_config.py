"""Ray Serve's configuration is made of ours, and of the application that ours builds."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from causal_forcing import cli
from serve.app import DRAIN_MARGIN_S, SERVICER, app
from serve.config import load_config
from serve.deploy.serve_config import serve_config, to_yaml

FIELDS: dict[str, Any] = {
    "vae": "lightvae",
    "grpc_port": 9100,
    "http_port": 8100,
    "limits": {"max_session_s": 120},
    "generator": {"num_cpus": 1.5},
    "placement": {"generator": "gpu"},
}


def deployment(values: dict[str, Any], name: str) -> dict[str, Any]:
    (application,) = values["applications"]
    (found,) = [one for one in application["deployments"] if one["name"] == name]
    return found


def test_serve_accepts_it_after_a_trip_through_yaml() -> None:
    values = yaml.safe_load(to_yaml(serve_config(load_config(None, **FIELDS))))
    schema = ServeDeploySchema.model_validate(values)
    assert (schema.grpc_options.port, schema.http_options.port) == (9100, 8100)
    assert schema.grpc_options.grpc_servicer_functions == [SERVICER]
    (application,) = schema.applications
    assert {one.name for one in application.deployments} == {"Gateway", "TextEncoder", "Generator", "VaeDecoder"}


def test_the_arguments_are_what_was_given_and_build_the_same_application() -> None:
    config = load_config(None, **FIELDS)
    (application,) = serve_config(config)["applications"]
    assert application["args"] == FIELDS
    rebuilt = load_config(None, **application["args"])
    assert rebuilt == config
    assert serve_config(rebuilt) == serve_config(config)
    app(application["args"])


def test_deployments_follow_the_configuration() -> None:
    values = serve_config(load_config(None, **FIELDS))
    for one in values["applications"][0]["deployments"]:
        assert one["graceful_shutdown_timeout_s"] == 120 + DRAIN_MARGIN_S
    generator = deployment(values, "Generator")
    assert generator["ray_actor_options"] == {"num_cpus": 1.5, "resources": {"pool-gpu": 0.001}}
    assert "resources" not in deployment(values, "Gateway")["ray_actor_options"]


def test_a_pool_has_a_name_that_kubernetes_takes() -> None:
    with pytest.raises(Exception, match=r"placement\.generator"):
        load_config(None, placement={"generator": "GPU pool"})


def test_the_command_checks_shows_and_converts(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "service.yaml"
    path.write_text(to_yaml(FIELDS))
    assert cli.main(["config", "check", str(path)]) == 0
    assert "right: preset tiny (model) on cpu, 64x64, VAE lightvae" in capsys.readouterr().out
    assert cli.main(["config", "show", str(path)]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["limits"]["max_session_s"], shown["limits"]["silence_timeout_s"]) == (120, 30)
    assert cli.main(["config", "serve", str(path)]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == serve_config(load_config(path))


def test_the_command_names_what_is_wrong(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "service.yaml"
    path.write_text("limits: {max_sesion_s: 5}\n")
    assert cli.main(["config", "check", str(path)]) == cli.EXIT_USAGE
    assert "limits.max_sesion_s" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["config", "mend", str(path)])
