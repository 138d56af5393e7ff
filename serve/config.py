"""The service's configuration: one pydantic model, one YAML file, unknown keys refused.

Every option has an effect; one that could not have any in the given combination is an error.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self, TypeVar

import yaml
from pydantic import Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from causal_forcing.config import SessionConfig
from causal_forcing.errors import InvalidRequest, OutOfMemory
from causal_forcing.geometry import Geometry
from causal_forcing.presets import Preset, get_preset

from .access.config import IdentityConfig, LogConfig, ModerationConfig, UsageConfig
from .section import Section

if TYPE_CHECKING:
    from causal_forcing.weights.memory import MemoryPlan
from .metrics.definitions import Role

Replicas = Annotated[int, Field(ge=1, le=1024)]
Port = Annotated[int, Field(ge=1, le=65535)]


AnySection = TypeVar("AnySection", bound=Section)


class Limits(Section):
    """What the service enforces on sessions.

    Attributes:
        max_session_s: Longest session; a replica that is being replaced waits this long for its sessions.
        config_timeout_s: How long a call may take to send its SessionConfig.
        silence_timeout_s: A client that sends nothing for this long is taken for dead.
        stall_timeout_s: A client that leaves its session without credit for this long is ended.
        pause_timeout_s: A session that is paused for this long is ended; the count starts anew with the next chunk.
        ending_notice_s: How long before the end of the longest session its client is warned.
        default_credit_chunks: Chunks a session may be ahead of its client, unless the client says otherwise.
        max_credit_chunks: Most that a client may ask for; bounds a session's memory in gateway and proxy.
        max_messages_per_s: Messages that a client may send in the long run; twice as many at once.
        max_pending_prompts: Prompts of a session that may wait for their first chunk.
        max_queued_sessions: Sessions that may wait for a generator.
        move_timeout_s: How long a session that has lost its generator waits for another one, which it gets before
            everyone who has not begun; then it ends.
        max_moves_in_a_row: Generators that a session may lose without having made some chunks between; 0 ends it with
            the first one.
        max_generate_s: Longest video of one GenerateVideo call; what a client that vanishes unseen can cost.
        max_generate_bytes: Most bytes of encoded frames of one GenerateVideo call.
    """

    max_session_s: PositiveFloat = 3600
    config_timeout_s: PositiveFloat = 10
    silence_timeout_s: PositiveFloat = 30
    stall_timeout_s: PositiveFloat = 60
    pause_timeout_s: PositiveFloat = 300
    ending_notice_s: Annotated[float, Field(ge=0)] = 30
    default_credit_chunks: Annotated[int, Field(ge=1, le=64)] = 2
    max_credit_chunks: Annotated[int, Field(ge=1, le=64)] = 8
    max_messages_per_s: PositiveFloat = 100
    max_pending_prompts: Annotated[int, Field(ge=1, le=1024)] = 32
    max_queued_sessions: Annotated[int, Field(ge=0, le=100_000)] = 64
    move_timeout_s: PositiveFloat = 60
    max_moves_in_a_row: Annotated[int, Field(ge=0, le=16)] = 3
    max_generate_s: Annotated[float, Field(gt=0, le=600)] = 60
    max_generate_bytes: Annotated[int, Field(ge=1 << 20, le=1 << 32)] = 256 << 20

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.default_credit_chunks > self.max_credit_chunks:
            raise ValueError("default_credit_chunks must not exceed max_credit_chunks")
        if not self.max_moves_in_a_row and "move_timeout_s" in self.model_fields_set:
            raise ValueError("move_timeout_s can have no effect with max_moves_in_a_row: 0")
        return self


class PacingConfig(Section):
    """How sessions of the pacing `realtime` keep time.

    Attributes:
        lead_s: How much earlier than at its time in the video a chunk may be begun; what a viewer has in store.
    """

    lead_s: Annotated[float, Field(ge=0, le=10)] = 0.25


class Scaling(Section):
    """Between how many replicas a deployment moves by itself, and how soon.

    Attributes:
        min_replicas: Fewest; 0 stops them all while there is nothing to do.
        max_replicas: Most.
        upscale_delay_s: How long more must be wanted before replicas start.
        downscale_delay_s: How long fewer must be wanted before replicas stop.
    """

    min_replicas: Annotated[int, Field(ge=0, le=1024)] = 1
    max_replicas: Replicas
    upscale_delay_s: Annotated[float, Field(ge=0)] = 0
    downscale_delay_s: Annotated[float, Field(ge=0)] = 120

    @model_validator(mode="after")
    def _check_replicas(self) -> Self:
        if self.min_replicas >= self.max_replicas:
            raise ValueError("min_replicas must be less than max_replicas; a fixed number is `replicas`")
        return self


class CallScaling(Scaling):
    """Scales by the calls that a deployment has in hand.

    Attributes:
        target_calls: Calls under way, for each replica, averaged over some seconds.
    """

    target_calls: PositiveFloat = 2


class GatewayScaling(Scaling):
    """Scales by the sessions that gateways carry.

    Attributes:
        min_replicas: Fewest; a client has to be answered by one.
        target_sessions: Sessions, waiting ones included, for each replica.
    """

    min_replicas: Replicas = 1
    target_sessions: PositiveInt = 12


class GeneratorScaling(Scaling):
    """Scales by sessions: those that have a generator, those that wait for one, and some to spare.

    Attributes:
        spare_sessions: Places kept warm for sessions that have not come yet.
    """

    spare_sessions: Annotated[int, Field(ge=0, le=1024)] = 0


class Scaled(Section):
    """A deployment with a fixed number of replicas, or one that moves by itself.

    Attributes:
        replicas: How many, always.
        autoscaling: Between how many, instead.
        num_cpus: CPUs that Ray sets aside for each.
    """

    replicas: Replicas = 1
    autoscaling: Scaling | None = None
    num_cpus: Annotated[float, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _check_scaling(self) -> Self:
        if self.autoscaling is not None and "replicas" in self.model_fields_set:
            raise ValueError("replicas can have no effect beside autoscaling")
        return self

    @property
    def max_replicas(self) -> int:
        """Most replicas there can be."""
        return self.autoscaling.max_replicas if self.autoscaling is not None else self.replicas


class GatewayConfig(Scaled):
    """The gRPC ingress.

    Attributes:
        autoscaling: Between how many replicas, instead of a fixed number.
        max_sessions: Sessions one replica carries, waiting ones included.
    """

    autoscaling: GatewayScaling | None = None
    max_sessions: Annotated[int, Field(ge=1, le=10_000)] = 200

    @model_validator(mode="after")
    def _check_sessions(self) -> Self:
        scaling = self.autoscaling
        if scaling is not None and scaling.target_sessions > self.max_sessions:
            raise ValueError("autoscaling.target_sessions must not exceed max_sessions")
        return self


class WorkerConfig(Scaled):
    """A deployment that computes.

    Attributes:
        num_gpus: GPUs that Ray gives to each; a fraction shares one.
        threads: CPU threads that PyTorch uses in each.
    """

    num_gpus: Annotated[float, Field(ge=0)] = 0
    threads: PositiveInt = 1


class GeneratorConfig(WorkerConfig):
    """The generator.

    Attributes:
        autoscaling: Between how many replicas, instead of a fixed number.
        sessions_per_replica: Sessions that take turns on one device, a chunk each; each gets its share of the speed.
        memory_bytes: Memory of one device. With it the configuration is refused if the weights and that many sessions
            of the largest kind do not fit; without it a replica finds that out when it starts. Admission counts what
            is left of it beside the weights (see :mod:`serve.admission.budget`).
        first_chunk_timeout_s: How long each of a session's first chunks may take, and with ``compile`` each that
            switches prompts or comes before its window is full; later ones are compared with those before them. A
            device that takes longer is taken for broken.
        silence_timeout_s: A generator whose process says nothing for this long is ended.
        compile: Whether a replica compiles its passes before it is ready: once for each allowed size, with the default
            window. What a session asks for beyond that is compiled while it waits, until its window is full.
        quantization: ``fp8_e4m3fn`` for 8-bit linear layers, on GPUs that compute in them.
    """

    autoscaling: GeneratorScaling | None = None
    compile: bool = False
    quantization: Literal["fp8_e4m3fn"] | None = None
    sessions_per_replica: Annotated[int, Field(ge=1, le=256)] = 1
    memory_bytes: Annotated[int, Field(ge=1 << 20)] | None = None
    first_chunk_timeout_s: PositiveFloat = 120
    silence_timeout_s: Annotated[float, Field(ge=5)] = 10

    @model_validator(mode="after")
    def _check_spare(self) -> Self:
        scaling, each = self.autoscaling, self.sessions_per_replica
        if scaling is not None and scaling.spare_sessions > scaling.max_replicas * each:
            raise ValueError(f"autoscaling.spare_sessions must not exceed the {scaling.max_replicas * each} places")
        if scaling is not None and scaling.spare_sessions and not scaling.min_replicas:
            raise ValueError("autoscaling.min_replicas: 0 can have no effect beside spare_sessions")
        return self


class TextEncoderConfig(WorkerConfig):
    """The text encoder.

    Attributes:
        autoscaling: Between how many replicas, instead of a fixed number.
        max_batch: Prompts of different sessions that are encoded together.
        batch_wait_s: How long a prompt waits for company.
        step_timeout_s: How long a batch may take. A device that takes longer is taken for broken, and its process ends
            itself.
        silence_timeout_s: After this long without an answer the replicas are asked for their health, and one that does
            not answer that either is ended.
    """

    autoscaling: CallScaling | None = None
    max_batch: Annotated[int, Field(ge=1, le=256)] = 8
    batch_wait_s: Annotated[float, Field(ge=0, le=1)] = 0.002
    step_timeout_s: PositiveFloat = 60
    silence_timeout_s: Annotated[float, Field(ge=1)] = 10


class VaeDecoderConfig(WorkerConfig):
    """The VAE decoder.

    Attributes:
        autoscaling: Between how many replicas, instead of a fixed number.
        cache_bytes: Memory for the temporal caches of sessions; the ones not used for longest are given up and made
            anew from latents when needed.
        first_step_timeout_s: How long each of the first steps at a size may take (a chunk, or a frame of a cache that
            is made anew); later ones are compared with those before them. As with the text encoder.
        silence_timeout_s: As with the text encoder.
    """

    autoscaling: CallScaling | None = None
    cache_bytes: Annotated[int, Field(ge=1 << 20)] = 4 << 30
    first_step_timeout_s: PositiveFloat = 120
    silence_timeout_s: Annotated[float, Field(ge=1)] = 10


PoolName = Annotated[str, Field(pattern=r"^[a-z]([a-z0-9-]{0,40}[a-z0-9])?$")]
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

    gateway: PoolName | None = None
    text_encoder: PoolName | None = None
    generator: PoolName | None = None
    vae_decoder: PoolName | None = None

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
        fault_dir: Folder in which tests plant faults (see :mod:`serve.planted`); None looks for none.
        picture_px: Height and width of the pictures drawn; None for the session's. Small ones take no time to encode.
    """

    chunk_ms: Annotated[float, Field(ge=0)] = 101
    decode_ms: Annotated[float, Field(ge=0)] = 0
    encode_ms: Annotated[float, Field(ge=0)] = 0
    frame_bytes: Annotated[int, Field(ge=0, le=64 << 20)] = 0
    fault_dir: Path | None = None
    picture_px: Annotated[int, Field(ge=16, le=4096, multiple_of=16)] | None = None


