"""What a client says and hears, as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from google.protobuf.duration_pb2 import Duration

from causal_forcing.errors import InvalidRequest
from causal_forcing.prompts import Blend, PromptUpdate, WeightedPrompt
from protos.causal_forcing.v1 import video_pb2 as pb

from .errors import VideoServiceError

if TYPE_CHECKING:
    from serve.codecs.frames import Pixels

CODECS = {
    "jpeg": pb.FRAME_CODEC_JPEG,
    "png": pb.FRAME_CODEC_PNG,
    "raw_rgb24": pb.FRAME_CODEC_RAW_RGB24,
    "h264_annexb": pb.FRAME_CODEC_H264_ANNEXB,
    "h264_fmp4": pb.FRAME_CODEC_H264_FMP4,
}
"""Codec names and what the protocol calls them."""

STILL_CODECS = ("jpeg", "png", "raw_rgb24")
"""Codecs whose frames are pictures by themselves."""

PACINGS = {"realtime": pb.PACING_REALTIME, "as_fast_as_possible": pb.PACING_AS_FAST_AS_POSSIBLE}
"""Pacing names and what the protocol calls them."""

SLOW_CLIENT_POLICIES = {
    "lossless": pb.SLOW_CLIENT_POLICY_LOSSLESS,
    "drop_to_latest": pb.SLOW_CLIENT_POLICY_DROP_TO_LATEST,
}
"""Names of slow-client policies and what the protocol calls them."""


@dataclass(frozen=True)
class StreamOptions:
    """What a session shall be; None takes the server's default.

    Attributes:
        prompt: Of the first chunk.
        height: Pixel rows; with ``width``.
        width: Pixel columns; with ``height``.
        seed: Source of all noise.
        denoising_steps: Strictly descending timesteps.
        window_frames: Latent frames the model looks back on.
        sink_frames: Latent frames it never forgets.
        codec: ``jpeg``, ``png``, ``raw_rgb24``, ``h264_annexb`` or ``h264_fmp4``.
        jpeg_quality: 1 to 100; JPEG only.
        credit_chunks: Chunks the server may be ahead.
        pacing: ``realtime`` or ``as_fast_as_possible``.
        slow_client_policy: ``lossless`` or ``drop_to_latest``.
        frames_per_second: Rate at which the video is shown, 1 to 60.
        h264_bit_rate: Bits a second; H.264 only.
        h264_keyframe_interval_frames: Frames from one keyframe to the next; H.264 only.
        start_image: JPEG or PNG file that the video starts from; empty for none.

    Raises:
        InvalidRequest: If the protocol has no such codec, pacing or slow-client policy.
    """

    prompt: PromptUpdate | str
    height: int | None = None
    width: int | None = None
    seed: int | None = None
    denoising_steps: tuple[int, ...] = ()
    window_frames: int | None = None
    sink_frames: int | None = None
    codec: str = "jpeg"
    jpeg_quality: int | None = None
    credit_chunks: int | None = None
    pacing: str | None = None
    slow_client_policy: str | None = None
    frames_per_second: int | None = None
    h264_bit_rate: int | None = None
    h264_keyframe_interval_frames: int | None = None
    start_image: bytes = b""

    def __post_init__(self) -> None:
        _require_name("codec", self.codec, CODECS)
        if self.pacing is not None:
            _require_name("pacing", self.pacing, PACINGS)
        if self.slow_client_policy is not None:
            _require_name("slow_client_policy", self.slow_client_policy, SLOW_CLIENT_POLICIES)

    def to_proto(self) -> pb.SessionConfig:
        """Return the protocol's message."""
        update = as_update(self.prompt)
        prompt = prompt_to_proto(update)
        prompt.policy = pb.SWITCH_POLICY_UNSPECIFIED  # a first prompt has no past to treat
        return pb.SessionConfig(
            prompt=prompt,
            height=self.height,
            width=self.width,
            seed=self.seed,
            denoising_steps=self.denoising_steps,
            window_frames=self.window_frames,
            sink_frames=self.sink_frames,
            codec=pb.FrameCodec.Name(CODECS[self.codec]),
            jpeg_quality=self.jpeg_quality,
            credit_chunks=self.credit_chunks,
            pacing=PACINGS[self.pacing] if self.pacing else None,
            slow_client_policy=SLOW_CLIENT_POLICIES[self.slow_client_policy] if self.slow_client_policy else None,
            frames_per_second=self.frames_per_second,
            h264_bit_rate=self.h264_bit_rate,
            h264_keyframe_interval_frames=self.h264_keyframe_interval_frames,
            start_image=self.start_image,
        )


