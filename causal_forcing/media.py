"""Reads start images and videos, and writes MP4, GIF and PNG, chunk by chunk.

Frames are ``[f, H, W, 3]`` uint8 RGB arrays; the engine's pixels are ``[1, 3, f, H, W]`` float tensors in [-1, 1].
A file appears under its name only when it is complete: writers fill a temporary file beside it and rename that.
"""

from __future__ import annotations

import math
import os
import re
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import av
import numpy as np
import numpy.typing as npt
from PIL import Image, PngImagePlugin

from causal_forcing.errors import InvalidRequest
from causal_forcing.geometry import FRAMES_PER_SECOND, TEMPORAL_STRIDE, Geometry
from causal_forcing.pictures import PictureRules, fit

if TYPE_CHECKING:  # a gRPC client writes what it receives without having torch
    from torch import Tensor

Frames = npt.NDArray[np.uint8]
"""``[f, H, W, 3]`` uint8 RGB."""

START_IMAGE = PictureRules(
    "image", ("PNG", "JPEG", "WEBP"), 32 * 2**20, 50_000_000, "must be a PNG, JPEG or WebP image"
)
"""What is accepted as a start image."""

MAX_GIF_FRAMES = 2048
"""Most frames of a GIF: all of them are held in memory until it is written."""

MAX_SHEET_FRAMES = 64
"""Most frames of a contact sheet; longer videos are thinned evenly."""

_SEQUENCE = re.compile(r"%(0\d)?d")


def to_frames(video: Tensor) -> Frames:
    """Return pixels ``[1, 3, f, H, W]`` in [-1, 1] as ``[f, H, W, 3]`` uint8 frames on the host."""
    if video.ndim != 5 or video.shape[0] != 1 or video.shape[1] != 3:
        raise ValueError(f"expected pixels [1, 3, f, H, W], got {tuple(video.shape)}")
    levels = video.detach().float().add(1.0).mul(127.5).round().clamp(0, 255)
    frames: Frames = levels[0].permute(1, 2, 3, 0).to("cpu").numpy().astype(np.uint8)
    return frames


def from_frames(frames: Frames) -> Tensor:
    """Return ``[f, H, W, 3]`` uint8 frames as float32 pixels ``[1, 3, f, H, W]`` in [-1, 1]."""
    import torch

    planes = torch.from_numpy(np.array(frames)).permute(3, 0, 1, 2)
    return planes[None].float().div(127.5).sub(1.0)


class FrameWriter(ABC):
    """Writes one file frame by frame; a context manager that leaves a complete file or none.

    Attributes:
        path: Where the file will appear.
        fps: Frames a second.
        metadata: Texts stored in the file under ``title`` and ``comment``; may be filled until the first frame.
        frame_count: Frames written so far.
    """

    def __init__(self, path: Path, *, fps: int, metadata: Mapping[str, str]) -> None:
        self.path = path
        self.fps = fps
        self.metadata = dict(metadata)
        self.frame_count = 0
        self._size: tuple[int, ...] = ()
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")

    def write(self, frames: Frames) -> None:
        """Append frames ``[f, H, W, 3]`` uint8.

        Raises:
            InvalidRequest: The format cannot hold that many frames.
        """
        if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8:
            raise ValueError(f"expected frames [f, H, W, 3] uint8, got {frames.shape} {frames.dtype}")
        self._size = self._size or frames.shape[1:3]
        if frames.shape[1:3] != self._size:
            raise ValueError(f"all frames must have one size; got {frames.shape[1:3]} after {self._size}")
        for frame in frames:
            self._add(frame)
            self.frame_count += 1

    def close(self) -> None:
        """Complete the file and let it appear under its name.

        Raises:
            InvalidRequest: No frame was written.
        """
        if not self.frame_count:
            self.discard()
            raise InvalidRequest("output", str(self.path), "needs at least one frame; the video is empty")
        try:
            self._finish()
        except BaseException:
            self.discard()
            raise
        if self._temporary.exists():
            self._temporary.replace(self.path)

    def discard(self) -> None:
        """Drop what was written; what was at the path before stays."""
        self._release()
        self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()

    @abstractmethod
    def _add(self, frame: Frames) -> None:
        """Take one frame ``[H, W, 3]``."""

    @abstractmethod
    def _finish(self) -> None:
        """Write what is left to the temporary file."""

    def _release(self) -> None:  # noqa: B027 - most writers hold nothing open
        """Let go of open handles."""


