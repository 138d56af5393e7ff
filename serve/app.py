"""Builds the Ray Serve application from its configuration.

`serve.app:app` is the import path for `serve run` and KubeRay; its arguments are the configuration's fields.
"""

from __future__ import annotations

import hashlib
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig
from ray.serve.schema import LoggingConfig

from causal_forcing.version import __version__

from .config import CallScaling, GatewayScaling, Scaled, ServiceConfig, WorkerConfig
from .gateway.deployment import Gateway
from .generator import Generator
from .pools import in_pool
from .router import PreferredReplicaRouter
from .text_encoder import TextEncoder
from .vae_decoder import VaeDecoder

APP_NAME = "causal-forcing"
"""Name of the Serve application."""

SERVICER = "protos.causal_forcing.v1.video_pb2_grpc.add_VideoServiceServicer_to_server"
"""What Serve's gRPC proxy must be started with."""

DRAIN_MARGIN_S = 60.0
"""A replica that is being replaced waits this much longer than the longest session."""

SPARE_CALLS = 50
"""Calls that a gateway takes beyond its sessions, to refuse them itself and at once."""

SURGE_PERCENT = 1
"""Replicas beyond the wanted number during an update, rounded up: at least one. The old replica goes on until the new
one is ready; in Serve's usual order every session would be without a decoder meanwhile. Not for what holds sessions: it
ends with them anyway, and a gateway that will be replaced must get no new ones, for which it has no generators."""

LOOK_BACK_S = 15.0
"""Time over which Serve averages calls under way; replicas and handles report them every 10 s."""

HEALTH = {"health_check_period_s": 2, "health_check_timeout_s": 60}
"""A health check waits for a step that holds the interpreter; a dead process is found at once in any case."""


def build(config: ServiceConfig) -> Application:
    """Return the application: gateway, text encoder, generator, VAE decoder."""
    admission = admission_name(config)
    drain_s = config.limits.max_session_s + DRAIN_MARGIN_S
    common: dict[str, Any] = {**HEALTH, "graceful_shutdown_timeout_s": drain_s}
    text_encoder = serve.deployment(
        name="TextEncoder",
        max_surge_percent=SURGE_PERCENT,
        max_ongoing_requests=512,
        logging_config=_logs(config, calls=False),
        **_scale(config.text_encoder),
        **_placement(config.text_encoder),
        **common,
    )(TextEncoder)
    generator = serve.deployment(
        name="Generator",
        max_ongoing_requests=config.generator.sessions_per_replica,
        logging_config=_logs(config, calls=True),
        request_router_config=_router(patience_s=2.0),
        **_scale_generators(config, admission),
        **_placement(config.generator),
        **common,
    )(Generator)
    decoder = serve.deployment(
        name="VaeDecoder",
        max_surge_percent=SURGE_PERCENT,
        max_ongoing_requests=512,
        logging_config=_logs(config, calls=False),
        request_router_config=_router(patience_s=10.0),
        **_scale(config.vae_decoder),
        **_placement(config.vae_decoder),
        **common,
    )(VaeDecoder)
    gateway = serve.deployment(
        name="Gateway",
        max_ongoing_requests=config.gateway.max_sessions + SPARE_CALLS,
        logging_config=_logs(config, calls=True),
        ray_actor_options={"num_cpus": config.gateway.num_cpus},
        **_scale(config.gateway),
        **common,
    )(Gateway)
    pools = config.placement
    bound: Application = _in_pool(gateway, pools.gateway).bind(
        config,
        admission,
        _in_pool(text_encoder, pools.text_encoder).bind(config),
        _in_pool(generator, pools.generator).bind(config, admission),
        _in_pool(decoder, pools.vae_decoder).bind(config),
    )
    return bound


def app(arguments: dict[str, Any]) -> Application:
    """Return the application for a mapping of configuration fields; refuses unknown ones."""
    return build(ServiceConfig.model_validate(arguments))


def admission_name(config: ServiceConfig) -> str:
    """Return the name of the admission actor: the same for all replicas of one version of the application."""
    version = hashlib.sha256(f"{__version__} {config.model_dump_json()}".encode()).hexdigest()[:12]
    return f"admission-{version}"


def _in_pool(deployment: Any, pool: str | None) -> Any:  # noqa: ANN401  (ray's deployments are untyped)
    """Return a deployment whose replicas run on the nodes of a pool only."""
    if pool is None:
        return deployment
    options = {**deployment.ray_actor_options, "resources": in_pool(pool)}
    return deployment.options(ray_actor_options=options)


def _logs(config: ServiceConfig, *, calls: bool) -> LoggingConfig:
    """Return how a deployment logs; without ``calls`` where there is one for every chunk."""
    encoding = "JSON" if config.logs.format == "json" else "TEXT"
    return LoggingConfig(encoding=encoding, log_level=config.logs.level, enable_access_log=calls)


def _router(patience_s: float) -> RequestRouterConfig:
    router: Any = PreferredReplicaRouter  # annotated as a mapping, which it is not
    return RequestRouterConfig(request_router_class=router, request_router_kwargs={"patience_s": patience_s})


def _placement(worker: WorkerConfig) -> dict[str, Any]:
    options: dict[str, float] = {"num_cpus": worker.num_cpus}
    if worker.num_gpus:
        options["num_gpus"] = worker.num_gpus
    return {"ray_actor_options": options}


def _scale(deployment: Scaled) -> dict[str, Any]:
    """Return the options that say how many replicas there are; Serve counts calls, for a gateway sessions."""
    match deployment.autoscaling:
        case CallScaling(target_calls=target) | GatewayScaling(target_sessions=target):
            return {"autoscaling_config": _autoscaling(deployment, target)}
    return {"num_replicas": deployment.replicas}


def _scale_generators(config: ServiceConfig, admission: str) -> dict[str, Any]:
    """Return the options that say how many generators there are; our policy counts sessions."""
    generator = config.generator
    if generator.autoscaling is None:
        return {"num_replicas": generator.replicas}
    policy = AutoscalingPolicy(  # type: ignore[no-untyped-call]
        policy_function="serve.autoscaling:GeneratorPolicy",
        policy_kwargs={
            "admission": admission,
            "sessions_per_replica": generator.sessions_per_replica,
            "spare_sessions": generator.autoscaling.spare_sessions,
        },
    )
    return {"autoscaling_config": _autoscaling(generator, generator.sessions_per_replica, policy=policy)}


def _autoscaling(deployment: Scaled, target: float, **more: Any) -> AutoscalingConfig:  # noqa: ANN401
    scaling = deployment.autoscaling
    assert scaling is not None
    return AutoscalingConfig(
        min_replicas=scaling.min_replicas,
        max_replicas=scaling.max_replicas,
        target_ongoing_requests=target,
        upscale_delay_s=scaling.upscale_delay_s,
        downscale_delay_s=scaling.downscale_delay_s,
        look_back_period_s=LOOK_BACK_S,
        **more,
    )
