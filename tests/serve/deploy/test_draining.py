"""Draining, with a cluster that answers from a script and a clock that only we move."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from serve.deploy.draining import PATIENCE_S, POLL_S, Clock, drain_node
from serve.errors import Unavailable


class ScriptedCluster:
    """Answers `replicas` from a list; an exception in it is raised, and the last answer is repeated."""

    def __init__(self, answers: Sequence[int | OSError], accepts: bool = True) -> None:
        self._answers = list(answers)
        self._accepts = accepts
        self.drained: list[tuple[str, float]] = []

    def own_node(self) -> str:
        return "mine"

    def drain(self, node_id: str, deadline_s: float) -> None:
        if not self._accepts:
            raise OSError("no such cluster")
        self.drained.append((node_id, deadline_s))

    def replicas(self, node_id: str) -> int:
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if isinstance(answer, OSError):
            raise answer
        return answer


class Time:
    def __init__(self) -> None:
        self.now_s = 0.0

    def clock(self) -> Clock:
        def sleep(seconds: float) -> None:
            self.now_s += seconds

        return Clock(lambda: self.now_s, sleep)


def test_it_waits_until_the_last_replica_has_ended() -> None:
    cluster, time = ScriptedCluster([3, 2, 2, 1, 0]), Time()
    assert drain_node(cluster, 600, clock=time.clock()) == 0
    assert cluster.drained == [("mine", 600)]
    assert time.now_s == 5 * POLL_S


def test_it_says_what_was_left_at_the_end() -> None:
    cluster, time = ScriptedCluster([2]), Time()
    assert drain_node(cluster, 60, "other", time.clock()) == 2
    assert cluster.drained == [("other", 60)]
    assert time.now_s == 60


def test_a_silence_is_borne_and_a_long_one_is_not() -> None:
    silent = OSError("no answer")
    short = [1, *[silent] * int(PATIENCE_S / POLL_S), 1, 0]
    assert drain_node(ScriptedCluster(short), 3600, clock=Time().clock()) == 0
    time = Time()
    with pytest.raises(Unavailable, match="does not answer any more"):
        drain_node(ScriptedCluster([1, silent]), 3600, clock=time.clock())
    assert PATIENCE_S < time.now_s < PATIENCE_S + 3 * POLL_S


def test_a_cluster_that_is_not_there_is_said_at_once() -> None:
    time = Time()
    with pytest.raises(Unavailable, match="no such cluster") as caught:
        drain_node(ScriptedCluster([0], accepts=False), 3600, clock=time.clock())
    assert caught.value.reason == "CLUSTER_LOST"
    assert time.now_s == 0
