"""`causal-forcing generate`: a video made in this process, written chunk by chunk."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from types import FrameType
from typing import TYPE_CHECKING, Any, Self

import torch
from tqdm import tqdm

from causal_forcing.commands import request as request_options
from causal_forcing.commands.devices import DTYPES, choose_device
from causal_forcing.commands.request import GenerateRequest, read_request
from causal_forcing.engine import Engine
from causal_forcing.errors import InvalidRequest, SessionStateError
from causal_forcing.geometry import FRAMES_PER_SECOND, pixel_frames
from causal_forcing.media import Frames, FrameWriter, open_writer, read_image, read_video, to_frames
from causal_forcing.prompts import PromptUpdate
from causal_forcing.record import SessionRecord
from causal_forcing.sampler import Stopped
from causal_forcing.script import naming_line
from causal_forcing.session import Chunk, Session
from causal_forcing.startup import PROGRAM_STARTED_S, StartUp
from causal_forcing.weights import LoraFile
from causal_forcing.weights.quantise import QUANTISATIONS

if TYPE_CHECKING:
    from serve.metrics.engine import EngineMeter

UNTRAINED = "preset {} has random weights: it has not been trained, and the video shows noise, not the prompt"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `generate`."""
    request_options.add_arguments(parser)
    parser.add_argument("--weights-dir", type=Path, help="folder of downloaded weights")
    parser.add_argument("--lora", action="append", metavar="FILE[::SCALE]", help="merge a LoRA into the generator")
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument(
        "--dtype", choices=list(DTYPES), help="what to compute in (default: bfloat16 on cuda, else float32)"
    )
    parser.add_argument(
        "--quantization", choices=QUANTISATIONS, help="8-bit linear layers, on GPUs that compute in them"
    )
    parser.add_argument(
        "--compile", action="store_true", help="compile the generator first (minutes); pays off in long videos"
    )
    parser.add_argument("--metrics-port", type=int, metavar="PORT", help="serve metrics for Prometheus meanwhile")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Generate the video and print how fast that was; return 0, or 130 (143) if it was interrupted."""
    request = read_request(args)
    device = choose_device(args.device)
    loras = [_parse_lora(text) for text in args.lora or ()]
    with ExitStack() as stack:
        meter = _meter(args.metrics_port, stack)
        writer = stack.enter_context(open_writer(request.output, metadata=request.notes(), frames=request.frames))
        interrupts = stack.enter_context(Interrupts())
        if not request.preset.trained:
            print(UNTRAINED.format(request.preset.name), file=sys.stderr)
        startup = _start_up(quiet=args.quiet)
        engine = Engine.load(
            request.preset,
            device=device,
            dtype=DTYPES.get(args.dtype),
            vae=request.vae,
            weights_dir=args.weights_dir,
            loras=loras,
            quantization=args.quantization,
            compiled=args.compile,
            session=request.config,
            given_frames=_given_frames(request),
            startup=startup,
        )
        with _progress_bar(request, quiet=args.quiet) as bar:
            meter.ready(startup.phases)
            run = Run(request, engine, writer, bar, interrupts.asked, meter=meter)
            run.generate()
        if not writer.frame_count:
            raise KeyboardInterrupt
        startup.add("first chunk", run.speed.first_s or 0.0)
    if request.save_record and run.record:
        _save_record(run.record, request.save_record)
    print(run.speed.summary(writer))
    print(f"cold start {startup}")
    return interrupts.status


@dataclass
class Speed:
    """When chunks were ready, in seconds since the prompt was given.

    Attributes:
        started_s: Clock at the start.
        first_s: From the start to the pixels of the first chunk (TTFC), or None.
        last_s: From the start to the newest pixels.
        first_frames: Pixel frames of the first chunk.
        frames: Pixel frames so far.
    """

    started_s: float = field(default_factory=time.perf_counter)
    first_s: float | None = None
    last_s: float = 0.0
    first_frames: int = 0
    frames: int = 0

    def add(self, frames: int) -> None:
        """Note that a chunk's pixels are ready."""
        self.last_s = time.perf_counter() - self.started_s
        self.frames += frames
        if self.first_s is None:
            self.first_s, self.first_frames = self.last_s, frames

    @property
    def fps(self) -> float:
        """Pixel frames a second after the first chunk; 0 before the second."""
        elapsed_s = self.last_s - (self.first_s or 0.0)
        return (self.frames - self.first_frames) / elapsed_s if elapsed_s > 0 else 0.0

    def summary(self, writer: FrameWriter) -> str:
        """Return one line: what was written, TTFC, FPS and the real-time factor."""
        seconds = writer.frame_count / FRAMES_PER_SECOND
        return (
            f"wrote {writer.path}: {writer.frame_count} frames ({seconds:.2f} s), TTFC {self.first_s or 0.0:.3f} s, "
            f"{self.fps:.1f} FPS ({self.fps / FRAMES_PER_SECOND:.2f} x real time)"
        )


