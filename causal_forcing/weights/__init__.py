"""Weight files: which formats are read, how their names map to ours, and how they are loaded, fetched and converted."""

from causal_forcing.weights.keys import umt5_to_transformers

__all__ = ["umt5_to_transformers"]
