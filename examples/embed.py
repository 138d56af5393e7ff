"""Use the engine in a program of your own, without Ray and without a server.

    python examples/embed.py story.mp4

An `Engine` is weights and is shared; a `Session` is one user. Everything a session knows can be saved, and taken up
again in another process: exactly (a snapshot, with the caches) or from a few megabytes (a record, see docs/api.md).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from causal_forcing.engine import Engine
from causal_forcing.media import open_writer, to_frames
from causal_forcing.prompts import PromptUpdate, SwitchPolicy, WeightedPrompt


def main() -> None:
    """Write a video whose prompt changes half-way, and a snapshot from which it goes on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="an .mp4, .gif or .png file")
    parser.add_argument("--preset", default="tiny", help="a model by name (default: the one that ships here)")
    parser.add_argument("--chunks", type=int, default=16, help="chunks before and after the switch (default 16)")
    args = parser.parse_args()

    engine = Engine.load(args.preset)
    session = engine.new_session(engine.session_config(seed=7))
    session.update_prompt(PromptUpdate((WeightedPrompt("a red circle moves left on a black background"),)))
    with open_writer(args.output) as writer:
        for index in range(2 * args.chunks):
            if index == args.chunks:
                prompt = WeightedPrompt("a blue square moves up on a black background")
                session.update_prompt(PromptUpdate((prompt,), policy=SwitchPolicy.RECACHE))
            writer.write(to_frames(session.decode(session.generate_chunk())))

    snapshot = session.snapshot()  # continues bit for bit
    again = engine.new_session(session.config)
    again.restore(snapshot)
    assert again.generate_chunk().latents.equal(session.generate_chunk().latents)
    print(f"wrote {args.output}; the session takes {session.nbytes / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
