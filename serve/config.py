"""The service's configuration: one pydantic model, one YAML file, unknown keys refused.

Every option has an effect; one that could not have any in the given combination is an error.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from causal_forcing.errors import InvalidRequest
from causal_forcing.geometry import Geometry
from causal_forcing.presets import Preset, get_preset

Replicas = Annotated[int, Field(ge=1, le=1024)]
Port = Annotated[int, Field(ge=1, le=65535)]


class Section(BaseModel):
    """Base of every part: frozen, without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Limits(Section):
    """What the service enforces on sessions.

    Attributes:
        max_session_s: Longest session; a replica that is being replaced waits this long for its sessions.
        config_timeout_s: How long a call may take to send its SessionConfig.
        silence_timeout_s: A client that sends nothing for this long is taken for dead.
        stall_timeout_s: A client that leaves its session without credit for this long is ended.
        default_credit_chunks: Chunks a session may be ahead of its client, unless the client says otherwise.
        max_credit_chunks: Most that a client may ask for; bounds a session's memory in gateway and proxy.
        max_messages_per_s: Messages that a client may send in the long run; twice as many at once.
        max_pending_prompts: Prompts of a session that may wait for their first chunk.
        max_queued_sessions: Sessions that may wait for a generator.
    """

    max_session_s: PositiveFloat = 3600
    config_timeout_s: PositiveFloat = 10
    silence_timeout_s: PositiveFloat = 30
    stall_timeout_s: PositiveFloat = 60
    default_credit_chunks: Annotated[int, Field(ge=1, le=64)] = 2
    max_credit_chunks: Annotated[int, Field(ge=1, le=64)] = 8
    max_messages_per_s: PositiveFloat = 100
    max_pending_prompts: Annotated[int, Field(ge=1, le=1024)] = 32
    max_queued_sessions: Annotated[int, Field(ge=0, le=100_000)] = 64

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.default_credit_chunks > self.max_credit_chunks:
            raise ValueError("default_credit_chunks must not exceed max_credit_chunks")
        return self


class GatewayConfig(Section):
    """The gRPC ingress.

    Attributes:
        replicas: How many.
        num_cpus: CPUs that Ray sets aside for each.
        max_sessions: Sessions one replica carries, waiting ones included.
    """

    replicas: Replicas = 1
    num_cpus: Annotated[float, Field(ge=0)] = 0
    max_sessions: Annotated[int, Field(ge=1, le=10_000)] = 200


class WorkerConfig(Section):
    """A deployment that computes.

    Attributes:
        replicas: How many.
        num_cpus: CPUs that Ray sets aside for each.
        num_gpus: GPUs that Ray gives to each; a fraction shares one.
        threads: CPU threads that PyTorch uses in each.
    """

    replicas: Replicas = 1
    num_cpus: Annotated[float, Field(ge=0)] = 0
    num_gpus: Annotated[float, Field(ge=0)] = 0
    threads: PositiveInt = 1


class TextEncoderConfig(WorkerConfig):
    """The text encoder.

    Attributes:
        max_batch: Prompts of different sessions that are encoded together.
        batch_wait_s: How long a prompt waits for company.
    """

    max_batch: Annotated[int, Field(ge=1, le=256)] = 8
    batch_wait_s: Annotated[float, Field(ge=0, le=1)] = 0.002


class VaeDecoderConfig(WorkerConfig):
    """The VAE decoder.

    Attributes:
        cache_bytes: Memory for the temporal caches of sessions; the ones not used for longest are given up and made
            anew from latents when needed.
    """

    cache_bytes: Annotated[int, Field(ge=1 << 20)] = 4 << 30


Pool = Annotated[str, Field(pattern=r"^[a-z]([a-z0-9-]{0,40}[a-z0-9])?$")]
"""Name of a kind of node."""


class Placement(Section):
    """Where deployments run: each on the nodes of a pool, or anywhere.

    A node belongs to a pool by Ray's custom resource ``pool-NAME``.

    Attributes:
        gateway: Pool of the gateways.
        text_encoder: Pool of the text encoders.
        generator: Pool of the generators.
        vae_decoder: Pool of the VAE decoders.
    """

    gateway: Pool | None = None
    text_encoder: Pool | None = None
    generator: Pool | None = None
    vae_decoder: Pool | None = None

    @property
    def pools(self) -> tuple[str, ...]:
        """Names of all pools, each once."""
        return tuple(sorted({pool for pool in self.model_dump().values() if pool is not None}))