class Prices(Section):
    """What an hour of one replica costs, in the configured currency.

    Attributes:
        gateway: Of a gateway.
        text_encoder: Of a text encoder.
        generator: Of a generator.
        vae_decoder: Of a VAE decoder.
    """

    gateway: Annotated[float, Field(ge=0)] = 0
    text_encoder: Annotated[float, Field(ge=0)] = 0
    generator: Annotated[float, Field(ge=0)] = 0
    vae_decoder: Annotated[float, Field(ge=0)] = 0

    def of(self, role: Role) -> float:
        """Return the price of a replica of that kind."""
        prices = {
            Role.GATEWAY: self.gateway,
            Role.TEXT_ENCODER: self.text_encoder,
            Role.GENERATOR: self.generator,
            Role.DECODER: self.vae_decoder,
        }
        return prices[role]


class TracingConfig(Section):
    """Where traces of sessions go.

    Attributes:
        endpoint: ``host:port`` of a collector that takes OTLP over gRPC.
        tls: Whether it is spoken to with TLS.
        sample_ratio: Share of the sessions that are traced; where a client sends a ``traceparent``, its choice counts.
    """

    endpoint: Annotated[str, Field(pattern=r"^[^\s/:]+:[0-9]{1,5}$")]
    tls: bool = False
    sample_ratio: Annotated[float, Field(gt=0, le=1)] = 1.0


