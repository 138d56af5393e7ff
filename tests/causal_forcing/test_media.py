"""Files written are complete or absent; images read are exactly the session's size or a clear error."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from causal_forcing import media
from causal_forcing.errors import InvalidRequest
from causal_forcing.geometry import Geometry

GEOMETRY = Geometry(32, 48)
NOTES = {"title": "a title", "comment": "random weights: é"}


def gradient(count: int, height: int = 32, width: int = 48) -> media.Frames:
    """Return smooth frames that differ from each other by their red level."""
    frames = np.zeros((count, height, width, 3), dtype=np.uint8)
    frames[..., 0] = np.linspace(20, 230, count, dtype=np.uint8)[:, None, None]
    frames[..., 1] = np.linspace(0, 200, width, dtype=np.uint8)[None, None, :]
    frames[..., 2] = np.linspace(0, 200, height, dtype=np.uint8)[None, :, None]
    return frames


def encoded(picture: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def write(path: Path, frames: media.Frames, **options: object) -> None:
    with media.open_writer(path, metadata=NOTES, **options) as writer:
        writer.write(frames[:1])
        writer.write(frames[1:])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fail_after(path: Path, frames: media.Frames) -> None:
    with media.open_writer(path) as writer:
        writer.write(frames)
        raise RuntimeError("device")


def test_tensor_and_frames_are_inverse() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    pixels = media.from_frames(frames)
    assert pixels.shape == (1, 3, 3, 16, 16)
    assert pixels.dtype == torch.float32
    assert pixels.min() >= -1
    assert pixels.max() <= 1
    assert np.array_equal(media.to_frames(pixels), frames)


def test_to_frames_clamps() -> None:
    pixels = torch.tensor([-9.0, 9.0, 0.0]).reshape(1, 3, 1, 1, 1)
    assert media.to_frames(pixels).tolist() == [[[[0, 255, 128]]]]


def test_mp4_holds_every_frame_the_rate_and_the_notes(tmp_path: Path) -> None:
    path = tmp_path / "out.mp4"
    frames = gradient(9)
    write(path, frames)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert stream.average_rate == 16
        assert container.metadata["title"] == NOTES["title"]
        assert container.metadata["comment"] == NOTES["comment"]
        read = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(stream)])
    assert read.shape == frames.shape
    assert np.abs(read.astype(int) - frames).mean() < 4
    assert names(tmp_path) == ["out.mp4"]


@pytest.mark.parametrize("name", ["out.mp4", "out.gif", "out.png", "f%d.png"])
def test_notes_may_come_late_as_the_first_frame(tmp_path: Path, name: str) -> None:
    with media.open_writer(tmp_path / name) as writer:
        writer.metadata["comment"] = "random weights"
        writer.write(gradient(2))
    path = next(tmp_path.iterdir())
    if name == "out.mp4":
        with av.open(str(path)) as container:
            assert container.metadata["comment"] == "random weights"
    else:
        with Image.open(path) as picture:
            assert picture.info.get("Comment", picture.info.get("comment")) in ("random weights", b"random weights")


def test_gif_keeps_the_total_duration(tmp_path: Path) -> None:
    path = tmp_path / "out.gif"
    write(path, gradient(16))
    with Image.open(path) as picture:
        assert picture.n_frames == 16
        assert picture.info["comment"].decode().split("\n") == list(NOTES.values())
        durations = []
        for index in range(picture.n_frames):
            picture.seek(index)
            durations.append(picture.info["duration"])
    assert set(durations) == {60, 70}
    assert sum(durations) == 1000


def test_gif_refuses_more_frames_than_it_can_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media, "MAX_GIF_FRAMES", 3)
    with pytest.raises(InvalidRequest, match=r"output: .*at most 3 frames; use \.mp4"):
        write(tmp_path / "out.gif", gradient(4))
    with pytest.raises(InvalidRequest, match=r"output: .*at most 3 frames; use \.mp4"):
        media.open_writer(tmp_path / "out.gif", frames=4)
    assert names(tmp_path) == []
    media.open_writer(tmp_path / "out.gif", frames=3).discard()


def test_png_of_one_frame_is_that_frame_with_its_notes(tmp_path: Path) -> None:
    frames = gradient(1)
    write(tmp_path / "out.png", frames)
    with Image.open(tmp_path / "out.png") as picture:
        assert np.array_equal(np.asarray(picture), frames[0])
        assert picture.text == {"Title": NOTES["title"], "Comment": NOTES["comment"]}


def test_png_of_many_frames_is_a_sheet_in_reading_order(tmp_path: Path) -> None:
    frames = gradient(5)
    write(tmp_path / "out.png", frames)
    sheet = np.asarray(Image.open(tmp_path / "out.png"))
    assert sheet.shape == (2 * 32, 3 * 48, 3)
    assert np.array_equal(sheet[32:, 48:96], frames[4])
    assert not sheet[32:, 96:].any()


@pytest.mark.parametrize(("count", "every"), [(64, 1), (65, 2), (128, 2), (300, 8)])
def test_a_sheet_thins_long_videos_evenly(tmp_path: Path, count: int, every: int) -> None:
    frames = np.zeros((count, 2, 2, 3), dtype=np.uint8)
    frames[:, 0, 0, 0], frames[:, 0, 0, 1] = np.arange(count) % 256, np.arange(count) // 256
    write(tmp_path / "out.png", frames)
    sheet = np.asarray(Image.open(tmp_path / "out.png")).astype(int)
    marks = (sheet[::2, ::2, 0] + 256 * sheet[::2, ::2, 1]).flatten()
    expected = np.arange(0, count, every)
    assert np.array_equal(marks[: len(expected)], expected)
    assert not marks[len(expected) :].any()


def test_png_sequence_counts_from_zero(tmp_path: Path) -> None:
    frames = gradient(3)
    write(tmp_path / "frame_%03d.png", frames)
    assert names(tmp_path) == ["frame_000.png", "frame_001.png", "frame_002.png"]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "frame_002.png")), frames[2])


@pytest.mark.parametrize("name", ["out.mp4", "out.gif", "out.png"])
def test_a_failed_run_leaves_the_old_file_and_nothing_else(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"old")
    with pytest.raises(RuntimeError, match="device"):
        fail_after(tmp_path / name, gradient(2))
    assert names(tmp_path) == [name]
    assert (tmp_path / name).read_bytes() == b"old"


@pytest.mark.parametrize("name", ["out.mp4", "out.gif", "out.png", "f%d.png"])
def test_a_video_without_frames_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidRequest, match=r"^output: .*at least one frame"), media.open_writer(tmp_path / name):
        pass
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("out.avi", "must end in one of .mp4, .gif, .png"),
        ("out", "must end in one of"),
        ("missing/out.mp4", "existing folder"),
        ("file.txt/out.mp4", "existing folder"),
        ("folder.mp4", "must be a file"),
        ("a%db%d.png", "one frame number"),
        ("a%s.png", "one frame number"),
    ],
)
def test_an_unusable_output_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)  # an absolute path may be too long to be shown whole
    (tmp_path / "file.txt").touch()
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(InvalidRequest, match=message) as caught:
        media.open_writer(Path(name))
    assert caught.value.metadata["field"] == "output"
    assert name in caught.value.message


def test_frames_of_two_sizes_are_a_programmers_mistake(tmp_path: Path) -> None:
    with media.open_writer(tmp_path / "out.png") as writer:
        writer.write(gradient(1))
        with pytest.raises(ValueError, match="one size"):
            writer.write(gradient(1, height=16))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_start_image_becomes_exactly_the_sessions_size(kind: str, mode: str) -> None:
    picture = Image.new("RGB", (300, 100), (255, 0, 64)).convert(mode)
    pixels = media.decode_image(encoded(picture, kind), GEOMETRY)
    assert pixels.shape == (1, 3, 1, 32, 48)
    expected = media.from_frames(np.asarray(picture.convert("RGB"))[None, :32, :48])
    assert (pixels - expected).abs().max() < 0.03


def test_a_start_image_is_cropped_around_its_centre_not_squeezed() -> None:
    picture = np.zeros((32, 148, 3), dtype=np.uint8)
    picture[:, 50:98] = gradient(1)[0]
    pixels = media.decode_image(encoded(Image.fromarray(picture)), GEOMETRY)
    assert np.array_equal(media.to_frames(pixels)[0], gradient(1)[0])


def test_exif_orientation_is_honoured() -> None:
    upright = gradient(1)[0]
    exif = Image.Exif()
    exif[0x0112] = 3  # stored upside down
    data = encoded(Image.fromarray(upright[::-1, ::-1].copy()), exif=exif.tobytes())
    assert np.array_equal(media.to_frames(media.decode_image(data, GEOMETRY))[0], upright)


def png_claiming(width: int, height: int) -> bytes:
    def part(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", header) + part(b"IDAT", zlib.compress(b"")) + part(b"IEND", b"")


BAD_IMAGES = {
    "empty": (b"", "PNG, JPEG or WebP"),
    "text": (b"this is not an image", "PNG, JPEG or WebP"),
    "gif": (encoded(Image.new("RGB", (8, 8)), "GIF"), "PNG, JPEG or WebP"),
    "truncated png": (encoded(Image.effect_noise((64, 64), 50))[:400], "PNG, JPEG or WebP"),
    "truncated jpeg": (encoded(Image.fromarray(gradient(1)[0]), "JPEG")[:400], "PNG, JPEG or WebP"),
    "no pixels": (png_claiming(16, 16), "PNG, JPEG or WebP"),
    "bomb": (png_claiming(100_000, 100_000), "PNG, JPEG or WebP"),
    "large": (png_claiming(8_000, 8_000), "at most 50000000 pixels"),
    "heavy": (bytes(media.START_IMAGE.max_bytes + 1), "at most 32 MiB"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_what_is_not_an_image_is_an_error_that_names_the_field(name: str, tmp_path: Path) -> None:
    data, message = BAD_IMAGES[name]
    (tmp_path / "start.png").write_bytes(data)
    with pytest.raises(InvalidRequest, match=message) as caught:
        media.read_image(tmp_path / "start.png", GEOMETRY)
    assert caught.value.metadata["field"] == "image"
    assert caught.value.reason == "INVALID_IMAGE"


def test_a_missing_image_names_the_path(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"^image: .*No such file"):
        media.read_image(tmp_path / "nowhere.png", GEOMETRY)


@pytest.mark.parametrize(("written", "most", "read"), [(9, 99, 9), (9, 8, 5), (8, 99, 5), (3, 2, 1)])
def test_a_video_is_read_from_its_end_in_whole_latents(tmp_path: Path, written: int, most: int, read: int) -> None:
    frames = gradient(written)
    write(tmp_path / "in.mp4", frames)
    pixels = media.read_video(tmp_path / "in.mp4", GEOMETRY, max_frames=most)
    assert pixels.shape == (1, 3, read, 32, 48)
    reds = media.to_frames(pixels)[..., 0].mean(axis=(1, 2))
    assert np.abs(reds - frames[-read:, 0, 0, 0]).max() < 5


@pytest.mark.parametrize(("fps", "picked"), [(32, [0, 2, 4, 6, 8]), (8, [4, 4, 5, 5, 6, 6, 7, 7, 8]), (24, None)])
def test_a_video_of_another_rate_is_resampled_in_time(tmp_path: Path, fps: int, picked: list[int] | None) -> None:
    frames = gradient(9)
    write(tmp_path / "in.mp4", frames, fps=fps)
    pixels = media.read_video(tmp_path / "in.mp4", GEOMETRY, max_frames=9)
    reds = media.to_frames(pixels)[..., 0].mean(axis=(1, 2))
    if picked is None:
        assert len(reds) == 5  # 9 frames at 24 last six intervals of 1/16 s, trimmed to 1 + 4k
        assert (np.diff(reds) > 10).all()
    else:
        assert np.abs(reds - frames[picked, 0, 0, 0]).max() < 5


FIXED_POINT = 1 << 16
TURNS = {
    "clockwise": ((0, FIXED_POINT, -FIXED_POINT, 0), -1),
    "counter-clockwise": ((0, -FIXED_POINT, FIXED_POINT, 0), 1),
    "upside down": ((-FIXED_POINT, 0, 0, -FIXED_POINT), 2),
}
"""How a player is to turn a video: the four numbers (a, b, c, d) of its track header, and quarters for numpy.

