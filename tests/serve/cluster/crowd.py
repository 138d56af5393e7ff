"""Many sessions at once, each with a seed, prompts and names of its own, and what each saw that was not its own."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from causal_forcing.prompts import PromptUpdate, WeightedPrompt
from serve.client import AsyncVideoClient, Ended, Event, Frame, PromptApplied, Started, StreamOptions
from serve.simulated import mark
from tests.serve.test_isolation import mark_of

CHUNKS = 5


@dataclass
class Visitor:
    """One session against the simulated engine, whose pictures tell seed, chunk and prompt.

    Attributes:
        number: Tells it apart.
        session_id: What the service calls it.
        frames: Frames so far.
        foreign: What was not its own.
        ended_well: Whether the service said goodbye.
    """

    number: int
    session_id: str = ""
    frames: int = 0
    foreign: list[str] = field(default_factory=list)
    ended_well: bool = False

    async def visit(self, address: str) -> None:
        """Run the session, with a prompt switch in the middle."""
        options = StreamOptions(
            self._prompt("first"), seed=self._seed, codec="raw_rgb24", pacing="as_fast_as_possible", credit_chunks=1
        )
        async with AsyncVideoClient(address) as client, client.stream(options) as session:
            async for event in session:
                self._look(event)
                if isinstance(event, Frame) and event.last_in_chunk:
                    if event.chunk_index == 1:
                        await session.update_prompt(self._prompt("second"))
                    if event.chunk_index >= CHUNKS and event.prompt_id == self._name("second"):
                        await session.end()

    @property
    def _seed(self) -> int:
        return 7 * self.number + 1

    def _name(self, which: str) -> str:
        return f"{which}-{self.number}"

    def _prompt(self, which: str) -> PromptUpdate:
        return PromptUpdate((WeightedPrompt(f"the {which} of {self.number}"),), prompt_id=self._name(which))

    def _look(self, event: Event) -> None:
        match event:
            case Started():
                self._expect("session_id", "", self.session_id)
                self._expect("seed", event.config.seed, self._seed)
                self.session_id = event.session_id
            case PromptApplied():
                self._expect("number of the prompt", event.prompt_id.partition("-")[2], str(self.number))
            case Frame():
                which = event.prompt_id.partition("-")[0]
                self._expect("frame", event.frame_index, self.frames)
                self._expect("prompt", event.prompt_id, self._name(which))
                painted = (mark(self._seed) % 256, event.chunk_index, mark_of(f"the {which} of {self.number}"))
                self._expect("picture", tuple(map(int, event.pixels()[0, 0])), painted)
                self.frames += 1
            case Ended():
                self._expect("frames sent", event.frame_count, self.frames)
                self.ended_well = True

    def _expect(self, what: str, got: object, wanted: object) -> None:
        if got != wanted:
            self.foreign.append(f"session {self.number}: {what} is {got}, not {wanted}")


async def visit_at_once(address: str, count: int) -> dict[str, object]:
    """Run sessions at once; return what they saw."""
    visitors = [Visitor(number) for number in range(count)]
    await asyncio.gather(*(visitor.visit(address) for visitor in visitors))
    return {
        "names": len({visitor.session_id for visitor in visitors}),
        "ended_well": sum(visitor.ended_well for visitor in visitors),
        "fewest_frames": min(visitor.frames for visitor in visitors),
        "foreign": [line for visitor in visitors for line in visitor.foreign],
    }
