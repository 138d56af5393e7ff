"""Video autoencoders that stream: frames in, latents out and back, with all memory of the past in explicit state.

:class:`WanVae` is the Wan2.1 autoencoder (``wan``, and ``lightvae`` with a quarter of the channels), :class:`TinyVae`
the tiny ones (``tae``, ``lighttae``). Both satisfy :class:`Vae`.
"""

from causal_forcing.vae.state import DecoderState, EncoderState, Vae
from causal_forcing.vae.streaming import StreamingVae
from causal_forcing.vae.tiny import TinyVae
from causal_forcing.vae.wan import WanVae

__all__ = ["DecoderState", "EncoderState", "StreamingVae", "TinyVae", "Vae", "WanVae"]