class Mp4Writer(FrameWriter):
    """Writes H.264 in an MP4 container."""

    def __init__(self, path: Path, *, fps: int, metadata: Mapping[str, str]) -> None:
        super().__init__(path, fps=fps, metadata=metadata)
        self._container = av.open(str(self._temporary), "w", format="mp4")
        self._stream = self._container.add_stream("libx264", rate=fps, options={"crf": "17", "preset": "medium"})
        self._stream.pix_fmt = "yuv420p"

    def _add(self, frame: Frames) -> None:
        if not self.frame_count:
            self._container.metadata.update(self.metadata)
            self._stream.height, self._stream.width = frame.shape[:2]
        picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
        picture.pts = self.frame_count
        picture.time_base = Fraction(1, self.fps)
        self._container.mux(self._stream.encode(picture))

    def _finish(self) -> None:
        self._container.mux(self._stream.encode(None))
        self._container.close()

    def _release(self) -> None:
        self._container.close()


class GifWriter(FrameWriter):
    """Writes an animated GIF that loops; frame durations are whole centiseconds whose sum keeps the rate."""

    def __init__(self, path: Path, *, fps: int, metadata: Mapping[str, str]) -> None:
        super().__init__(path, fps=fps, metadata=metadata)
        self._pictures: list[Image.Image] = []

    def _add(self, frame: Frames) -> None:
        _require_gif_holds(len(self._pictures) + 1, self.path)
        self._pictures.append(Image.fromarray(frame).quantize(256))

    def _finish(self) -> None:
        ends = [round(100 * n / self.fps) for n in range(self.frame_count + 1)]
        durations_ms = [10 * (end - start) for start, end in pairwise(ends)]
        first, *rest = self._pictures
        comment = "\n".join(self.metadata.values()).encode()
        first.save(
            self._temporary, "GIF", save_all=True, append_images=rest, duration=durations_ms, loop=0, comment=comment
        )


class SheetWriter(FrameWriter):
    """Writes one PNG: the only frame, or a contact sheet of at most 64 evenly spaced frames, row by row."""

    def __init__(self, path: Path, *, fps: int, metadata: Mapping[str, str]) -> None:
        super().__init__(path, fps=fps, metadata=metadata)
        self._kept: list[Frames] = []
        self._every = 1

    def _add(self, frame: Frames) -> None:
        if self.frame_count % self._every:
            return
        if len(self._kept) == MAX_SHEET_FRAMES:  # thin what we have, so that memory stays bounded
            self._kept = self._kept[::2]
            self._every *= 2
        if self.frame_count % self._every == 0:
            self._kept.append(frame.copy())

    def _finish(self) -> None:
        columns = math.ceil(math.sqrt(len(self._kept)))
        rows = math.ceil(len(self._kept) / columns)
        height, width = self._kept[0].shape[:2]
        sheet = np.zeros((rows * height, columns * width, 3), dtype=np.uint8)
        for index, frame in enumerate(self._kept):
            top, left = index // columns * height, index % columns * width
            sheet[top : top + height, left : left + width] = frame
        _save_png(sheet, self._temporary, self.metadata)


class SequenceWriter(FrameWriter):
    """Writes one PNG a frame; the name holds a ``%d`` such as ``frame_%05d.png``, counted from 0."""

    def _add(self, frame: Frames) -> None:
        _save_png(frame, self._temporary, self.metadata)
        self._temporary.replace(self.path.with_name(self.path.name % self.frame_count))

    def _finish(self) -> None:
        """All pictures are already in place."""


def open_writer(
    path: str | Path,
    *,
    fps: int = FRAMES_PER_SECOND,
    metadata: Mapping[str, str] | None = None,
    frames: int | None = None,
) -> FrameWriter:
    """Return the writer for a path: ``.mp4``, ``.gif``, ``.png`` (a contact sheet) or ``name_%05d.png`` (a sequence).

    Args:
        path: The file to write; its folder must exist.
        fps: Frames a second of the video.
        metadata: Texts to store in the file, by the keys ``title`` and ``comment``.
        frames: How many will be written, if that is known.

    Raises:
        InvalidRequest: The suffix is unknown, nothing can be written there, or the format cannot hold that many frames.
    """
    target = Path(path)
    kinds = {".mp4": Mp4Writer, ".gif": GifWriter, ".png": SheetWriter}
    kind: type[FrameWriter] | None = kinds.get(target.suffix.lower())
    if kind is None:
        raise InvalidRequest("output", str(path), f"must end in one of {', '.join(kinds)}")
    if kind is SheetWriter and "%" in target.name:
        if len(_SEQUENCE.findall(target.name)) != 1 or target.name.count("%") != 1:
            raise InvalidRequest("output", str(path), "a PNG sequence needs one frame number such as %05d in its name")
        kind = SequenceWriter
    if kind is GifWriter:
        _require_gif_holds(frames or 0, target)
    check_output(target)
    return kind(target, fps=fps, metadata=metadata or {})


