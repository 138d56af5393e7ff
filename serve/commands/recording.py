"""Writes what a session brings to a file: pictures anew, H.264 as it came, without transcoding."""

from __future__ import annotations

import io
import os
from abc import ABC, abstractmethod
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol

import av

from causal_forcing.errors import InvalidRequest
from causal_forcing.media import check_output, open_writer
from serve.client.events import STILL_CODECS

if TYPE_CHECKING:
    from causal_forcing.media import FrameWriter
    from serve.client import Frame

SUFFIXES = {"h264_annexb": (".mp4", ".h264"), "h264_fmp4": (".mp4",)}
"""Files that H.264 can be written to as it came."""


class Recorder(Protocol):
    """Where a session's frames go; the file is there when it is closed, or not at all.

    Attributes:
        metadata: Texts stored with the frames, filled before the first one; not every format has room for them.
    """

    metadata: dict[str, str]

    @property
    def frame_count(self) -> int:
        """Frames so far."""
        ...

    def take(self, frame: Frame) -> None:
        """Write a frame."""
        ...

    def close(self) -> None:
        """Complete the file."""
        ...

    def discard(self) -> None:
        """Leave no file."""
        ...


def open_recorder(path: Path, codec: str, fps: int) -> Recorder:
    """Return what writes frames of a codec to a file.

    Raises:
        InvalidRequest: If that codec cannot be written to such a file, or nothing can be written there.
    """
    if codec in STILL_CODECS:
        return PictureRecorder(open_writer(path, fps=fps))
    allowed = SUFFIXES[codec]
    if path.suffix.lower() not in allowed:
        raise InvalidRequest("output", str(path), f"must end in {' or '.join(allowed)} with codec {codec}")
    check_output(path)
    if codec == "h264_annexb" and path.suffix.lower() == ".mp4":
        return RemuxRecorder(path, fps)
    return JoinRecorder(path)


class PictureRecorder:
    """Writes frames that are pictures by themselves, encoding the file as its format wants."""

    def __init__(self, writer: FrameWriter) -> None:
        self._writer = writer
        self.metadata = writer.metadata

    @property
    def frame_count(self) -> int:
        """Frames so far."""
        return self._writer.frame_count

    def take(self, frame: Frame) -> None:
        """Write a frame."""
        self._writer.write(frame.pixels()[None])

    def close(self) -> None:
        """Complete the file."""
        self._writer.close()

    def discard(self) -> None:
        """Leave no file."""
        self._writer.discard()


class StreamRecorder(ABC):
    """Writes H.264 beside the file's place, and moves it there when it is complete."""

    def __init__(self, path: Path) -> None:
        self.metadata: dict[str, str] = {}
        self._count = 0
        self._path = path
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")

    @property
    def frame_count(self) -> int:
        """Frames so far."""
        return self._count

    def take(self, frame: Frame) -> None:
        """Write a frame."""
        self._add(frame)
        self._count += 1

    def close(self) -> None:
        """Complete the file."""
        self._release()
        self._temporary.replace(self._path)

    def discard(self) -> None:
        """Leave no file."""
        self._release()
        self._temporary.unlink(missing_ok=True)

    @abstractmethod
    def _add(self, frame: Frame) -> None: ...

    @abstractmethod
    def _release(self) -> None: ...


class JoinRecorder(StreamRecorder):
    """Joins what came: Annex B to a .h264 file, fragments to a fragmented .mp4 file."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._file: BinaryIO = self._temporary.open("wb")

    def _add(self, frame: Frame) -> None:
        self._file.write(frame.init_segment + frame.data)

    def _release(self) -> None:
        self._file.close()


class RemuxRecorder(StreamRecorder):
    """Puts Annex B access units into MP4 at the times of their frames, so that dropped frames leave a pause."""

    def __init__(self, path: Path, fps: int) -> None:
        super().__init__(path)
        self._tick = Fraction(1, fps)
        self._offset = self._next = 0
        self._container = av.open(str(self._temporary), "w", format="mp4")
        self._stream: av.VideoStream | None = None

    def _add(self, frame: Frame) -> None:
        if self._stream is None:
            self._stream = self._begin(frame)
        packet = av.Packet(frame.data)
        packet.stream = self._stream
        packet.time_base = self._tick
        packet.pts = packet.dts = self._time(frame)
        packet.duration = 1
        packet.is_keyframe = frame.keyframe
        self._container.mux(packet)

    def _time(self, frame: Frame) -> int:
        """Return a frame's place in the file: its number, after all that came before a session that begins anew."""
        if self._offset + frame.frame_index < self._next:
            self._offset = self._next
        self._next = self._offset + frame.frame_index + 1
        return self._next - 1

    def _begin(self, frame: Frame) -> av.VideoStream:
        """Return the track, with the size and the parameter sets that the first keyframe has."""
        with av.open(io.BytesIO(frame.data), format="h264") as source:
            stream = self._container.add_stream_from_template(source.streams.video[0])
        stream.time_base = self._tick
        self._container.metadata.update(self.metadata)
        return stream

    def _release(self) -> None:
        self._container.close()
