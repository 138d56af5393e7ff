"""Watch a live video and change its prompt: the whole client in fifteen lines."""

from pathlib import Path

from serve.client import Frame, StreamOptions, VideoClient

with VideoClient("127.0.0.1:9000") as client, client.stream(StreamOptions(prompt="a red circle moves left")) as session:
    for event in session:
        if isinstance(event, Frame):
            Path(f"{event.frame_index:05d}.jpg").write_bytes(event.data)
            if event.frame_index == 32:
                session.update_prompt("a blue square moves up")
            if event.frame_index == 64:
                break
