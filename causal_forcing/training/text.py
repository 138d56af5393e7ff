"""The embedded model's tokenizer and small UMT5 encoder, trained together with the generator.

    python -m causal_forcing.training.text

writes ``<root>/text/tokenizer.json``: byte pairs learnt from captions over an alphabet of all 256 bytes, so that any
text is accepted. The encoder itself is trained by the ``ar`` stage.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from causal_forcing.config import TextEncoderConfig
from causal_forcing.text_encoder import build_encoder, clean_prompt, encode_ids
from causal_forcing.tokenizer import END_ID, PAD_ID, FileTokenizer, Tokenizer
from causal_forcing.training import captions, world
from causal_forcing.training.loop import DEFAULT_ROOT

CORPUS_CAPTIONS = 20_000
BUCKET = 8
"""Rows of a training batch are padded to a multiple of this."""


def corpus(count: int = CORPUS_CAPTIONS, seed: int = 2) -> Iterator[str]:
    """Iterate over random captions."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        yield captions.caption(world.draw_scene(rng, two_objects=0.1), rng)


def train_tokenizer(path: Path, vocab_size: int, *, count: int = CORPUS_CAPTIONS) -> None:
    """Learn a byte-level tokenizer from captions and write it as ``tokenizer.json``.

    Args:
        path: Where to; its folder is created.
        vocab_size: Tokens altogether: padding, end, unknown (never produced), 256 bytes, and learnt pairs.
        count: Captions to learn from.
    """
    from tokenizers import Tokenizer as FastTokenizer
    from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = FastTokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(count), trainer)
    if tokenizer.token_to_id("<pad>") != PAD_ID or tokenizer.token_to_id("</s>") != END_ID:
        raise ValueError("the tokenizer gave its special tokens other ids than the text encoder expects")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", END_ID)])
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))


def load_tokenizer(root: Path, vocab_size: int) -> FileTokenizer:
    """Return the tokenizer of a training folder, learning it first if it is not there."""
    path = root / "text" / "tokenizer.json"
    if not path.exists():
        train_tokenizer(path, vocab_size)
    return FileTokenizer(path)


def trainable_encoder(config: TextEncoderConfig, seed: int) -> nn.Module:
    """Return a seeded UMT5 encoder whose weights take gradients."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = build_encoder(config)
    return encoder.requires_grad_(True)


def token_rows(tokenizer: Tokenizer, texts: Sequence[str], text_len: int) -> Tensor:
    """Return the token ids of texts, ``[N, L]`` int64, padded to the longest (a multiple of 8)."""
    ids = [tokenizer.encode(clean_prompt(text))[:text_len] for text in texts]
    longest = max(len(row) for row in ids)
    length = min(-(-longest // BUCKET) * BUCKET, text_len)
    return torch.tensor([row + [PAD_ID] * (length - len(row)) for row in ids])


def embed(encoder: nn.Module, ids: Tensor, text_len: int) -> Tensor:
    """Return prompt embeddings ``[N, text_len, text_dim]`` of ids ``[N, L]``, with gradients; padding rows are zero."""
    return encode_ids(encoder, ids, (ids != PAD_ID).long(), text_len)


def main() -> None:
    """Run the stage from the command line."""
    from causal_forcing.presets import get_preset

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=DEFAULT_ROOT, help="folder of checkpoints and logs")
    root = parser.parse_args().root
    train_tokenizer(root / "text" / "tokenizer.json", get_preset("tiny").text_encoder.vocab_size)


if __name__ == "__main__":
    main()