@dataclass(frozen=True)
class Queued:
    """Where the session stands in the queue.

    Attributes:
        sessions_ahead: Sessions before it.
        waited_s: How long it has waited.
        estimated_wait_s: The server's guess of what is left, if it has one.
    """

    sessions_ahead: int
    waited_s: float
    estimated_wait_s: float | None


@dataclass(frozen=True)
class Started:
    """The session runs.

    Attributes:
        session_id: Its name in the server's log.
        config: What it runs with.
        model: What makes the video.
        limits: What the server enforces.
    """

    session_id: str
    config: pb.SessionConfig
    model: pb.ModelInfo
    limits: pb.SessionLimits


@dataclass(frozen=True)
class PromptApplied:
    """A prompt takes effect with the next frame.

    Attributes:
        prompt_id: Its name.
        chunk_index: The first chunk made under it.
        frame_index: The first frame of that chunk.
        superseded: Updates it replaced before they took effect.
    """

    prompt_id: str
    chunk_index: int
    frame_index: int
    superseded: tuple[str, ...]


@dataclass(frozen=True)
class PromptRefused:
    """A prompt has no effect; the session goes on under the one before it.

    Attributes:
        prompt_id: Its name.
        reason: Stable UPPER_SNAKE name of why.
        message: Text for people.
        retry_after_s: When to send it again, if that makes sense.
        error_id: Names the refusal in the server's log.
    """

    prompt_id: str
    reason: str
    message: str
    retry_after_s: float | None
    error_id: str


@dataclass(frozen=True)
class FramesDropped:
    """Frames that were made and not sent, because this client did not keep up.

    Attributes:
        first_frame_index: The first of them.
        frame_count: How many frames.
        first_chunk_index: The first chunk they belong to.
        chunk_count: How many chunks.
    """

    first_frame_index: int
    frame_count: int
    first_chunk_index: int
    chunk_count: int


@dataclass(frozen=True)
class Ending:
    """The session will reach its longest length.

    Attributes:
        remaining_s: What is left.
    """

    remaining_s: float


@dataclass(frozen=True)
class ChunkTimings:
    """Where the time of a chunk went, in seconds (see the protocol's ChunkTimings)."""

    denoise_s: float
    decode_s: float
    encode_s: float
    queue_s: float = 0.0
    text_s: float = 0.0


@dataclass(frozen=True)
class Frame:
    """One encoded pixel frame.

    Attributes:
        chunk_index: The chunk it belongs to.
        frame_index: Its number in the session.
        prompt_id: Of the prompt in force.
        data: The encoded frame.
        codec: How it is encoded.
        height: Pixel rows.
        width: Pixel columns.
        timings: Of the chunk, with its last frame; None with the others.
        keyframe: Whether it can be decoded without those before it; only H.264 has others.
        init_segment: What a player of fragmented MP4 needs before ``data``; mostly empty.
    """

    chunk_index: int
    frame_index: int
    prompt_id: str
    data: bytes
    codec: str
    height: int
    width: int
    timings: ChunkTimings | None
    keyframe: bool = True
    init_segment: bytes = b""

    @property
    def last_in_chunk(self) -> bool:
        """Whether the chunk is complete."""
        return self.timings is not None

    def pixels(self) -> Pixels:
        """Return ``[H, W, 3]`` uint8 RGB.

        Raises:
            ValueError: If the codec is H.264, whose frames need the ones before them: give their data to a decoder.
        """
        if self.codec not in STILL_CODECS:
            raise ValueError(f"a frame of {self.codec} is not a picture by itself")
        from serve.codecs.frames import Codec, decode_frame

        return decode_frame(Codec(self.codec), self.data, self.height, self.width)