def _require_gif_holds(frames: int, path: Path) -> None:
    if frames > MAX_GIF_FRAMES:
        allowed = f"a GIF holds at most {MAX_GIF_FRAMES} frames; use .mp4 for longer videos"
        raise InvalidRequest("output", str(path), allowed)


def check_output(path: Path) -> None:
    """Raise if no file can be written at a path.

    Raises:
        InvalidRequest: Its folder does not exist or cannot be written to, or it is a folder itself.
    """
    if not path.parent.is_dir() or path.is_dir():
        raise InvalidRequest("output", str(path), "must be a file in an existing folder")
    if not os.access(path.parent, os.W_OK):
        raise InvalidRequest("output", str(path), "must be in a folder that can be written to")


def decode_image(data: bytes, geometry: Geometry) -> Tensor:
    """Return an encoded image as float32 pixels ``[1, 3, 1, H, W]`` in [-1, 1], exactly the session's size.

    The picture is turned upright (EXIF), cropped around its centre to the session's aspect ratio and resampled, so that
    nothing is distorted; transparency is dropped, and grey of 16 bits becomes grey of 8.

    Raises:
        InvalidRequest: It is not a PNG, JPEG or WebP image, is damaged, or is too large (field ``image``).
    """
    return from_frames(START_IMAGE.read(data, geometry.height, geometry.width)[None])


def read_image(path: str | Path, geometry: Geometry) -> Tensor:
    """Return a start image file as float32 pixels ``[1, 3, 1, H, W]`` in [-1, 1]; see :func:`decode_image`.

    Raises:
        InvalidRequest: The file cannot be read, or is not an acceptable image (field ``image``).
    """
    try:
        with Path(path).open("rb") as file:
            data = file.read(START_IMAGE.max_bytes + 1)
    except OSError as error:
        raise START_IMAGE.refusal(str(path), f"cannot be read ({error.strerror}); {START_IMAGE.allowed}") from error
    return decode_image(data, geometry)


def read_video(path: str | Path, geometry: Geometry, *, max_frames: int) -> Tensor:
    """Return the end of a video, at 16 frames a second, as float32 pixels ``[1, 3, f, H, W]`` in [-1, 1].

    Args:
        path: A video file that FFmpeg can decode.
        geometry: Size of the session; frames are turned upright, cropped around their centre and resampled to it.
        max_frames: Most frames to return, from the end; the result has the largest ``1 + 4k`` frames that fit.

    Raises:
        InvalidRequest: The file cannot be read or holds no video (field ``continue_from``).
    """
    if max_frames < 1:
        raise ValueError(f"max_frames must be at least 1, got {max_frames}")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise InvalidRequest("continue_from", str(path), "must hold a video stream", reason="INVALID_VIDEO")
            tail = deque(_at_rate(_timed_frames(container), FRAMES_PER_SECOND), maxlen=max_frames)
    except (OSError, av.FFmpegError) as error:
        allowed = f"cannot be read ({error.strerror}); must be a video file"
        raise InvalidRequest("continue_from", str(path), allowed, reason="INVALID_VIDEO") from error
    if not tail:
        raise InvalidRequest("continue_from", str(path), "must hold at least one frame", reason="INVALID_VIDEO")
    count = len(tail) - (len(tail) - 1) % TEMPORAL_STRIDE
    pictures = list(tail)[-count:]
    return from_frames(np.stack([fit(_upright(picture), geometry.height, geometry.width) for picture in pictures]))


def _timed_frames(container: av.container.InputContainer) -> Iterator[tuple[float, av.VideoFrame]]:
    for index, frame in enumerate(container.decode(video=0)):
        yield (index / FRAMES_PER_SECOND if frame.time is None else frame.time), frame


def _at_rate(timed: Iterable[tuple[float, av.VideoFrame]], fps: int) -> Iterator[av.VideoFrame]:
    """Yield the frame shown at the middle of each ``1 / fps`` interval, which rounded timestamps do not disturb."""
    start_s = 0.0
    shown: av.VideoFrame | None = None
    emitted = 0
    for time_s, frame in timed:
        if shown is None:
            start_s = time_s
        while shown is not None and (emitted + 0.5) / fps <= time_s - start_s:
            yield shown
            emitted += 1
        shown = frame
    if shown is not None:
        yield shown


def _upright(frame: av.VideoFrame) -> Image.Image:
    """Return a frame as it is meant to be shown: a camera held upright stores its pictures lying, and says so."""
    quarters = round(frame.rotation / 90)
    return Image.fromarray(np.rot90(frame.to_ndarray(format="rgb24"), quarters))


def _save_png(frame: Frames, path: Path, metadata: Mapping[str, str]) -> None:
    texts = PngImagePlugin.PngInfo()
    for key, text in metadata.items():
        texts.add_itxt(key.capitalize(), text)
    Image.fromarray(frame).save(path, "PNG", pnginfo=texts)
