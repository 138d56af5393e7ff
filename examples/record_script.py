"""Play a script of timed prompts on a running service and record it.

    causal-forcing serve                                       # in another terminal
    python examples/record_script.py examples/story.txt story.mp4

`causal-forcing stream --script` does this and more; here is what it takes. Times count in video, so the recording is
the same however fast the service is.
"""

from __future__ import annotations

import argparse
from collections import deque
from pathlib import Path

from causal_forcing.geometry import FRAMES_PER_SECOND
from causal_forcing.media import open_writer
from causal_forcing.script import read_script
from serve.client import Ended, Frame, PromptApplied, StreamOptions, VideoClient


def main() -> None:
    """Send each prompt when the video reaches its time; write every frame."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", type=Path, help="lines such as `8s it starts to snow`")
    parser.add_argument("output", type=Path, help="an .mp4 or .gif file")
    parser.add_argument("--server", default="127.0.0.1:9000", help="host:port (default 127.0.0.1:9000)")
    parser.add_argument("--last-s", type=float, default=4.0, help="seconds after the last prompt (default 4)")
    args = parser.parse_args()

    lines = deque(read_script(args.script))
    last_frame = round((lines[-1].time_s + args.last_s) * FRAMES_PER_SECOND)
    options = StreamOptions(prompt=lines.popleft().update, seed=42, pacing="as_fast_as_possible")
    with VideoClient(args.server) as client, client.stream(options) as session, open_writer(args.output) as writer:
        for event in session:
            match event:
                case PromptApplied():
                    print(f"frame {event.frame_index}: {event.prompt_id}")
                case Frame():
                    writer.write(event.pixels()[None])
                    while lines and event.frame_index + 1 >= lines[0].time_s * FRAMES_PER_SECOND:
                        session.update_prompt(lines.popleft().update)
                    if event.frame_index + 1 >= last_frame:
                        break
                case Ended():
                    break
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