@dataclass(frozen=True)
class Ended:
    """The session ended well.

    Attributes:
        reason: ``CLIENT``, ``MAX_DURATION``, ``PAUSE_TIMEOUT`` or, of a video of a given length, ``COMPLETE``.
        chunk_count: Chunks sent.
        frame_count: Frames sent.
        byte_count: Bytes of frames sent.
        duration_s: From its start.
    """

    reason: str
    chunk_count: int
    frame_count: int
    byte_count: int
    duration_s: float


@dataclass(frozen=True)
class Moved:
    """The session lost its generator and goes on with another one; close to what it would have been, not equal.

    Attributes:
        chunk_index: The first chunk made there.
        frame_index: Its first frame.
        reason: Why, e.g. ``GENERATOR_LOST`` or ``DEVICE_FAULT``.
        interruption_s: From the loss to the new generator's beginning.
    """

    chunk_index: int
    frame_index: int
    reason: str
    interruption_s: float


@dataclass(frozen=True)
class Reconnecting:
    """The session was lost, and a new one is asked for after a while; only from ``keep_streaming``.

    Attributes:
        error: How it was lost.
        attempt: Which new session in a row that did not bring a frame yet, from 1.
        wait_s: The while.
    """

    error: VideoServiceError
    attempt: int
    wait_s: float


@dataclass(frozen=True)
class SessionInfo:
    """Where a session of the service stands (see the protocol's SessionStatus).

    Attributes:
        session_id: Its name.
        tenant: Whose it is.
        state: ``QUEUED``, ``RUNNING`` or ``PAUSED``.
        sessions_ahead: While it waits: sessions that get a generator before it.
        age_s: Since it came.
        chunk_count: Chunks sent.
        frame_count: Frames sent.
        byte_count: Bytes of frames sent.
        dropped_frame_count: Frames dropped.
        gateway_memory_bytes: Memory that it takes in its gateway.
    """

    session_id: str
    tenant: str
    state: str
    sessions_ahead: int
    age_s: float
    chunk_count: int
    frame_count: int
    byte_count: int
    dropped_frame_count: int
    gateway_memory_bytes: int

    @classmethod
    def from_proto(cls, status: pb.SessionStatus) -> SessionInfo:
        """Return it from the protocol's message."""
        return cls(
            session_id=status.session_id,
            tenant=status.tenant,
            state=pb.SessionState.Name(status.state).removeprefix("SESSION_STATE_"),
            sessions_ahead=status.sessions_ahead_count,
            age_s=seconds(status.age),
            chunk_count=status.chunk_count,
            frame_count=status.frame_count,
            byte_count=status.byte_count,
            dropped_frame_count=status.dropped_frame_count,
            gateway_memory_bytes=status.gateway_memory_byte_count,
        )


Event = Queued | Started | PromptApplied | PromptRefused | Frame | Moved | FramesDropped | Ending | Ended | Reconnecting
"""What a session yields."""


def _require_name(field: str, name: str, known: Mapping[str, object]) -> None:
    if name not in known:
        raise InvalidRequest(field, name, f"must be one of {', '.join(known)}")


def as_update(prompt: PromptUpdate | str) -> PromptUpdate:
    """Return a prompt update for a text, or the update itself."""
    if isinstance(prompt, PromptUpdate):
        return prompt
    return PromptUpdate((WeightedPrompt(prompt),))


def prompt_to_proto(update: PromptUpdate) -> pb.PromptUpdate:
    """Return the protocol's message for an update."""
    blends = {Blend.LINEAR: pb.BLEND_LINEAR, Blend.SLERP: pb.BLEND_SLERP}
    return pb.PromptUpdate(
        prompts=[pb.WeightedPrompt(text=prompt.text, weight=prompt.weight) for prompt in update.prompts],
        blend=blends[update.blend],
        transition_chunks=update.transition_chunks,
        transition=blends[update.transition],
        policy=f"SWITCH_POLICY_{update.policy.name}",
        prompt_id=update.prompt_id,
    )


def seconds(duration: Duration) -> float:
    """Return a duration in seconds."""
    return duration.ToNanoseconds() / 1e9
