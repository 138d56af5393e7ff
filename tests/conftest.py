"""What every test gets: no network, no surprises from the machine's settings."""

from __future__ import annotations

import os

from tests.isolation import enter_private_network

os.environ["CAUSAL_FORCING_PRIVATE_NETWORK"] = str(int(enter_private_network()))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
