"""Puts Scope where Python finds it: a real checkout on the path (`make test-scope`), or the stand-in."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

STAND_IN = Path(__file__).parent / "stand_in"

if os.environ.get("CAUSAL_FORCING_REAL_SCOPE"):
    assert importlib.util.find_spec("scope") is not None, "make test-scope SCOPE=CHECKOUT puts Scope on the path"
else:
    sys.path.insert(0, str(STAND_IN))