class SimulatedConfig(Section):
    """An accelerator that only sleeps, for load tests of everything around it.

    Attributes:
        chunk_ms: Time of a chunk in the generator.
        decode_ms: Time of a chunk in the decoder.
        encode_ms: Time of a prompt in the text encoder.
        frame_bytes: Encoded frames are padded to this size.
    """

    chunk_ms: Annotated[float, Field(ge=0)] = 101
    decode_ms: Annotated[float, Field(ge=0)] = 0
    encode_ms: Annotated[float, Field(ge=0)] = 0
    frame_bytes: Annotated[int, Field(ge=0, le=64 << 20)] = 0


class ServiceConfig(Section):
    """The whole service.

    Attributes:
        preset: The model, by name.
        engine: ``model`` computes; ``simulated`` sleeps and draws test pictures.
        vae: VAE type that decodes.
        device: Where the model runs.
        weights_dir: Folder with the preset's files; None for the default folder, or for an embedded model.
        sizes: Frame sizes ``[height, width]`` that sessions may have; empty for the native one alone.
        max_window_frames: Largest window a session may have; None for the preset's own.
        peers: ``loopback`` serves callers on this machine alone, although the port is open to the network; ``any`` is
            for a service behind a front that authenticates.
        grpc_port: Port of the gRPC proxy.
        http_port: Port of the HTTP proxy (health and readiness).
        placement: Which nodes of a cluster run what.
    """

    preset: str = "tiny"
    engine: Literal["model", "simulated"] = "model"
    vae: str = "wan"
    device: Literal["cpu", "cuda"] = "cpu"
    weights_dir: Path | None = None
    sizes: tuple[tuple[int, int], ...] = ()
    max_window_frames: Annotated[int, Field(ge=1, le=1024)] | None = None
    peers: Literal["loopback", "any"] = "loopback"
    grpc_port: Port = 9000
    http_port: Port = 8000
    limits: Limits = Limits()
    gateway: GatewayConfig = GatewayConfig()
    text_encoder: TextEncoderConfig = TextEncoderConfig()
    generator: WorkerConfig = WorkerConfig()
    vae_decoder: VaeDecoderConfig = VaeDecoderConfig()
    placement: Placement = Placement()
    simulated: SimulatedConfig | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        try:
            self.model_preset.vae_config(self.vae)
            for height, width in self.sizes:
                Geometry(height, width)
        except InvalidRequest as error:
            raise ValueError(error.message) from error
        if self.engine == "simulated":
            given = {"weights_dir", "device"} & self.model_fields_set
            if given:
                raise ValueError(f"{', '.join(sorted(given))} can have no effect on a simulated engine")
        elif self.simulated is not None:
            raise ValueError("simulated can have no effect without engine: simulated")
        if self.device == "cpu" and (
            self.generator.num_gpus or self.vae_decoder.num_gpus or self.text_encoder.num_gpus
        ):
            raise ValueError("num_gpus can have no effect on device: cpu")
        return self

    @property
    def model_preset(self) -> Preset:
        """The model."""
        return get_preset(self.preset)

    @property
    def allowed_sizes(self) -> tuple[tuple[int, int], ...]:
        """Frame sizes ``(height, width)`` that sessions may have; the first is the default."""
        return self.sizes or ((self.model_preset.height, self.model_preset.width),)

    @property
    def allowed_window_frames(self) -> int:
        """Largest window a session may have."""
        return self.max_window_frames or self.model_preset.window_frames

    @property
    def simulation(self) -> SimulatedConfig:
        """How the simulated engine behaves."""
        return self.simulated or SimulatedConfig()


def load_config(path: str | Path | None = None, **overrides: object) -> ServiceConfig:
    """Return the configuration of a YAML file (None: all defaults) with some top-level fields replaced.

    Raises:
        InvalidRequest: The file cannot be read, or a value is not allowed; the first problem is named by its path.
    """
    values: object = {}
    if path is not None:
        try:
            values = yaml.safe_load(Path(path).read_text()) or {}
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise InvalidRequest("config", str(path), f"must be a readable YAML file ({error})") from error
    if not isinstance(values, dict):
        raise InvalidRequest("config", str(path), "must hold a mapping of option names")
    try:
        return ServiceConfig.model_validate(values | overrides)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(str(part) for part in first["loc"]) or "config"
        raise InvalidRequest(name, first["input"] if first["loc"] else str(path), first["msg"]) from error
