"""What travels between processes."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from serve.messages import PRIME_FRAMES, EmbeddingWindow, PackedTensor
from tests.serve.fakes import embedding, latents, update


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tensors_travel_bit_for_bit(dtype: torch.dtype) -> None:
    tensor = torch.randn(1, 16, 3, 4, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    back = pickle.loads(pickle.dumps(PackedTensor.pack(tensor))).unpack()
    assert back.dtype is dtype
    assert torch.equal(back, tensor)


def test_a_received_tensor_can_be_written_though_its_memory_is_shared() -> None:
    packed = latents([1, 2])
    packed.data.flags.writeable = False
    packed.unpack().zero_()
    assert packed.data[0, 0, 0, 0, 0] == 1


def test_latents_are_cut_and_joined_along_time() -> None:
    whole = latents([1, 2, 3])
    joined = PackedTensor.join_frames([whole.frame_slice(0, 1), whole.frame_slice(1, 3)])
    assert np.array_equal(joined.data, whole.data)
    assert whole.frames == 3


def test_the_gateway_keeps_as_many_latents_as_the_slowest_decoder_needs() -> None:
    from causal_forcing.vae import WanVae

    assert PRIME_FRAMES == WanVae.REACH


def test_both_ends_of_a_lease_remember_the_same_embeddings() -> None:
    sender, receiver = EmbeddingWindow(capacity=3), EmbeddingWindow(capacity=3)
    sent = []
    for keys in (["a"], ["b", "c"], ["a"], ["d", "d"], ["b"], ["c", "a"]):
        message = sender.compose(update(), [embedding(key) for key in keys])
        sent.append([new.key for new in message.embeddings])
        assert [e.key for e in receiver.admit(message)] == keys
    assert sent == [["a"], ["b", "c"], [], ["d"], ["b"], ["c"]]
