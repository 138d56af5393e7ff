"""Generators come and go with sessions, and no session notices."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.serve.cluster.crowd import CHUNKS
from tests.serve.cluster.scaling import CROWD

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_generators_start_for_sessions_and_stop_after_them() -> None:
    program = [sys.executable, "-m", "tests.serve.cluster.scaling"]
    done = subprocess.run(program, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert (seen["from_zero"]["chunks"], seen["second"]["chunks"]) == (2, 2)
    assert seen["from_zero"]["queued"] >= 1
    assert seen["second"]["queued"] >= 1
    assert seen["generators_for_two"] == {"RUNNING": 2}
    assert seen["while_the_newest_is_busy"] == [], "Serve would stop the newest, which has a session"
    crowd = seen["crowd"]
    assert crowd["foreign"] == [], "something of one session reached another"
    assert (crowd["names"], crowd["ended_well"]) == (CROWD, CROWD)
    assert crowd["fewest_frames"] >= 1 + 4 * CHUNKS
    assert seen["while_draining"]["chunks"] == 30
    assert (seen["waiting"], seen["sent_away"]) == ("Queued", ["UNAVAILABLE", "REPLICA_DRAINING"])
    assert (seen["after_redeploy"]["chunks"], seen["still_running"]["chunks"]) == (2, 2)
    assert seen["ended_well"]
    assert seen["of_another_model"] == ["UNAVAILABLE", "REPLICA_DRAINING"]
