"""What every test gets: no network, no surprises from the machine's settings, and a place in the order."""

from __future__ import annotations

import os

import pytest

from tests.isolation import enter_private_network, is_private

os.environ["CAUSAL_FORCING_PRIVATE_NETWORK"] = str(int(is_private() or enter_private_network()))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["TOKENIZERS_PARALLELISM"] = "false"


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in its own hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give all tests with a cluster to one process, where they share it, and begin with the longest."""
    for item in items:
        if item.get_closest_marker("ray"):
            item.add_marker(pytest.mark.xdist_group("ray"))
    items.sort(key=lambda item: (not item.get_closest_marker("ray"), not item.get_closest_marker("slow")))
