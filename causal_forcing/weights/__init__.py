"""Weight files: which formats are read, how their names map to ours, and how they are loaded, fetched and converted."""

from causal_forcing.weights.formats import Checkpoint, open_checkpoint
from causal_forcing.weights.keys import Family, umt5_to_transformers
from causal_forcing.weights.loading import load_into, load_text_encoder, load_transformer, load_vae
from causal_forcing.weights.locate import default_weights_dir
from causal_forcing.weights.lora import LoraFile

__all__ = [
    "Checkpoint",
    "Family",
    "LoraFile",
    "default_weights_dir",
    "load_into",
    "load_text_encoder",
    "load_transformer",
    "load_vae",
    "open_checkpoint",
    "umt5_to_transformers",
]
