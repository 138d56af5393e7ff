"""Prompts become embeddings: cleaning, tokens, the UMT5 encoder, and a cache of what it said.

What a prompt becomes depends on the prompt alone. Each prompt is one row of its own forward pass, because a matrix
product over a larger batch rounds differently; and its padded length is a function of its own length.
"""

from __future__ import annotations

import hashlib
import html
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from causal_forcing.config import TextEncoderConfig
from causal_forcing.errors import InvalidRequest
from causal_forcing.prompts import PromptEmbedding
from causal_forcing.tokenizer import PAD_ID, Tokenizer

DEFAULT_CACHE_BYTES = 256 * 2**20
"""Bytes of embeddings kept by default: 64 prompts of UMT5-XXL in bfloat16."""

_SMALLEST_BUCKET = 16
_FINGERPRINT_VALUES = 16


def clean_prompt(text: str) -> str:
    """Return a prompt as the reference cleans it: encoding repaired, entities resolved twice, white space collapsed.

    Source: Wan2.1 ``wan/modules/tokenizers.py`` (``clean='whitespace'``).
    """
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


def padded_length(tokens: int, text_len: int) -> int:
    """Return the length that a prompt of so many tokens is padded to before encoding: a power of two, at least 16.

    Shorter than the reference's ``text_len``. Mathematically the real rows are the same, because padding is masked; in
    float32 they are 2e-6 apart.
    """
    return min(max(_SMALLEST_BUCKET, 1 << (tokens - 1).bit_length()), text_len)


def build_encoder(config: TextEncoderConfig, device: torch.device | str | None = None) -> nn.Module:
    """Return a ``transformers.UMT5EncoderModel`` of these sizes, in eval mode, without gradients.

    Args:
        config: Sizes.
        device: Where to create it; ``"meta"`` allocates nothing. None takes the default device of the context.

    Source: google/umt5-xxl config.json for what is constant.
    """
    from transformers import UMT5Config, UMT5EncoderModel

    umt5 = UMT5Config(
        vocab_size=config.vocab_size,
        d_model=config.d_model,
        d_kv=config.d_kv,
        d_ff=config.d_ff,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        relative_attention_num_buckets=config.num_buckets,
        relative_attention_max_distance=config.max_distance,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        layer_norm_epsilon=1e-6,
    )
    with nullcontext() if device is None else torch.device(device):
        encoder: nn.Module = UMT5EncoderModel(umt5)
    return encoder.eval().requires_grad_(False)


def encode_ids(encoder: nn.Module, ids: Tensor, mask: Tensor, text_len: int) -> Tensor:
    """Return prompt embeddings ``[B, text_len, text_dim]``; rows past a prompt's real length are zero.

    Args:
        encoder: From :func:`build_encoder`.
        ids: ``[B, L]`` int64, padded on the right, ``L <= text_len``.
        mask: ``[B, L]``, 1 for real tokens.
        text_len: Rows of the result.
    """
    hidden: Tensor = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    hidden = torch.where(mask.bool()[..., None], hidden, hidden.new_zeros(()))
    return F.pad(hidden, (0, 0, 0, text_len - hidden.shape[1]))


def fingerprint(module: nn.Module) -> str:
    """Return a short hash of a module's weights: names, shapes, dtypes and the first values of each.

    Different weights have different fingerprints, unless they agree in the first 16 values of every tensor.
    """
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.flatten()[:_FINGERPRINT_VALUES].double().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


class TextEncoder:
    """Encodes prompts and remembers the results, least recently used first out."""

    def __init__(
        self, encoder: nn.Module, tokenizer: Tokenizer, text_len: int, *, cache_bytes: int = DEFAULT_CACHE_BYTES
    ) -> None:
        """Wrap loaded weights.

        Args:
            encoder: From :func:`build_encoder`, with weights.
            tokenizer: Made for the same vocabulary.
            text_len: Rows of an embedding, and the longest prompt in tokens, the end token included.
            cache_bytes: Most bytes of embeddings to keep; 0 keeps none.
        """
        self.encoder = encoder
        self.tokenizer = tokenizer
        self.text_len = text_len
        self.cache_bytes = cache_bytes
        self.model_id = fingerprint(encoder)
        self._cache: OrderedDict[str, PromptEmbedding] = OrderedDict()
        self._cached_bytes = 0
        self._lock = threading.Lock()

    @property
    def cached_bytes(self) -> int:
        """Bytes of embeddings kept at the moment."""
        return self._cached_bytes

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.encoder.parameters()).device

    def encode(self, texts: Sequence[str]) -> list[PromptEmbedding]:
        """Return one embedding per prompt; they are shared with the cache and must not be written to.

        Raises:
            InvalidRequest: If a prompt is blank after cleaning, or has more tokens than the model reads (field
                ``prompts.text``). The reference cuts such a prompt off in silence.
        """
        prepared = [self._prepare(text) for text in texts]
        return [self._lookup(key) or self._remember(key, ids) for key, ids in prepared]

    def check(self, texts: Sequence[str]) -> None:
        """Raise for a prompt that :meth:`encode` would refuse; the encoder itself does not run.

        Raises:
            InvalidRequest: As :meth:`encode`.
        """
        for text in texts:
            self._prepare(text)

    def _prepare(self, text: str) -> tuple[str, list[int]]:
        cleaned = clean_prompt(text)
        if not cleaned:
            raise InvalidRequest("prompts.text", text, "must be text that is not blank", reason="INVALID_PROMPT")
        ids = self.tokenizer.encode(cleaned)
        if len(ids) > self.text_len:
            allowed = f"must be at most {self.text_len - 1} tokens for this model"
            raise InvalidRequest("prompts.text", f"{len(ids) - 1} tokens", allowed, reason="INVALID_PROMPT")
        return hashlib.sha256(f"{self.model_id}\0{cleaned}".encode()).hexdigest(), ids

    def _lookup(self, key: str) -> PromptEmbedding | None:
        with self._lock:
            found = self._cache.get(key)
            if found is not None:
                self._cache.move_to_end(key)
            return found

    def _remember(self, key: str, ids: list[int]) -> PromptEmbedding:
        embedding = PromptEmbedding(self._run(ids), key)
        with self._lock:
            if embedding.embeds.nbytes <= self.cache_bytes and key not in self._cache:
                self._cache[key] = embedding
                self._cached_bytes += embedding.embeds.nbytes
            while self._cached_bytes > self.cache_bytes:
                _, oldest = self._cache.popitem(last=False)
                self._cached_bytes -= oldest.embeds.nbytes
        return embedding

    @torch.no_grad()
    def _run(self, ids: list[int]) -> Tensor:
        length = padded_length(len(ids), self.text_len)
        row = torch.tensor([ids + [PAD_ID] * (length - len(ids))], device=self.device)
        mask = torch.arange(length, device=self.device)[None] < len(ids)
        return encode_ids(self.encoder, row, mask.long(), self.text_len)
