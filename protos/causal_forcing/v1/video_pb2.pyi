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

class FrameCodec(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FRAME_CODEC_UNSPECIFIED: _ClassVar[FrameCodec]
    FRAME_CODEC_JPEG: _ClassVar[FrameCodec]
    FRAME_CODEC_PNG: _ClassVar[FrameCodec]
    FRAME_CODEC_RAW_RGB24: _ClassVar[FrameCodec]

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
FRAME_CODEC_UNSPECIFIED: FrameCodec
FRAME_CODEC_JPEG: FrameCodec
FRAME_CODEC_PNG: FrameCodec
FRAME_CODEC_RAW_RGB24: FrameCodec
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

class StreamVideoRequest(_message.Message):
    __slots__ = ("config", "prompt", "ack", "ping", "end")
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    ACK_FIELD_NUMBER: _ClassVar[int]
    PING_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    config: SessionConfig
    prompt: PromptUpdate
    ack: Ack
    ping: Ping
    end: End
    def __init__(self, config: _Optional[_Union[SessionConfig, _Mapping]] = ..., prompt: _Optional[_Union[PromptUpdate, _Mapping]] = ..., ack: _Optional[_Union[Ack, _Mapping]] = ..., ping: _Optional[_Union[Ping, _Mapping]] = ..., end: _Optional[_Union[End, _Mapping]] = ...) -> None: ...

class SessionConfig(_message.Message):
    __slots__ = ("prompt", "height", "width", "seed", "denoising_steps", "window_frames", "sink_frames", "codec", "jpeg_quality", "credit_chunks")
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
    def __init__(self, prompt: _Optional[_Union[PromptUpdate, _Mapping]] = ..., height: _Optional[int] = ..., width: _Optional[int] = ..., seed: _Optional[int] = ..., denoising_steps: _Optional[_Iterable[int]] = ..., window_frames: _Optional[int] = ..., sink_frames: _Optional[int] = ..., codec: _Optional[_Union[FrameCodec, str]] = ..., jpeg_quality: _Optional[int] = ..., credit_chunks: _Optional[int] = ...) -> None: ...

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

class StreamVideoResponse(_message.Message):
    __slots__ = ("sequence", "queue_status", "session_started", "frame", "prompt_applied", "pong", "session_ended", "error")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    QUEUE_STATUS_FIELD_NUMBER: _ClassVar[int]
    SESSION_STARTED_FIELD_NUMBER: _ClassVar[int]
    FRAME_FIELD_NUMBER: _ClassVar[int]
    PROMPT_APPLIED_FIELD_NUMBER: _ClassVar[int]
    PONG_FIELD_NUMBER: _ClassVar[int]
    SESSION_ENDED_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    queue_status: QueueStatus
    session_started: SessionStarted
    frame: VideoFrame
    prompt_applied: PromptApplied
    pong: Pong
    session_ended: SessionEnded
    error: Error
    def __init__(self, sequence: _Optional[int] = ..., queue_status: _Optional[_Union[QueueStatus, _Mapping]] = ..., session_started: _Optional[_Union[SessionStarted, _Mapping]] = ..., frame: _Optional[_Union[VideoFrame, _Mapping]] = ..., prompt_applied: _Optional[_Union[PromptApplied, _Mapping]] = ..., pong: _Optional[_Union[Pong, _Mapping]] = ..., session_ended: _Optional[_Union[SessionEnded, _Mapping]] = ..., error: _Optional[_Union[Error, _Mapping]] = ...) -> None: ...

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
    __slots__ = ("name", "trained", "frames_per_second", "frames_per_chunk_count")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TRAINED_FIELD_NUMBER: _ClassVar[int]
    FRAMES_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    FRAMES_PER_CHUNK_COUNT_FIELD_NUMBER: _ClassVar[int]
    name: str
    trained: bool
    frames_per_second: int
    frames_per_chunk_count: int
    def __init__(self, name: _Optional[str] = ..., trained: _Optional[bool] = ..., frames_per_second: _Optional[int] = ..., frames_per_chunk_count: _Optional[int] = ...) -> None: ...

class SessionLimits(_message.Message):
    __slots__ = ("silence_timeout", "stall_timeout", "max_duration")
    SILENCE_TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    STALL_TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    MAX_DURATION_FIELD_NUMBER: _ClassVar[int]
    silence_timeout: _duration_pb2.Duration
    stall_timeout: _duration_pb2.Duration
    max_duration: _duration_pb2.Duration
    def __init__(self, silence_timeout: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., stall_timeout: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., max_duration: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class VideoFrame(_message.Message):
    __slots__ = ("chunk_index", "frame_index", "prompt_id", "data", "part_index", "part_count", "last_in_chunk", "timings")
    CHUNK_INDEX_FIELD_NUMBER: _ClassVar[int]
    FRAME_INDEX_FIELD_NUMBER: _ClassVar[int]
    PROMPT_ID_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    PART_INDEX_FIELD_NUMBER: _ClassVar[int]
    PART_COUNT_FIELD_NUMBER: _ClassVar[int]
    LAST_IN_CHUNK_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    chunk_index: int
    frame_index: int
    prompt_id: str
    data: bytes
    part_index: int
    part_count: int
    last_in_chunk: bool
    timings: ChunkTimings
    def __init__(self, chunk_index: _Optional[int] = ..., frame_index: _Optional[int] = ..., prompt_id: _Optional[str] = ..., data: _Optional[bytes] = ..., part_index: _Optional[int] = ..., part_count: _Optional[int] = ..., last_in_chunk: _Optional[bool] = ..., timings: _Optional[_Union[ChunkTimings, _Mapping]] = ...) -> None: ...

class ChunkTimings(_message.Message):
    __slots__ = ("denoise", "decode", "encode")
    DENOISE_FIELD_NUMBER: _ClassVar[int]
    DECODE_FIELD_NUMBER: _ClassVar[int]
    ENCODE_FIELD_NUMBER: _ClassVar[int]
    denoise: _duration_pb2.Duration
    decode: _duration_pb2.Duration
    encode: _duration_pb2.Duration
    def __init__(self, denoise: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., decode: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., encode: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

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

class Pong(_message.Message):
    __slots__ = ("nonce",)
    NONCE_FIELD_NUMBER: _ClassVar[int]
    nonce: int
    def __init__(self, nonce: _Optional[int] = ...) -> None: ...

class SessionEnded(_message.Message):
    __slots__ = ("reason", "chunk_count", "frame_count", "byte_count", "duration")
    REASON_FIELD_NUMBER: _ClassVar[int]
    CHUNK_COUNT_FIELD_NUMBER: _ClassVar[int]
    FRAME_COUNT_FIELD_NUMBER: _ClassVar[int]
    BYTE_COUNT_FIELD_NUMBER: _ClassVar[int]
    DURATION_FIELD_NUMBER: _ClassVar[int]
    reason: EndReason
    chunk_count: int
    frame_count: int
    byte_count: int
    duration: _duration_pb2.Duration
    def __init__(self, reason: _Optional[_Union[EndReason, str]] = ..., chunk_count: _Optional[int] = ..., frame_count: _Optional[int] = ..., byte_count: _Optional[int] = ..., duration: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class Error(_message.Message):
    __slots__ = ("status", "reason", "error_id")
    STATUS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    ERROR_ID_FIELD_NUMBER: _ClassVar[int]
    status: _status_pb2.Status
    reason: str
    error_id: str
    def __init__(self, status: _Optional[_Union[_status_pb2.Status, _Mapping]] = ..., reason: _Optional[str] = ..., error_id: _Optional[str] = ...) -> None: ...
