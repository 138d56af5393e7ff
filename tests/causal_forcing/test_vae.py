"""What every streaming autoencoder must satisfy, from oracles: no expected numbers here."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from causal_forcing.config import TinyVaeConfig, VaeConfig
from causal_forcing.errors import InvalidRequest, SessionStateError
from causal_forcing.geometry import Geometry, pixel_frames
from causal_forcing.vae import StreamingVae, TinyVae, WanVae, layers

GEOMETRY = Geometry(32, 48)
BUILDERS = {
    "wan": lambda: WanVae(VaeConfig(base_dim=4)),
    "lightvae": lambda: WanVae(VaeConfig(base_dim=2)),
    "one_block": lambda: WanVae(VaeConfig(base_dim=4, num_res_blocks=1)),
    "tae": lambda: TinyVae(TinyVaeConfig(channels=(16, 12, 8, 8))),
    "lighttae": lambda: TinyVae(TinyVaeConfig(channels=(8, 8, 4, 4), takes_normalised_latents=False)),
}


def build(kind: str) -> StreamingVae:
    torch.manual_seed(0)
    vae = BUILDERS[kind]().requires_grad_(False)
    for parameter in vae.parameters():
        parameter.mul_(1.5)  # so that the deep layers of small random models have something to say
    return vae


@pytest.fixture(params=[pytest.param(None, id="grouped"), pytest.param(0, id="frame_by_frame")])
def group_bytes(request, monkeypatch):
    """Both ways to run a layer: several frames at once, as with small frames, or one by one, as with large ones."""
    if request.param is not None:
        monkeypatch.setattr(layers, "_GROUP_BYTES", request.param)


@pytest.fixture(params=["wan", "tae"])
def vae(request):
    return build(request.param)


def random_latents(frames, seed=1):
    return torch.randn(GEOMETRY.latent_shape(frames), generator=torch.Generator().manual_seed(seed))


def random_video(frames, seed=2):
    return torch.rand(1, 3, frames, 32, 48, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def decode_in(vae, latents, split, state=None) -> Tensor:
    state = vae.new_decoder_state(GEOMETRY) if state is None else state
    return torch.cat([vae.decode_unclamped(part, state) for part in torch.split(latents, split, dim=2)], dim=2)


def encode_in(vae, video, split) -> Tensor:
    state = vae.new_encoder_state(GEOMETRY)
    return torch.cat([vae.encode(part, state) for part in torch.split(video, split, dim=2)], dim=2)


def same_state(one, other):
    mine, theirs = one.tensors(), other.tensors()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.usefixtures("group_bytes")
@pytest.mark.parametrize("kind", list(BUILDERS))
def test_any_split_of_latents_gives_the_same_bits(kind):
    vae, latents = build(kind), random_latents(5)
    whole = decode_in(vae, latents, [5])
    assert whole.shape == (1, 3, pixel_frames(5, first=True), 32, 48)
    assert whole.std() > 1e-3
    for split in ([1] * 5, [2, 1, 2], [1, 4]):
        assert torch.equal(decode_in(vae, latents, split), whole), split


@pytest.mark.usefixtures("group_bytes")
@pytest.mark.parametrize("kind", list(BUILDERS))
def test_any_split_of_video_gives_the_same_bits(kind):
    vae, video = build(kind), random_video(13)
    whole = vae.encode(video)
    assert whole.shape == GEOMETRY.latent_shape(4)
    assert torch.equal(encode_in(vae, video, [1, 4, 4, 4]), whole)
    assert torch.equal(encode_in(vae, video, [5, 8]), whole)


def test_later_latents_never_change_earlier_frames(vae):
    latents = random_latents(4)
    changed = latents.clone()
    changed[:, :, 3] = float("nan")
    known = pixel_frames(3, first=True)
    assert torch.equal(decode_in(vae, changed, [4])[:, :, :known], decode_in(vae, latents, [4])[:, :, :known])


def test_earlier_latents_change_later_frames(vae):
    latents = random_latents(4)
    changed = latents.clone()
    changed[:, :, 1] += 1
    assert not torch.equal(decode_in(vae, changed, [4])[:, :, -1], decode_in(vae, latents, [4])[:, :, -1])


def test_later_video_never_changes_earlier_latents(vae):
    video = random_video(9)
    assert torch.equal(vae.encode(video)[:, :, :2], vae.encode(video[:, :, :5]))


def test_interleaved_sessions_do_not_see_each_other(vae):
    first, second = random_latents(3, seed=3), random_latents(3, seed=4)
    alone = decode_in(vae, first, [1] * 3), decode_in(vae, second, [1] * 3)
    states = vae.new_decoder_state(GEOMETRY), vae.new_decoder_state(GEOMETRY)
    frames = ([], [])
    for index in range(3):
        for side, latents in enumerate((first, second)):
            frames[side].append(vae.decode_unclamped(latents[:, :, index : index + 1], states[side]))
    assert torch.equal(torch.cat(frames[0], 2), alone[0])
    assert torch.equal(torch.cat(frames[1], 2), alone[1])


def test_reset_equals_fresh(vae):
    latents = random_latents(3)
    state = vae.new_decoder_state(GEOMETRY)
    expected = decode_in(vae, latents, [3], state)
    assert state.frames_decoded == 3
    addresses = [buffer.data_ptr() for buffer in state.buffers.values()]
    state.reset()
    assert same_state(state, vae.new_decoder_state(GEOMETRY))
    assert torch.equal(decode_in(vae, latents, [3], state), expected)
    assert [buffer.data_ptr() for buffer in state.buffers.values()] == addresses


def test_clone_and_saved_tensors_continue_bit_for_bit(vae):
    latents = random_latents(4)
    state = vae.new_decoder_state(GEOMETRY)
    decode_in(vae, latents[:, :, :2], [2], state)
    copy = state.clone()
    saved = {name: tensor.clone() for name, tensor in state.tensors().items()}
    expected = decode_in(vae, latents[:, :, 2:], [2], state)
    restored = vae.new_decoder_state(GEOMETRY)
    restored.load_tensors(saved)
    assert same_state(copy, restored)
    assert torch.equal(decode_in(vae, latents[:, :, 2:], [2], copy), expected)
    assert torch.equal(decode_in(vae, latents[:, :, 2:], [2], restored), expected)


def test_encoder_state_continues_bit_for_bit(vae):
    video = random_video(9)
    state = vae.new_encoder_state(GEOMETRY)
    vae.encode(video[:, :, :5], state)
    assert state.frames_encoded == 2
    restored = vae.new_encoder_state(GEOMETRY)
    restored.load_tensors(state.clone().tensors())
    assert torch.equal(vae.encode(video[:, :, 5:], restored), vae.encode(video)[:, :, 2:])


def test_an_image_is_the_first_latent_of_its_video(vae):
    video = random_video(5)
    assert torch.equal(vae.encode(video[:, :, :1]), vae.encode(video)[:, :, :1])


def test_decode_limits_the_range():
    vae = build("wan")
    latents = 40 * random_latents(2)
    wide = vae.decode_unclamped(latents, vae.new_decoder_state(GEOMETRY))
    clamped = vae.decode(latents, vae.new_decoder_state(GEOMETRY))
    assert wide.abs().max() > 1
    assert torch.equal(clamped, wide.clamp(-1, 1))
    assert clamped.dtype == torch.float32


@pytest.mark.parametrize("kind", ["wan", "tae"])
def test_frames_one_by_one_equal_frames_together(kind, monkeypatch):
    vae, latents, video = build(kind), random_latents(3), random_video(9)
    together = decode_in(vae, latents, [3]), vae.encode(video)
    monkeypatch.setattr(layers, "_GROUP_BYTES", 0)
    torch.testing.assert_close(decode_in(vae, latents, [3]), together[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(vae.encode(video), together[1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["wan", "tae"])
def test_priming_with_the_reach_is_exact_and_with_less_is_not(kind):
    geometry = Geometry(16, 16)
    torch.manual_seed(0)
    vae = BUILDERS[kind]()
    reach = vae.REACH
    latents = torch.randn(geometry.latent_shape(reach + 4))
    state = vae.new_decoder_state(geometry)
    expected = vae.decode_unclamped(latents, state)[:, :, -4:]

    def primed(count):
        fresh = vae.new_decoder_state(geometry)
        vae.decode_unclamped(latents[:, :, -1 - count : -1], fresh)
        return vae.decode_unclamped(latents[:, :, -1:], fresh)

    assert torch.equal(primed(reach), expected)
    assert not torch.equal(primed(reach - 1), expected)


class TestFailures:
    def test_a_decode_that_breaks_off_marks_the_state(self, monkeypatch):
        vae, latents = build("wan"), random_latents(2)
        state = vae.new_decoder_state(GEOMETRY)
        saved = state.clone().tensors()

        def fail(*_):
            raise RuntimeError("device lost")

        with monkeypatch.context() as patch:
            patch.setattr(vae.decoder.head["2"], "forward", fail)
            with pytest.raises(RuntimeError, match="device lost"):
                vae.decode(latents, state)
        for use in (lambda: vae.decode(latents, state), state.tensors):
            with pytest.raises(SessionStateError, match="reset the state") as caught:
                use()
            assert caught.value.reason == "DECODER_STATE_FAILED"
        assert state.clone().failed
        expected = vae.decode(latents, vae.new_decoder_state(GEOMETRY))
        state.load_tensors(saved)
        assert torch.equal(vae.decode(latents, state), expected)
        state.failed = True
        state.reset()
        assert torch.equal(vae.decode(latents, state), expected)

    def test_an_encode_that_breaks_off_marks_the_state(self, monkeypatch):
        vae, video = build("tae"), random_video(5)
        state = vae.new_encoder_state(GEOMETRY)
        with monkeypatch.context() as patch:
            patch.setattr(vae.encoder["13"], "forward", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                vae.encode(video, state)
        with pytest.raises(SessionStateError) as caught:
            vae.encode(video, state)
        assert caught.value.reason == "ENCODER_STATE_FAILED"

    @pytest.mark.parametrize(
        "shape", [(1, 16, 0, 4, 6), (1, 16, 1, 6, 4), (2, 16, 1, 4, 6), (1, 8, 1, 4, 6), (16, 4, 6)]
    )
    def test_latents_of_another_shape_are_refused_and_change_nothing(self, vae, shape):
        state = vae.new_decoder_state(GEOMETRY)
        vae.decode(random_latents(1), state)
        before = state.clone()
        with pytest.raises(ValueError, match=r"must be \[1, 16, 1, 4, 6\]"):
            vae.decode(torch.zeros(shape), state)
        assert same_state(state, before)

    @pytest.mark.parametrize(
        ("shape", "message"),
        [
            ((1, 3, 4, 32, 48), "4 frames'; must be 1 frame plus a multiple of 4"),
            ((1, 3, 0, 32, 48), "0 frames"),
            ((1, 3, 1, 32, 50), "width: got 50; must be a positive multiple of 16"),
            ((1, 4, 1, 32, 48), r"video: got \[1, 4, 1, 32, 48\]; must have the shape \[1, 3, frames"),
            ((3, 32, 48), r"must have the shape \[1, 3, frames, height, width\]"),
        ],
    )
    def test_a_video_of_another_shape_is_an_invalid_request(self, vae, shape, message):
        with pytest.raises(InvalidRequest, match=message):
            vae.encode(torch.zeros(shape))

    def test_a_stream_goes_on_in_fours_and_keeps_its_size(self):
        vae = build("wan")
        state = vae.new_encoder_state(GEOMETRY)
        vae.encode(random_video(1), state)
        with pytest.raises(InvalidRequest, match="5 frames'; must be a multiple of 4"):
            vae.encode(random_video(5), state)
        with pytest.raises(InvalidRequest, match="'48x32'; must be 32x48"):
            vae.encode(torch.zeros(1, 3, 4, 48, 32), state)
        assert not state.failed

    def test_a_state_of_another_dtype_is_a_programmers_mistake(self):
        vae = build("wan")
        with pytest.raises(ValueError, match=r"torch\.bfloat16 on cpu"):
            vae.decode(random_latents(1), vae.new_decoder_state(GEOMETRY, dtype=torch.bfloat16))

    @pytest.mark.parametrize("change", ["missing", "unknown", "shape", "dtype"])
    def test_saved_tensors_that_do_not_fit_change_nothing(self, change):
        vae = build("tae")
        state = vae.new_decoder_state(GEOMETRY)
        vae.decode(random_latents(2), state)
        saved, before = state.clone().tensors(), state.clone()
        name = "decoder.9"
        if change == "missing":
            del saved[name]
        elif change == "unknown":
            saved["decoder.99"] = saved[name]
        elif change == "shape":
            saved[name] = saved[name][:, 1:]
        else:
            saved[name] = saved[name].double()
        with pytest.raises(SessionStateError, match=r"decoder\.9") as caught:
            state.load_tensors(saved)
        assert caught.value.reason == "STATE_MISMATCH"
        assert same_state(state, before)


def test_a_state_made_under_inference_mode_is_of_use_outside_it():
    vae, latents = build("wan"), random_latents(2)
    with torch.inference_mode():
        state = vae.new_decoder_state(GEOMETRY).clone()
        frames = [vae.decode_unclamped(latents[:, :, :1], state)]
    frames.append(vae.decode_unclamped(latents[:, :, 1:], state))
    state.reset()
    assert torch.equal(torch.cat(frames, 2), decode_in(vae, latents, [2]))
