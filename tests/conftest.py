"""What every test gets: no network, no surprises from the machine's settings, and a place in the order."""

from __future__ import annotations

import os

import pytest
from xdist.scheduler import LoadScopeScheduling

from tests.isolation import enter_private_network, is_private

os.environ["CAUSAL_FORCING_PRIVATE_NETWORK"] = str(int(is_private() or enter_private_network()))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

CLUSTERS = ("tests/serve/cluster/", "tests/k8s/test_deployed.py")
"""Where tests that start a Ray cluster are; when tests run in several processes, one of them runs all of these."""


class OneProcessForClusters(LoadScopeScheduling):
    """Hands tests out one by one, but those with a cluster all to the same process, where they share it."""

    def _split_scope(self, nodeid: str) -> str:
        return "clusters" if nodeid.startswith(CLUSTERS) else nodeid


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> OneProcessForClusters:
    """Return how tests are spread over processes."""
    return OneProcessForClusters(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest tests.

    Raises:
        pytest.UsageError: If a test with a cluster is where it would not be noticed.
    """
    for item in items:
        if item.get_closest_marker("ray") and not item.nodeid.startswith(CLUSTERS):
            raise pytest.UsageError(f"{item.nodeid} starts a cluster and is not in {', '.join(CLUSTERS)}")
    items.sort(key=lambda item: (not item.get_closest_marker("ray"), not item.get_closest_marker("slow")))