class ObservabilityConfig(Section):
    """What operators see.

    Attributes:
        tracing: Traces for OpenTelemetry; None makes none.
        metrics_port: Port of this machine's metrics for Prometheus, when the service is started by `causal-forcing`;
            None for any free one. On a cluster Ray's own ``--metrics-export-port`` says it.
        price_per_replica_hour: For the cost per minute of a session.
        currency: Of the prices, as ISO 4217 writes it.
    """

    tracing: TracingConfig | None = None
    metrics_port: Port | None = None
    price_per_replica_hour: Prices = Prices()
    currency: Annotated[str, Field(pattern="^[A-Z]{3}$")] = "USD"


class ServiceConfig(Section):
    """The whole service.

    Attributes:
        preset: The model, by name.
        engine: ``model`` computes; ``simulated`` sleeps and draws test pictures.
        vae: VAE type that decodes.
        device: Where the model runs.
        weights_dir: Folder with the preset's files; None for the default folder, or for an embedded model.
        sizes: Frame sizes ``[height, width]`` that sessions may have; empty for the native one alone.
        max_window_frames: Largest window a session may have; None for the preset's own. If it is less than that, it is
            also what a session gets that asks for none.
        peers: ``loopback`` serves callers on this machine alone, although the port is open to the network; ``any``
            serves all. Default: ``loopback`` without an identity, ``any`` with one.
        grpc_port: Port of the gRPC proxy.
        http_port: Port of the HTTP proxy (health and readiness).
        placement: Which nodes of a cluster run what.
        identity: How callers are told apart.
        moderation: Who looks at prompts and start images before they are shown; None: nobody.
        usage: Where records of what sessions used go; None: nowhere.
        logs: The processes' logs.
    """

    preset: str = "tiny"
    engine: Literal["model", "simulated"] = "model"
    vae: str = "wan"
    device: Literal["cpu", "cuda"] = "cpu"
    weights_dir: Path | None = None
    sizes: tuple[tuple[int, int], ...] = ()
    max_window_frames: Annotated[int, Field(ge=1, le=1024)] | None = None
    peers: Literal["loopback", "any"] | None = None
    grpc_port: Port = 9000
    http_port: Port = 8000
    limits: Limits = Limits()
    pacing: PacingConfig = PacingConfig()
    gateway: GatewayConfig = GatewayConfig()
    text_encoder: TextEncoderConfig = TextEncoderConfig()
    generator: GeneratorConfig = GeneratorConfig()
    vae_decoder: VaeDecoderConfig = VaeDecoderConfig()
    placement: Placement = Placement()
    identity: IdentityConfig = IdentityConfig()
    moderation: ModerationConfig | None = None
    usage: UsageConfig | None = None
    logs: LogConfig = LogConfig()
    simulated: SimulatedConfig | None = None
    observability: ObservabilityConfig = ObservabilityConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        try:
            self.model_preset.vae_config(self.vae)
            for height, width in self.sizes:
                Geometry(height, width)
        except InvalidRequest as error:
            raise ValueError(error.message) from error
        if self.allowed_window_frames < self.model_preset.chunk_frames:
            raise ValueError(
                f"max_window_frames must be at least {self.model_preset.chunk_frames}, a chunk of {self.preset}"
            )
        if self.engine == "simulated":
            given = {"weights_dir", "device"} & self.model_fields_set
            for name in ("memory_bytes", "compile", "quantization"):
                if getattr(self.generator, name):
                    given |= {f"generator.{name}"}
            if given:
                raise ValueError(f"{', '.join(sorted(given))} can have no effect on a simulated engine")
        elif self.simulated is not None:
            raise ValueError("simulated can have no effect without engine: simulated")
        if self.device == "cpu" and (
            self.generator.num_gpus or self.vae_decoder.num_gpus or self.text_encoder.num_gpus
        ):
            raise ValueError("num_gpus can have no effect on device: cpu")
        if self.device == "cpu" and self.generator.quantization is not None:
            needed = "needs device: cuda, and there compute capability 8.9 or more (Ada, Hopper or newer)"
            raise ValueError(f"generator.quantization: {self.generator.quantization} {needed}")
        scaling = self.generator.autoscaling
        if scaling is not None and not scaling.min_replicas and not self.limits.max_queued_sessions:
            raise ValueError("generator.autoscaling.min_replicas: 0 needs a queue (limits.max_queued_sessions)")
        self._check_memory()
        return self

    def _check_memory(self) -> None:
        """Refuse a generator whose device cannot hold its weights and all its sessions at their largest."""
        if self.generator.memory_bytes is None:
            return
        from causal_forcing.weights.memory import require_memory

        limit = self.generator.memory_bytes
        try:
            require_memory(self.generator_memory(), self.device, free=lambda _: limit)
        except OutOfMemory as error:
            raise ValueError(f"generator.memory_bytes: {error.message}") from error

    def generator_memory(self, sessions: int | None = None) -> MemoryPlan:
        """Return what a generator replica needs with so many sessions of the largest kind; None: all its places."""
        from causal_forcing.weights.loading import default_dtype
        from causal_forcing.weights.memory import required_bytes

        session = self.largest_session()
        places = self.generator.sessions_per_replica if sessions is None else sessions
        return required_bytes(
            self.model_preset, None, session, default_dtype(self.device), text_encoder=False, sessions=places
        )

    @property
    def serves_any_peer(self) -> bool:
        """Whether callers on other machines are served."""
        return self.peers == "any" if self.peers is not None else self.identity.mode != "none"

    @property
    def model_preset(self) -> Preset:
        """The model."""
        return get_preset(self.preset)

    @property
    def model_key(self) -> str:
        """What tells this service's latents, embeddings and pixels from another one's."""
        return f"{self.engine} {self.preset} {self.vae} {self.weights_dir or ''}"

    @property
    def allowed_sizes(self) -> tuple[tuple[int, int], ...]:
        """Frame sizes ``(height, width)`` that sessions may have; the first is the default."""
        return self.sizes or ((self.model_preset.height, self.model_preset.width),)

    @property
    def allowed_window_frames(self) -> int:
        """Largest window a session may have."""
        return self.max_window_frames or self.model_preset.window_frames

    @property
    def largest_size(self) -> tuple[int, int]:
        """The largest of the frame sizes that a session may have."""
        return max(self.allowed_sizes, key=lambda size: size[0] * size[1])

    def largest_session(self) -> SessionConfig:
        """Return the session that takes the most memory."""
        height, width = self.largest_size
        return self.session_config(height=height, width=width, window_frames=self.allowed_window_frames)

    def session_config(self, **overrides: object) -> SessionConfig:
        """Return the preset's defaults within the limits of this service, with some fields replaced.

        Raises:
            InvalidRequest: If a value is not allowed.
        """
        preset, (height, width) = self.model_preset, self.allowed_sizes[0]
        window_frames = min(preset.window_frames, self.allowed_window_frames)
        return preset.session_config(**{"height": height, "width": width, "window_frames": window_frames, **overrides})

    @property
    def simulation(self) -> SimulatedConfig:
        """How the simulated engine behaves."""
        return self.simulated or SimulatedConfig()


def load_config(path: str | Path | None = None, **overrides: object) -> ServiceConfig:
    """Return the configuration of a YAML file (None: all defaults) with some top-level fields replaced.

    Raises:
        InvalidRequest: The file cannot be read, or a value is not allowed; the first problem is named by its path.
    """
    return load_section(ServiceConfig, path, **overrides)


def load_section(model: type[AnySection], path: str | Path | None = None, **overrides: object) -> AnySection:
    """Return a YAML file as a configuration of some kind, with some top-level fields replaced.

    Raises:
        InvalidRequest: As :func:`load_config` does.
    """
    values: object = {}
    if path is not None:
        try:
            values = yaml.safe_load(Path(path).read_text()) or {}
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:  # a ValueError: 2026-31-12, or 0b_
            raise InvalidRequest("config", str(path), f"must be a readable YAML file ({error})") from error
    if not isinstance(values, dict):
        raise InvalidRequest("config", str(path), "must hold a mapping of option names")
    try:
        return model.model_validate(values | overrides)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(str(part) for part in first["loc"]) or "config"
        raise InvalidRequest(name, first["input"] if first["loc"] else str(path), first["msg"]) from error
