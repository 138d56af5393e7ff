import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.rpc import status_pb2 as _status_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Pacing(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PACING_UNSPECIFIED: _ClassVar[Pacing]
    PACING_REALTIME: _ClassVar[Pacing]
    PACING_AS_FAST_AS_POSSIBLE: _ClassVar[Pacing]

class SlowClientPolicy(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SLOW_CLIENT_POLICY_UNSPECIFIED: _ClassVar[SlowClientPolicy]
    SLOW_CLIENT_POLICY_LOSSLESS: _ClassVar[SlowClientPolicy]
    SLOW_CLIENT_POLICY_DROP_TO_LATEST: _ClassVar[SlowClientPolicy]

class FrameCodec(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FRAME_CODEC_UNSPECIFIED: _ClassVar[FrameCodec]
    FRAME_CODEC_JPEG: _ClassVar[FrameCodec]
    FRAME_CODEC_PNG: _ClassVar[FrameCodec]
    FRAME_CODEC_RAW_RGB24: _ClassVar[FrameCodec]
    FRAME_CODEC_H264_ANNEXB: _ClassVar[FrameCodec]
    FRAME_CODEC_H264_FMP4: _ClassVar[FrameCodec]

class Blend(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    BLEND_UNSPECIFIED: _ClassVar[Blend]
    BLEND_LINEAR: _ClassVar[Blend]
    BLEND_SLERP: _ClassVar[Blend]

class SwitchPolicy(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SWITCH_POLICY_UNSPECIFIED: _ClassVar[SwitchPolicy]
    SWITCH_POLICY_CROSS_ATTENTION: _ClassVar[SwitchPolicy]
    SWITCH_POLICY_RECACHE: _ClassVar[SwitchPolicy]
    SWITCH_POLICY_FLUSH: _ClassVar[SwitchPolicy]
    SWITCH_POLICY_SCENE_CUT: _ClassVar[SwitchPolicy]

class EndReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    END_REASON_UNSPECIFIED: _ClassVar[EndReason]
    END_REASON_CLIENT: _ClassVar[EndReason]
    END_REASON_MAX_DURATION: _ClassVar[EndReason]
    END_REASON_PAUSE_TIMEOUT: _ClassVar[EndReason]
    END_REASON_COMPLETE: _ClassVar[EndReason]

class SessionState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SESSION_STATE_UNSPECIFIED: _ClassVar[SessionState]
    SESSION_STATE_QUEUED: _ClassVar[SessionState]
    SESSION_STATE_RUNNING: _ClassVar[SessionState]
    SESSION_STATE_PAUSED: _ClassVar[SessionState]
PACING_UNSPECIFIED: Pacing
PACING_REALTIME: Pacing
PACING_AS_FAST_AS_POSSIBLE: Pacing
SLOW_CLIENT_POLICY_UNSPECIFIED: SlowClientPolicy
SLOW_CLIENT_POLICY_LOSSLESS: SlowClientPolicy
SLOW_CLIENT_POLICY_DROP_TO_LATEST: SlowClientPolicy
FRAME_CODEC_UNSPECIFIED: FrameCodec
FRAME_CODEC_JPEG: FrameCodec
FRAME_CODEC_PNG: FrameCodec
FRAME_CODEC_RAW_RGB24: FrameCodec
FRAME_CODEC_H264_ANNEXB: FrameCodec
FRAME_CODEC_H264_FMP4: FrameCodec
BLEND_UNSPECIFIED: Blend
BLEND_LINEAR: Blend
BLEND_SLERP: Blend
SWITCH_POLICY_UNSPECIFIED: SwitchPolicy
SWITCH_POLICY_CROSS_ATTENTION: SwitchPolicy
SWITCH_POLICY_RECACHE: SwitchPolicy
SWITCH_POLICY_FLUSH: SwitchPolicy
SWITCH_POLICY_SCENE_CUT: SwitchPolicy
END_REASON_UNSPECIFIED: EndReason
END_REASON_CLIENT: EndReason
END_REASON_MAX_DURATION: EndReason
END_REASON_PAUSE_TIMEOUT: EndReason
END_REASON_COMPLETE: EndReason
SESSION_STATE_UNSPECIFIED: SessionState
SESSION_STATE_QUEUED: SessionState
SESSION_STATE_RUNNING: SessionState
SESSION_STATE_PAUSED: SessionState

class StreamVideoRequest(_message.Message):
    __slots__ = ("config", "prompt", "ack", "ping", "end", "pause", "resume", "request_keyframe")
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    ACK_FIELD_NUMBER: _ClassVar[int]
    PING_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    PAUSE_FIELD_NUMBER: _ClassVar[int]
    RESUME_FIELD_NUMBER: _ClassVar[int]
    REQUEST_KEYFRAME_FIELD_NUMBER: _ClassVar[int]
    config: SessionConfig
    prompt: PromptUpdate
    ack: Ack
    ping: Ping
    end: End
    pause: Pause
    resume: Resume
    request_keyframe: RequestKeyframe
    def __init__(self, config: _Optional[_Union[SessionConfig, _Mapping]] = ..., prompt: _Optional[_Union[PromptUpdate, _Mapping]] = ..., ack: _Optional[_Union[Ack, _Mapping]] = ..., ping: _Optional[_Union[Ping, _Mapping]] = ..., end: _Optional[_Union[End, _Mapping]] = ..., pause: _Optional[_Union[Pause, _Mapping]] = ..., resume: _Optional[_Union[Resume, _Mapping]] = ..., request_keyframe: _Optional[_Union[RequestKeyframe, _Mapping]] = ...) -> None: ...

class SessionConfig(_message.Message):
    __slots__ = ("prompt", "height", "width", "seed", "denoising_steps", "window_frames", "sink_frames", "codec", "jpeg_quality", "credit_chunks", "pacing", "slow_client_policy", "frames_per_second", "h264_bit_rate", "h264_keyframe_interval_frames", "start_image")
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    DENOISING_STEPS_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FRAMES_FIELD_NUMBER: _ClassVar[int]
    SINK_FRAMES_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    JPEG_QUALITY_FIELD_NUMBER: _ClassVar[int]
    CREDIT_CHUNKS_FIELD_NUMBER: _ClassVar[int]
    PACING_FIELD_NUMBER: _ClassVar[int]
    SLOW_CLIENT_POLICY_FIELD_NUMBER: _ClassVar[int]
    FRAMES_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    H264_BIT_RATE_FIELD_NUMBER: _ClassVar[int]
    H264_KEYFRAME_INTERVAL_FRAMES_FIELD_NUMBER: _ClassVar[int]
    START_IMAGE_FIELD_NUMBER: _ClassVar[int]
    prompt: PromptUpdate
    height: int
    width: int
    seed: int
    denoising_steps: _containers.RepeatedScalarFieldContainer[int]
    window_frames: int
    sink_frames: int
    codec: FrameCodec
    jpeg_quality: int
    credit_chunks: int
    pacing: Pacing
    slow_client_policy: SlowClientPolicy
    frames_per_second: int
    h264_bit_rate: int
    h264_keyframe_interval_frames: int
    start_image: bytes
    def __init__(self, prompt: _Optional[_Union[PromptUpdate, _Mapping]] = ..., height: _Optional[int] = ..., width: _Optional[int] = ..., seed: _Optional[int] = ..., denoising_steps: _Optional[_Iterable[int]] = ..., window_frames: _Optional[int] = ..., sink_frames: _Optional[int] = ..., codec: _Optional[_Union[FrameCodec, str]] = ..., jpeg_quality: _Optional[int] = ..., credit_chunks: _Optional[int] = ..., pacing: _Optional[_Union[Pacing, str]] = ..., slow_client_policy: _Optional[_Union[SlowClientPolicy, str]] = ..., frames_per_second: _Optional[int] = ..., h264_bit_rate: _Optional[int] = ..., h264_keyframe_interval_frames: _Optional[int] = ..., start_image: _Optional[bytes] = ...) -> None: ...

class PromptUpdate(_message.Message):
    __slots__ = ("prompts", "blend", "transition_chunks", "transition", "policy", "prompt_id")
    PROMPTS_FIELD_NUMBER: _ClassVar[int]
    BLEND_FIELD_NUMBER: _ClassVar[int]
    TRANSITION_CHUNKS_FIELD_NUMBER: _ClassVar[int]
    TRANSITION_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    PROMPT_ID_FIELD_NUMBER: _ClassVar[int]
    prompts: _containers.RepeatedCompositeFieldContainer[WeightedPrompt]
    blend: Blend
    transition_chunks: int
    transition: Blend
    policy: SwitchPolicy
    prompt_id: str
    def __init__(self, prompts: _Optional[_Iterable[_Union[WeightedPrompt, _Mapping]]] = ..., blend: _Optional[_Union[Blend, str]] = ..., transition_chunks: _Optional[int] = ..., transition: _Optional[_Union[Blend, str]] = ..., policy: _Optional[_Union[SwitchPolicy, str]] = ..., prompt_id: _Optional[str] = ...) -> None: ...

class WeightedPrompt(_message.Message):
    __slots__ = ("text", "weight")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    text: str
    weight: float
    def __init__(self, text: _Optional[str] = ..., weight: _Optional[float] = ...) -> None: ...

class Ack(_message.Message):
    __slots__ = ("chunk_index",)
    CHUNK_INDEX_FIELD_NUMBER: _ClassVar[int]
    chunk_index: int
    def __init__(self, chunk_index: _Optional[int] = ...) -> None: ...

class Ping(_message.Message):
    __slots__ = ("nonce",)
    NONCE_FIELD_NUMBER: _ClassVar[int]
    nonce: int
    def __init__(self, nonce: _Optional[int] = ...) -> None: ...

class End(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Pause(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Resume(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RequestKeyframe(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StreamVideoResponse(_message.Message):
    __slots__ = ("sequence", "queue_status", "session_started", "frame", "prompt_applied", "pong", "session_ended", "error", "frames_dropped", "session_ending", "session_moved", "prompt_refused")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    QUEUE_STATUS_FIELD_NUMBER: _ClassVar[int]
    SESSION_STARTED_FIELD_NUMBER: _ClassVar[int]
    FRAME_FIELD_NUMBER: _ClassVar[int]
    PROMPT_APPLIED_FIELD_NUMBER: _ClassVar[int]
    PONG_FIELD_NUMBER: _ClassVar[int]
    SESSION_ENDED_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    FRAMES_DROPPED_FIELD_NUMBER: _ClassVar[int]
    SESSION_ENDING_FIELD_NUMBER: _ClassVar[int]
    SESSION_MOVED_FIELD_NUMBER: _ClassVar[int]
    PROMPT_REFUSED_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    queue_status: QueueStatus
    session_started: SessionStarted
    frame: VideoFrame
    prompt_applied: PromptApplied
    pong: Pong
    session_ended: SessionEnded
    error: Error
    frames_dropped: FramesDropped
    session_ending: SessionEnding
    session_moved: SessionMoved
    prompt_refused: PromptRefused
    def __init__(self, sequence: _Optional[int] = ..., queue_status: _Optional[_Union[QueueStatus, _Mapping]] = ..., session_started: _Optional[_Union[SessionStarted, _Mapping]] = ..., frame: _Optional[_Union[VideoFrame, _Mapping]] = ..., prompt_applied: _Optional[_Union[PromptApplied, _Mapping]] = ..., pong: _Optional[_Union[Pong, _Mapping]] = ..., session_ended: _Optional[_Union[SessionEnded, _Mapping]] = ..., error: _Optional[_Union[Error, _Mapping]] = ..., frames_dropped: _Optional[_Union[FramesDropped, _Mapping]] = ..., session_ending: _Optional[_Union[SessionEnding, _Mapping]] = ..., session_moved: _Optional[_Union[SessionMoved, _Mapping]] = ..., prompt_refused: _Optional[_Union[PromptRefused, _Mapping]] = ...) -> None: ...

class QueueStatus(_message.Message):
    __slots__ = ("sessions_ahead_count", "waited", "estimated_wait")
    SESSIONS_AHEAD_COUNT_FIELD_NUMBER: _ClassVar[int]
    WAITED_FIELD_NUMBER: _ClassVar[int]
    ESTIMATED_WAIT_FIELD_NUMBER: _ClassVar[int]
    sessions_ahead_count: int
    waited: _duration_pb2.Duration
    estimated_wait: _duration_pb2.Duration
    def __init__(self, sessions_ahead_count: _Optional[int] = ..., waited: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., estimated_wait: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class SessionStarted(_message.Message):
    __slots__ = ("session_id", "effective_config", "model", "limits")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    EFFECTIVE_CONFIG_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    effective_config: SessionConfig
    model: ModelInfo
    limits: SessionLimits
    def __init__(self, session_id: _Optional[str] = ..., effective_config: _Optional[_Union[SessionConfig, _Mapping]] = ..., model: _Optional[_Union[ModelInfo, _Mapping]] = ..., limits: _Optional[_Union[SessionLimits, _Mapping]] = ...) -> None: ...

class ModelInfo(_message.Message):
    __slots__ = ("name", "trained", "frames_per_second", "frames_per_chunk_count", "vae")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TRAINED_FIELD_NUMBER: _ClassVar[int]
    FRAMES_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    FRAMES_PER_CHUNK_COUNT_FIELD_NUMBER: _ClassVar[int]
    VAE_FIELD_NUMBER: _ClassVar[int]
    name: str
    trained: bool
    frames_per_second: int
    frames_per_chunk_count: int
    vae: str
    def __init__(self, name: _Optional[str] = ..., trained: bool = ..., frames_per_second: _Optional[int] = ..., frames_per_chunk_count: _Optional[int] = ..., vae: _Optional[str] = ...) -> None: ...

class SessionLimits(_message.Message):
    __slots__ = ("silence_timeout", "stall_timeout", "max_duration", "pause_timeout")
    SILENCE_TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    STALL_TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    MAX_DURATION_FIELD_NUMBER: _ClassVar[int]
    PAUSE_TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    silence_timeout: _duration_pb2.Duration
    stall_timeout: _duration_pb2.Duration
    max_duration: _duration_pb2.Duration
    pause_timeout: _duration_pb2.Duration
    def __init__(self, silence_timeout: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., stall_timeout: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., max_duration: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., pause_timeout: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class VideoFrame(_message.Message):
    __slots__ = ("chunk_index", "frame_index", "prompt_id", "data", "part_index", "part_count", "last_in_chunk", "timings", "keyframe", "init_segment")
    CHUNK_INDEX_FIELD_NUMBER: _ClassVar[int]
    FRAME_INDEX_FIELD_NUMBER: _ClassVar[int]
    PROMPT_ID_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    PART_INDEX_FIELD_NUMBER: _ClassVar[int]
    PART_COUNT_FIELD_NUMBER: _ClassVar[int]
    LAST_IN_CHUNK_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    KEYFRAME_FIELD_NUMBER: _ClassVar[int]
    INIT_SEGMENT_FIELD_NUMBER: _ClassVar[int]
    chunk_index: int
    frame_index: int
    prompt_id: str
    data: bytes
    part_index: int
    part_count: int
    last_in_chunk: bool
    timings: ChunkTimings
    keyframe: bool
    init_segment: bytes
    def __init__(self, chunk_index: _Optional[int] = ..., frame_index: _Optional[int] = ..., prompt_id: _Optional[str] = ..., data: _Optional[bytes] = ..., part_index: _Optional[int] = ..., part_count: _Optional[int] = ..., last_in_chunk: bool = ..., timings: _Optional[_Union[ChunkTimings, _Mapping]] = ..., keyframe: bool = ..., init_segment: _Optional[bytes] = ...) -> None: ...

class ChunkTimings(_message.Message):
    __slots__ = ("denoise", "decode", "encode", "queue", "text")
    DENOISE_FIELD_NUMBER: _ClassVar[int]
    DECODE_FIELD_NUMBER: _ClassVar[int]
    ENCODE_FIELD_NUMBER: _ClassVar[int]
    QUEUE_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    denoise: _duration_pb2.Duration
    decode: _duration_pb2.Duration
    encode: _duration_pb2.Duration
    queue: _duration_pb2.Duration
    text: _duration_pb2.Duration
    def __init__(self, denoise: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., decode: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., encode: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., queue: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., text: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class FramesDropped(_message.Message):
    __slots__ = ("first_frame_index", "frame_count", "first_chunk_index", "chunk_count")
    FIRST_FRAME_INDEX_FIELD_NUMBER: _ClassVar[int]
    FRAME_COUNT_FIELD_NUMBER: _ClassVar[int]
    FIRST_CHUNK_INDEX_FIELD_NUMBER: _ClassVar[int]
    CHUNK_COUNT_FIELD_NUMBER: _ClassVar[int]
    first_frame_index: int
    frame_count: int
    first_chunk_index: int
    chunk_count: int
    def __init__(self, first_frame_index: _Optional[int] = ..., frame_count: _Optional[int] = ..., first_chunk_index: _Optional[int] = ..., chunk_count: _Optional[int] = ...) -> None: ...

class SessionEnding(_message.Message):
    __slots__ = ("remaining",)
    REMAINING_FIELD_NUMBER: _ClassVar[int]
    remaining: _duration_pb2.Duration
    def __init__(self, remaining: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class SessionMoved(_message.Message):
    __slots__ = ("chunk_index", "frame_index", "reason", "interruption")
    CHUNK_INDEX_FIELD_NUMBER: _ClassVar[int]
    FRAME_INDEX_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    INTERRUPTION_FIELD_NUMBER: _ClassVar[int]
    chunk_index: int
    frame_index: int
    reason: str
    interruption: _duration_pb2.Duration
    def __init__(self, chunk_index: _Optional[int] = ..., frame_index: _Optional[int] = ..., reason: _Optional[str] = ..., interruption: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class PromptApplied(_message.Message):
    __slots__ = ("prompt_id", "chunk_index", "frame_index", "superseded_prompt_ids")
    PROMPT_ID_FIELD_NUMBER: _ClassVar[int]
    CHUNK_INDEX_FIELD_NUMBER: _ClassVar[int]
    FRAME_INDEX_FIELD_NUMBER: _ClassVar[int]
    SUPERSEDED_PROMPT_IDS_FIELD_NUMBER: _ClassVar[int]
    prompt_id: str
    chunk_index: int
    frame_index: int
    superseded_prompt_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, prompt_id: _Optional[str] = ..., chunk_index: _Optional[int] = ..., frame_index: _Optional[int] = ..., superseded_prompt_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class PromptRefused(_message.Message):
    __slots__ = ("prompt_id", "reason", "message", "retry_after", "error_id")
    PROMPT_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_FIELD_NUMBER: _ClassVar[int]
    ERROR_ID_FIELD_NUMBER: _ClassVar[int]
    prompt_id: str
    reason: str
    message: str
    retry_after: _duration_pb2.Duration
    error_id: str
    def __init__(self, prompt_id: _Optional[str] = ..., reason: _Optional[str] = ..., message: _Optional[str] = ..., retry_after: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., error_id: _Optional[str] = ...) -> None: ...

class Pong(_message.Message):
    __slots__ = ("nonce",)
    NONCE_FIELD_NUMBER: _ClassVar[int]
    nonce: int
    def __init__(self, nonce: _Optional[int] = ...) -> None: ...

class SessionEnded(_message.Message):
    __slots__ = ("reason", "chunk_count", "frame_count", "byte_count", "duration", "dropped_frame_count")
    REASON_FIELD_NUMBER: _ClassVar[int]
    CHUNK_COUNT_FIELD_NUMBER: _ClassVar[int]
    FRAME_COUNT_FIELD_NUMBER: _ClassVar[int]
    BYTE_COUNT_FIELD_NUMBER: _ClassVar[int]
    DURATION_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FRAME_COUNT_FIELD_NUMBER: _ClassVar[int]
    reason: EndReason
    chunk_count: int
    frame_count: int
    byte_count: int
    duration: _duration_pb2.Duration
    dropped_frame_count: int
    def __init__(self, reason: _Optional[_Union[EndReason, str]] = ..., chunk_count: _Optional[int] = ..., frame_count: _Optional[int] = ..., byte_count: _Optional[int] = ..., duration: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., dropped_frame_count: _Optional[int] = ...) -> None: ...

class Error(_message.Message):
    __slots__ = ("status", "reason", "error_id")
    STATUS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    ERROR_ID_FIELD_NUMBER: _ClassVar[int]
    status: _status_pb2.Status
    reason: str
    error_id: str
    def __init__(self, status: _Optional[_Union[_status_pb2.Status, _Mapping]] = ..., reason: _Optional[str] = ..., error_id: _Optional[str] = ...) -> None: ...

class GenerateVideoRequest(_message.Message):
    __slots__ = ("config", "duration")
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    DURATION_FIELD_NUMBER: _ClassVar[int]
    config: SessionConfig
    duration: _duration_pb2.Duration
    def __init__(self, config: _Optional[_Union[SessionConfig, _Mapping]] = ..., duration: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class GenerateVideoResponse(_message.Message):
    __slots__ = ("message",)
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    message: StreamVideoResponse
    def __init__(self, message: _Optional[_Union[StreamVideoResponse, _Mapping]] = ...) -> None: ...

class GetModelRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetModelResponse(_message.Message):
    __slots__ = ("model", "sizes", "default_config", "max_window_frames", "max_credit_chunks", "limits", "max_generate_duration", "max_generate_byte_count", "version")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    SIZES_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_CONFIG_FIELD_NUMBER: _ClassVar[int]
    MAX_WINDOW_FRAMES_FIELD_NUMBER: _ClassVar[int]
    MAX_CREDIT_CHUNKS_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    MAX_GENERATE_DURATION_FIELD_NUMBER: _ClassVar[int]
    MAX_GENERATE_BYTE_COUNT_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    model: ModelInfo
    sizes: _containers.RepeatedCompositeFieldContainer[FrameSize]
    default_config: SessionConfig
    max_window_frames: int
    max_credit_chunks: int
    limits: SessionLimits
    max_generate_duration: _duration_pb2.Duration
    max_generate_byte_count: int
    version: str
    def __init__(self, model: _Optional[_Union[ModelInfo, _Mapping]] = ..., sizes: _Optional[_Iterable[_Union[FrameSize, _Mapping]]] = ..., default_config: _Optional[_Union[SessionConfig, _Mapping]] = ..., max_window_frames: _Optional[int] = ..., max_credit_chunks: _Optional[int] = ..., limits: _Optional[_Union[SessionLimits, _Mapping]] = ..., max_generate_duration: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., max_generate_byte_count: _Optional[int] = ..., version: _Optional[str] = ...) -> None: ...

class FrameSize(_message.Message):
    __slots__ = ("height", "width", "generator_byte_count")
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    GENERATOR_BYTE_COUNT_FIELD_NUMBER: _ClassVar[int]
    height: int
    width: int
    generator_byte_count: int
    def __init__(self, height: _Optional[int] = ..., width: _Optional[int] = ..., generator_byte_count: _Optional[int] = ...) -> None: ...

class GetSessionRequest(_message.Message):
    __slots__ = ("session_id",)
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    def __init__(self, session_id: _Optional[str] = ...) -> None: ...

class GetSessionResponse(_message.Message):
    __slots__ = ("session",)
    SESSION_FIELD_NUMBER: _ClassVar[int]
    session: SessionStatus
    def __init__(self, session: _Optional[_Union[SessionStatus, _Mapping]] = ...) -> None: ...

class ListSessionsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListSessionsResponse(_message.Message):
    __slots__ = ("sessions",)
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    sessions: _containers.RepeatedCompositeFieldContainer[SessionStatus]
    def __init__(self, sessions: _Optional[_Iterable[_Union[SessionStatus, _Mapping]]] = ...) -> None: ...

class EndSessionRequest(_message.Message):
    __slots__ = ("session_id",)
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    def __init__(self, session_id: _Optional[str] = ...) -> None: ...

class EndSessionResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SessionStatus(_message.Message):
    __slots__ = ("session_id", "tenant", "state", "sessions_ahead_count", "age", "chunk_count", "frame_count", "byte_count", "dropped_frame_count", "gateway_memory_byte_count")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_AHEAD_COUNT_FIELD_NUMBER: _ClassVar[int]
    AGE_FIELD_NUMBER: _ClassVar[int]
    CHUNK_COUNT_FIELD_NUMBER: _ClassVar[int]
    FRAME_COUNT_FIELD_NUMBER: _ClassVar[int]
    BYTE_COUNT_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FRAME_COUNT_FIELD_NUMBER: _ClassVar[int]
    GATEWAY_MEMORY_BYTE_COUNT_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    tenant: str
    state: SessionState
    sessions_ahead_count: int
    age: _duration_pb2.Duration
    chunk_count: int
    frame_count: int
    byte_count: int
    dropped_frame_count: int
    gateway_memory_byte_count: int
    def __init__(self, session_id: _Optional[str] = ..., tenant: _Optional[str] = ..., state: _Optional[_Union[SessionState, str]] = ..., sessions_ahead_count: _Optional[int] = ..., age: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., chunk_count: _Optional[int] = ..., frame_count: _Optional[int] = ..., byte_count: _Optional[int] = ..., dropped_frame_count: _Optional[int] = ..., gateway_memory_byte_count: _Optional[int] = ...) -> None: ...
