"""Sessions leave nothing behind, however they end: claims, leases, logs, caches, tasks, threads, open files."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_hundreds_of_short_sessions_leave_nothing_behind() -> None:
    program = [sys.executable, "benchmarks/serve_leaks.py", "--sessions", "200", "--print"]
    done = subprocess.run(program, capture_output=True, text=True, timeout=280, check=False)
    assert done.stdout, done.stderr[-4000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["left"] == {}, seen
    assert (done.returncode, seen["sessions"]) == (0, 200)
    assert seen["after"]["decoder"]["caches"] == seen["after"]["gateway"]["logs"] == 0