class Run:
    """One video being made: the session, where its frames go, and how fast they come.

    Attributes:
        speed: Of generation and decoding.
        record: The session's record, kept only if it was asked for.
    """

    def __init__(
        self,
        request: GenerateRequest,
        engine: Engine,
        writer: FrameWriter,
        bar: tqdm[None],
        stop: Event,
        *,
        meter: EngineMeter,
    ) -> None:
        self.speed = Speed()
        self.record: SessionRecord | None = None
        self._request = request
        self._engine = engine
        self._writer = writer
        self._bar = bar
        self._stop = stop
        self._meter = meter
        self._update: PromptUpdate | None = None

    def generate(self) -> None:
        """Write chunks until the video is as long as was asked for, or an interrupt stops it."""
        self._check_prompts()
        switches = {prompt.chunk: prompt.line.update for prompt in self._request.prompts}
        session = self._begin(switches)
        for index in range(self._request.chunks):
            if self._stop.is_set():
                break
            if index in switches:
                self._switch(session, switches[index])
            started_s = time.perf_counter()
            try:
                chunk = session.generate_chunk(should_stop=self._stop.is_set)
            except Stopped:
                break
            chunk.require_finite()
            made_s = time.perf_counter()
            self._take(session, chunk)
            denoise_s = made_s - started_s - chunk.context_s
            self._meter.made(denoise_s, chunk.context_s, time.perf_counter() - made_s)
            self._meter.holds(session.state.nbytes_by_part(), session.rebuilds)

    def _check_prompts(self) -> None:
        """Raise for a prompt that the text encoder would refuse once its chunk comes."""
        encoder = self._engine.text_encoder
        assert encoder is not None, "the engine was loaded with one"
        for line in (prompt.line for prompt in self._request.prompts):
            with naming_line(line.number, f"{line.time_s:g}s"):
                encoder.check([prompt.text for prompt in line.update.prompts])

    def _begin(self, switches: dict[int, PromptUpdate]) -> Session:
        """Return the session, with the given frames, if any, and their prompt already in its past."""
        request = self._request
        keep = request.save_record is not None
        if request.record is not None:
            session = request.record.restore(self._engine, request.restore)
            self.record = request.record if keep else None
            return session
        session = self._engine.new_session(request.config)
        self.record = SessionRecord(request.preset.name, request.config) if keep else None
        given = self._given_latents()
        self._switch(session, switches.pop(0))
        if given is not None:
            self._take(session, session.start_from(given), given=True)
        return session

    def _given_latents(self) -> torch.Tensor | None:
        engine, pixels = self._engine, _given_pixels(self._request)
        if pixels is None:
            return None
        if engine.vae is None:
            raise SessionStateError("the engine was loaded without a VAE", reason="NO_VAE")
        with torch.inference_mode():
            return engine.vae.encode(pixels.to(engine.device, engine.dtype))

    def _switch(self, session: Session, update: PromptUpdate) -> None:
        self._update = update
        session.update_prompt(update)

    def _take(self, session: Session, chunk: Chunk, *, given: bool = False) -> None:
        """Decode a chunk and write what of it belongs to the video."""
        frames = to_frames(session.decode(chunk))
        if self.record is not None:
            self.record.append(chunk, self._update if chunk.prompt_applied else None, given=given)
        if given and self._request.video is not None:
            return  # a continuation holds only what is new
        self.speed.add(len(frames))
        self._write(frames)

    def _write(self, frames: Frames) -> None:
        frames = frames[: self._request.frames - self._writer.frame_count]
        self._writer.write(frames)
        self._bar.set_postfix_str(f"{self.speed.fps:.1f} FPS, TTFC {self.speed.first_s or 0.0:.2f} s", refresh=False)
        self._bar.update(len(frames))


def _given_frames(request: GenerateRequest) -> int:
    """Return the most latent frames of the picture or video that a session begins with; 0 without one."""
    if request.video is not None:
        preset = request.preset
        return max(1, min(request.config.cache_frames, preset.window_frames) - preset.chunk_frames)
    return int(request.image is not None)


def _given_pixels(request: GenerateRequest) -> torch.Tensor | None:
    geometry = request.config.geometry
    if request.image is not None:
        return read_image(request.image, geometry)
    if request.video is not None:
        return read_video(request.video, geometry, max_frames=pixel_frames(_given_frames(request), first=True))
    return None


def _meter(port: int | None, stack: ExitStack) -> EngineMeter:
    """Return what records this process's metrics, and serve them until the stack is left if a port was given."""
    from serve.metrics.engine import EngineMeter, engine_metrics

    return EngineMeter() if port is None else stack.enter_context(engine_metrics(port))


def _parse_lora(text: str) -> LoraFile:
    path, mark, scale = text.rpartition("::")
    if not mark:
        return LoraFile(Path(text))
    try:
        return LoraFile(Path(path), float(scale))
    except ValueError:
        raise InvalidRequest("lora", text, "must be FILE or FILE::SCALE, as in style.safetensors::0.8") from None


def _save_record(record: SessionRecord, path: Path) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    record.save(temporary)
    temporary.replace(path)


def _start_up(*, quiet: bool) -> StartUp:
    """Return the clock of this start, its imports already counted, which shows how far the warm-up is."""

    def show(done: int, total: int) -> None:
        end = "\n" if done == total else ""
        print(f"\rcompiling: {done} of {total} chunks", end=end, file=sys.stderr, flush=True)

    startup = StartUp() if quiet else StartUp(show)
    startup.add("import", time.perf_counter() - PROGRAM_STARTED_S)
    return startup


def _progress_bar(request: GenerateRequest, *, quiet: bool) -> tqdm[None]:
    return tqdm(total=request.frames, unit="frame", disable=quiet, file=sys.stderr)


class Interrupts:
    """A context in which the first Ctrl-C or SIGTERM only asks to stop, so that what is finished is kept.

    A second signal ends the process as usual.

    Attributes:
        asked: Set by the first signal.
        status: 128 and the number of that signal, 0 before it.
    """

    def __init__(self) -> None:
        self.asked, self.status = Event(), 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _stop(self, number: int, _frame: FrameType | None) -> None:
        self.status = 128 + number
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self.asked.set()
