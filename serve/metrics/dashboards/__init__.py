"""The dashboards: what is drawn of the metrics in ``definitions.py``, and of Serve's and the nodes' own.

A panel of some deployments' metrics is empty while others are chosen, as in Ray's own dashboards.
"""

from .capacity import CAPACITY
from .latency import LATENCY
from .memory import MEMORY
from .overview import OVERVIEW
from .reliability import RELIABILITY
from .sessions import SESSIONS

DASHBOARDS = (OVERVIEW, SESSIONS, LATENCY, CAPACITY, MEMORY, RELIABILITY)
"""All of them."""
