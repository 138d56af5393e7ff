"""Let a chat direct the video: every line that a viewer writes may become the next prompt.

    causal-forcing serve                                                    # in another terminal
    python examples/director.py --output show.mp4                           # then type lines
    tail -f chat.log | python examples/director.py --rewrite ./to_prompt.sh

A line is `NAME: TEXT` or just `TEXT`. `/cut TEXT` starts a new scene, `/blend TEXT` turns slowly into it, and `/stop`
ends the show. Lines that arrive while a prompt is new are voted on: the text that most viewers wrote wins, the latest
among equals. With `--rewrite`, a program of your choice (a language model's command line, say) gets the winning line on
its standard input and answers with the prompt to show; without an answer within its time the line is used as it is. The
video goes on meanwhile.
"""

from __future__ import annotations

import argparse
import queue
import re
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from causal_forcing.errors import InvalidRequest
from causal_forcing.geometry import FRAMES_PER_SECOND
from causal_forcing.prompts import PromptUpdate, SwitchPolicy, WeightedPrompt
from serve.client import Event, Frame, PromptApplied, StreamOptions, VideoClient, VideoSession

BLEND_CHUNKS = 8
REWRITE_S = 5.0
LINE = re.compile(r"(?:[\w .-]{1,32}:\s+)?(?:(?P<command>/\w+)\s*)?(?P<text>.*)")
COMMANDS = ("", "/cut", "/blend", "/stop")


@dataclass(frozen=True)
class Wish:
    """What one line of the chat asks for: a text, and how to get there (``/cut``, ``/blend`` or nothing)."""

    text: str
    command: str = ""

    @classmethod
    def parse(cls, line: str) -> Wish | None:
        """Return the wish of a chat line, or None for one that holds none."""
        match = LINE.fullmatch(line.rstrip("\r\n"))
        if match is None:
            return None
        wish = cls(match["text"].strip(), match["command"] or "")
        if wish.command == "/stop":
            return cls("", wish.command)
        return wish if wish.text and wish.command in COMMANDS else None

    def update(self) -> PromptUpdate:
        """Return what is sent to the service."""
        policy = SwitchPolicy.SCENE_CUT if self.command == "/cut" else SwitchPolicy.RECACHE
        chunks = BLEND_CHUNKS if self.command == "/blend" else 0
        if chunks:
            policy = SwitchPolicy.CROSS_ATTENTION  # the way there is slow on purpose
        return PromptUpdate((WeightedPrompt(self.text),), policy=policy, transition_chunks=chunks)


def vote(wishes: list[Wish]) -> Wish | None:
    """Return the most frequent wish, the latest among equals; `/stop` beats all."""
    for wish in wishes:
        if wish.command == "/stop":
            return wish
    if not wishes:
        return None
    counts = Counter(wishes)
    most = max(counts.values())
    return next(wish for wish in reversed(wishes) if counts[wish] == most)


def rewrite(wish: Wish, command: str | None) -> Wish:
    """Return the wish in the words of the rewriting program; as it is where that program fails."""
    if command is None or wish.command == "/stop":
        return wish
    try:
        done = subprocess.run([command], input=wish.text, capture_output=True, text=True, timeout=REWRITE_S, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        print(f"rewrite failed ({type(error).__name__}); the line is used as it is", file=sys.stderr)
        return wish
    return Wish(done.stdout.strip() or wish.text, wish.command)


class Chat:
    """The lines of a text stream, read by a thread so that the video never waits for them."""

    def __init__(self, lines: TextIO) -> None:
        self._wishes: queue.SimpleQueue[Wish] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, args=(lines,), daemon=True)
        self._reader.start()

    def take(self) -> list[Wish]:
        """Return the wishes that have come since the last call."""
        return [self._wishes.get() for _ in range(self._wishes.qsize())]

    def _read(self, lines: TextIO) -> None:
        for line in lines:
            wish = Wish.parse(line)
            if wish is not None:
                self._wishes.put(wish)


class Director:
    """Turns wishes into prompts, one at a time and never faster than `every_s` of video."""

    def __init__(self, chat: Chat, *, every_s: float, command: str | None) -> None:
        self._chat = chat
        self._every_s = every_s
        self._command = command
        self._due_s = every_s
        self._pool = ThreadPoolExecutor(1)
        self._rewriting: Future[Wish] | None = None

    def direct(self, session: VideoSession, now_s: float) -> bool:
        """Send the next prompt if one is due; return whether the show goes on. `now_s` is the time in the video."""
        if self._rewriting is None and now_s >= self._due_s:
            wish = vote(self._chat.take())
            if wish is not None:
                self._rewriting = self._pool.submit(rewrite, wish, self._command)
        if self._rewriting is None or not self._rewriting.done():
            return True
        wish, self._rewriting = self._rewriting.result(), None
        if wish.command == "/stop":
            return False
        self._due_s = now_s + self._every_s
        try:
            session.update_prompt(wish.update())
        except InvalidRequest as error:  # a text that is too long, say
            print(error, file=sys.stderr)
        return True


def show(event: Event) -> None:
    """Say where a prompt takes effect."""
    if isinstance(event, PromptApplied):
        print(f"{event.prompt_id} from frame {event.frame_index}", flush=True)


def main() -> None:
    """Run the show until the chat says `/stop`, the time is up or the service ends it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", default="127.0.0.1:9000", help="host:port (default 127.0.0.1:9000)")
    parser.add_argument("--first", default="a red circle moves left on a black background", help="the first prompt")
    parser.add_argument("--every-s", type=float, default=2.0, help="seconds of video between two prompts (default 2)")
    parser.add_argument("--seconds", type=float, default=60.0, help="length of the show (default 60)")
    parser.add_argument("--rewrite", metavar="PROGRAM", help="turns a chat line (stdin) into a prompt (stdout)")
    parser.add_argument("--output", type=Path, help="record to this .mp4 file")
    args = parser.parse_args()

    director = Director(Chat(sys.stdin), every_s=args.every_s, command=args.rewrite)
    with ExitStack() as stack:
        writer = None
        if args.output is not None:
            from causal_forcing.media import open_writer

            writer = stack.enter_context(open_writer(args.output))
        client = stack.enter_context(VideoClient(args.server))
        session = stack.enter_context(client.stream(StreamOptions(prompt=args.first)))
        for event in session:
            show(event)
            if not isinstance(event, Frame):
                continue
            if writer is not None:
                writer.write(event.pixels()[None])
            now_s = (event.frame_index + 1) / FRAMES_PER_SECOND
            if now_s >= args.seconds or not director.direct(session, now_s):
                break


if __name__ == "__main__":
    main()
