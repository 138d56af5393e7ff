"""Prompts: cleaning, tokens, independence of neighbours, the cache, and parity with the reference encoder."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from causal_forcing.config import TextEncoderConfig
from causal_forcing.errors import BadCheckpoint, InvalidRequest
from causal_forcing.text_encoder import (
    TextEncoder,
    build_encoder,
    clean_prompt,
    encode_ids,
    fingerprint,
    padded_length,
)
from causal_forcing.tokenizer import END_ID, FileTokenizer, FragmentTokenizer
from causal_forcing.weights import umt5_to_transformers

GOLDEN = Path(__file__).parents[1] / "golden" / "umt5_encoder.safetensors"
CONFIG = TextEncoderConfig(
    vocab_size=512, d_model=32, d_kv=8, num_heads=4, d_ff=48, num_layers=2, num_buckets=8, max_distance=20, text_len=48
)


class WordTokenizer:
    """One token a word, so that tests control lengths."""

    def encode(self, text):
        return [2 + sum(word.encode()) % 500 for word in text.split()] + [END_ID]


def make_encoder(seed=0, **kwargs):
    torch.manual_seed(seed)
    return TextEncoder(build_encoder(CONFIG), WordTokenizer(), CONFIG.text_len, **kwargs)


@pytest.fixture(scope="module")
def module():
    torch.manual_seed(0)
    return build_encoder(CONFIG)


@pytest.fixture
def encoder(module):
    return TextEncoder(module, WordTokenizer(), CONFIG.text_len)


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("  a  red\n\tfox ", "a red fox"),
        ("fish &amp;amp; chips", "fish & chips"),
        ("schÃ¶n", "schön"),
        ("“quoted”", '"quoted"'),
        ("a\u00a0b\u3000c", "a b c"),
    ],
)
def test_cleaning_follows_the_reference(text, cleaned):
    assert clean_prompt(text) == cleaned


def test_golden_embeddings_are_reproduced():
    with safe_open(GOLDEN, framework="pt") as file:
        sizes = json.loads(file.metadata()["config"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    config = TextEncoderConfig(
        vocab_size=sizes["vocab"],
        d_model=sizes["dim"],
        d_kv=sizes["dim_attn"] // sizes["num_heads"],
        num_heads=sizes["num_heads"],
        d_ff=sizes["dim_ffn"],
        num_layers=sizes["num_layers"],
        num_buckets=sizes["num_buckets"],
    )
    module = build_encoder(config)
    weights = {k.removeprefix("weights."): t for k, t in tensors.items() if k.startswith("weights.")}
    module.load_state_dict(umt5_to_transformers(weights))
    ids, mask, expected = tensors["ids"], tensors["mask"], tensors["prompt_embeds"]
    with torch.no_grad():
        ours = encode_ids(module, ids, mask, expected.shape[1])
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)

    class Given:
        def encode(self, text):
            row = int(text)
            return ids[row, : int(mask[row].sum())].tolist()

    bucketed = TextEncoder(module, Given(), expected.shape[1]).encode([str(row) for row in range(len(ids))])
    torch.testing.assert_close(torch.cat([e.embeds for e in bucketed]), expected, atol=1e-4, rtol=0)


def test_shape_is_fixed_and_rows_past_the_prompt_are_zero(encoder):
    (embedding,) = encoder.encode(["a red fox"])
    assert embedding.embeds.shape == (1, CONFIG.text_len, CONFIG.d_model)
    assert embedding.embeds[:, :4].abs().amax(-1).gt(0).all()
    assert embedding.embeds[:, 4:].count_nonzero() == 0


def test_an_embedding_does_not_depend_on_its_neighbours(module):
    prompts = ["a", "a red fox", "word " * 20, "many " * 47, "a b c d e"]
    together = TextEncoder(module, WordTokenizer(), CONFIG.text_len).encode(prompts)
    reverse = TextEncoder(module, WordTokenizer(), CONFIG.text_len).encode(prompts[::-1])[::-1]
    for prompt, one, other in zip(prompts, together, reverse, strict=True):
        (alone,) = TextEncoder(module, WordTokenizer(), CONFIG.text_len).encode([prompt])
        assert torch.equal(alone.embeds, one.embeds)
        assert torch.equal(alone.embeds, other.embeds)
        assert alone.key == one.key == other.key


def test_padding_to_the_bucket_changes_only_rounding(module):
    ids = torch.tensor([[5, 6, 7, END_ID]])
    short = encode_ids(module, ids, torch.ones_like(ids), CONFIG.text_len)
    padded = torch.nn.functional.pad(ids, (0, 44))
    full = encode_ids(module, padded, (padded > 0).long(), CONFIG.text_len)
    torch.testing.assert_close(short, full, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("tokens", "length"), [(1, 16), (16, 16), (17, 32), (33, 48), (48, 48)])
def test_padded_length_is_a_bucket(tokens, length):
    assert padded_length(tokens, 48) == length


def test_equal_text_has_equal_key_and_other_weights_have_another(encoder):
    one, same, other = encoder.encode(["a  fox", "a fox", "a dog"])
    assert one.key == same.key != other.key
    assert one is same
    assert make_encoder(seed=1).encode(["a fox"])[0].key != one.key


def test_fingerprint_is_of_the_weights(module):
    before = fingerprint(module)
    torch.manual_seed(0)
    assert fingerprint(build_encoder(CONFIG)) == before
    assert fingerprint(build_encoder(CONFIG).double()) != before


def test_cache_keeps_the_most_recently_used_within_its_bytes(module):
    one = 4 * CONFIG.text_len * CONFIG.d_model
    encoder = TextEncoder(module, WordTokenizer(), CONFIG.text_len, cache_bytes=2 * one)
    a, b = encoder.encode(["a", "b"])
    assert encoder.encode(["a"])[0] is a
    encoder.encode(["c"])
    assert encoder.cached_bytes == 2 * one
    assert encoder.encode(["a"])[0] is a
    again = encoder.encode(["b"])[0]
    assert again is not b
    assert torch.equal(again.embeds, b.embeds)


def test_a_cache_of_no_bytes_keeps_nothing(module):
    encoder = TextEncoder(module, WordTokenizer(), CONFIG.text_len, cache_bytes=0)
    assert encoder.encode(["a"])[0] is not encoder.encode(["a"])[0]
    assert encoder.cached_bytes == 0


@pytest.mark.parametrize("text", ["", " \n\t", "&nbsp;"])
@pytest.mark.parametrize("method", ["encode", "check"])
def test_a_blank_prompt_is_refused(encoder, text, method):
    with pytest.raises(InvalidRequest) as caught:
        getattr(encoder, method)([text])
    assert caught.value.metadata["field"] == "prompts.text"
    assert caught.value.reason == "INVALID_PROMPT"


@pytest.mark.parametrize("method", ["encode", "check"])
def test_an_over_long_prompt_names_its_tokens_and_the_limit(encoder, method):
    getattr(encoder, method)(["w " * 47])
    with pytest.raises(InvalidRequest) as caught:
        getattr(encoder, method)(["w " * 48])
    assert caught.value.metadata["field"] == "prompts.text"
    assert "48 tokens" in caught.value.message
    assert "at most 47" in caught.value.message


def test_a_check_runs_no_encoder(encoder, monkeypatch):
    monkeypatch.setattr(encoder, "_run", lambda _ids: pytest.fail("ran"))
    encoder.check(["a red fox", "snow"])


@pytest.mark.parametrize(
    "text", ["a red fox", "狐狸 läuft 🦊", "\x00\x7f", "A\ud800B".encode(errors="replace").decode()]
)
def test_fragment_tokenizer_accepts_any_text(text):
    tokenizer = FragmentTokenizer()
    ids = tokenizer.encode(text)
    assert ids[-1] == END_ID
    assert all(2 < token < tokenizer.vocab_size for token in ids[:-1])


def test_fragment_tokenizer_loses_nothing_but_case():
    tokenizer = FragmentTokenizer()
    seen = {tuple(tokenizer.encode(text)) for text in ("a fox", "afox", "a  fox", "a fo x", "a foxé", "a foxe")}
    assert len(seen) == 6
    assert tokenizer.encode("A FOX") == tokenizer.encode("a fox")


def test_fragment_tokenizer_fits_the_tiny_preset():
    from causal_forcing.presets import get_preset

    assert FragmentTokenizer().vocab_size <= get_preset("tiny").text_encoder.vocab_size


def write_tokenizer(path, *, with_end):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, "fox": 3, "a": 4}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if with_end:
        tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.enable_padding(length=10)
    tokenizer.enable_truncation(2)
    tokenizer.save(str(path))


@pytest.mark.parametrize("with_end", [True, False])
def test_file_tokenizer_ends_with_the_end_token_unpadded_and_whole(tmp_path, with_end):
    write_tokenizer(tmp_path / "tokenizer.json", with_end=with_end)
    assert FileTokenizer(tmp_path / "tokenizer.json").encode("a fox a bear") == [4, 3, 4, 2, END_ID]


def test_a_file_that_is_not_a_tokenizer_is_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(BadCheckpoint, match="no such"):
        FileTokenizer(path)
    path.write_text("{}")
    with pytest.raises(BadCheckpoint, match="not a tokenizer"):
        FileTokenizer(path)


def test_meta_build_allocates_nothing_and_has_the_manifest_keys():
    manifest = json.loads((GOLDEN.parents[1] / "manifests" / "umt5_xxl_encoder_transformers.json").read_text())
    module = build_encoder(replace(TextEncoderConfig()), "meta")
    assert {k: list(t.shape) for k, t in module.state_dict().items()} == {k: s for k, (_, s) in manifest.items()}
    assert all(parameter.is_meta for parameter in module.parameters())