Source: ISO 14496-12, 6.2.2: a pixel (x, y) is shown at (a x + c y, b x + d y), y downwards.
"""


@pytest.mark.parametrize("turn", TURNS)
def test_a_video_is_read_as_a_player_shows_it(tmp_path: Path, turn: str) -> None:
    (a, b, c, d), quarters = TURNS[turn]
    shown = gradient(5)
    write(tmp_path / "in.mp4", np.rot90(shown, -quarters, axes=(1, 2)))
    data = bytearray((tmp_path / "in.mp4").read_bytes())
    matrix = data.index(b"tkhd") + 44
    struct.pack_into(">9i", data, matrix, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    (tmp_path / "in.mp4").write_bytes(data)
    read = media.to_frames(media.read_video(tmp_path / "in.mp4", GEOMETRY, max_frames=5))
    assert np.abs(read.astype(int) - shown).mean() < 4


def test_what_is_not_a_video_is_an_error_that_names_the_field(tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("not a video")
    for name in ("text.mp4", "missing.mp4", ""):
        with pytest.raises(InvalidRequest, match=r"must be a video file|cannot be read") as caught:
            media.read_video(tmp_path / name, GEOMETRY, max_frames=5)
        assert caught.value.metadata["field"] == "continue_from"


def test_a_file_with_only_sound_is_not_a_video(tmp_path: Path) -> None:
    path = tmp_path / "sound.wav"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), dtype=np.int16), format="s16", layout="mono")
        sound.rate = 8000
        container.mux(stream.encode(sound))
    with pytest.raises(InvalidRequest, match="video stream"):
        media.read_video(path, GEOMETRY, max_frames=5)
