"""The training pass computes what the cached inference path computes."""

import pytest
import torch

from causal_forcing.config import SinkRope, TransformerConfig
from causal_forcing.flow import CONTEXT_TIMESTEP
from causal_forcing.geometry import Geometry
from causal_forcing.kv_cache import CacheLayout, KeyValueCache
from causal_forcing.rope import RotaryEmbedding
from causal_forcing.training.model import WINDOW_FRAMES
from causal_forcing.training.teacher_forcing import Layout, Prompts, compiled, predict
from causal_forcing.transformer import CausalTransformer, ChunkContext

CONFIG = TransformerConfig(dim=24, ffn_dim=48, num_heads=2, num_layers=3, freq_dim=16, text_dim=8, text_len=5)
GEOMETRY = Geometry(32, 32)
FRAMES = 6


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = CausalTransformer(CONFIG)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def cached_velocities(model, clean, noisy, timesteps, embeds, prompt_of_frame, layout, read_under=None):
    """Velocities of one clip and draw, chunk by chunk, through the cache the sampler uses.

    Clean frames are read under the prompt that they were made under, or all under one.
    """
    device = torch.device("cpu")
    rotary = RotaryEmbedding(CONFIG, GEOMETRY, device)
    sizes = CacheLayout(
        capacity=layout.window or FRAMES,
        sink_frames=layout.sink,
        sink_rope=SinkRope.RELATIVE,
        tokens_per_frame=GEOMETRY.tokens_per_frame,
        evicts=layout.window is not None,
    )
    cache = KeyValueCache(CONFIG, sizes, device=device, dtype=torch.float32)
    texts = [model.read_text(embeds[:, p]) for p in range(embeds.shape[1])]
    velocities = []
    for start in range(0, FRAMES, layout.chunk):
        frames = slice(start, start + layout.chunk)
        plan = cache.plan(layout.chunk)
        rotation = rotary.rotation(range(start, start + layout.chunk))
        sink = cache.sink_positions(plan)
        if sink is not None:
            model.rotate_sink(cache, rotary.rotation(sink))
        context = ChunkContext(cache, plan, rotation, texts[int(prompt_of_frame[0, start])])
        modulation = model.modulate(float(timesteps[0, start]))
        velocities.append(model(noisy[:, :, frames], modulation, context))
        if read_under is not None:
            context = ChunkContext(cache, plan, rotation, texts[read_under])
        model.write_context(clean[:, :, frames], model.modulate(CONTEXT_TIMESTEP), context)
        cache.advance(plan)
    return torch.cat(velocities, dim=2)


@pytest.mark.parametrize(
    "layout",
    [
        Layout(FRAMES, 2),
        Layout(FRAMES, 2, window=3),
        Layout(FRAMES, 2, chunk=3),
        Layout(FRAMES, 2, window=6, chunk=2),
        Layout(FRAMES, 2, window=3, sink=1),
        Layout(FRAMES, 2, window=4, sink=2),
        Layout(FRAMES, 2, window=4, chunk=2, sink=1),
        Layout(FRAMES, 2, window=6, sink=1),
    ],
)
@torch.no_grad()
def test_equals_the_cached_path(model, layout):
    torch.manual_seed(1)
    clean = torch.randn(2, *GEOMETRY.latent_shape(FRAMES)[1:])
    noisy = torch.randn(2, *GEOMETRY.latent_shape(2 * FRAMES)[1:])
    embeds = torch.randn(2, 2, CONFIG.text_len, CONFIG.text_dim)
    prompt_of_frame = torch.tensor([[0, 0, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1]])
    if layout.chunk == 2:
        prompt_of_frame[1] = torch.tensor([0, 0, 1, 1, 1, 1])
    levels = 1000 * torch.rand(2, 2 * FRAMES // layout.chunk)
    timesteps = levels.repeat_interleave(layout.chunk, 1)
    rotary = RotaryEmbedding(CONFIG, GEOMETRY, torch.device("cpu"))
    got = predict(model, clean, noisy, timesteps, Prompts(embeds, prompt_of_frame), layout=layout, rotary=rotary)
    for clip in range(2):
        for draw in range(2):
            own = slice(draw * FRAMES, (draw + 1) * FRAMES)
            one = slice(clip, clip + 1)
            want = cached_velocities(
                model, clean[one], noisy[one, :, own], timesteps[one, own], embeds[one], prompt_of_frame[one], layout
            )
            torch.testing.assert_close(got[one, :, own], want, atol=2e-4, rtol=2e-4)


@torch.no_grad()
def test_equals_the_cached_path_when_the_past_is_read_under_a_new_prompt(model):
    torch.manual_seed(4)
    layout = Layout(FRAMES, 1, window=4)
    clean, noisy = (torch.randn(GEOMETRY.latent_shape(FRAMES)) for _ in range(2))
    embeds = torch.randn(1, 2, CONFIG.text_len, CONFIG.text_dim)
    of_frame = torch.tensor([[0, 0, 0, 1, 1, 1]])
    timesteps = 1000 * torch.rand(1, FRAMES)
    rotary = RotaryEmbedding(CONFIG, GEOMETRY, torch.device("cpu"))
    prompts = Prompts(embeds, of_frame, torch.ones_like(of_frame))
    got = predict(model, clean, noisy, timesteps, prompts, layout=layout, rotary=rotary)
    want = cached_velocities(model, clean, noisy, timesteps, embeds, of_frame, layout, read_under=1)
    torch.testing.assert_close(got, want, atol=2e-4, rtol=2e-4)
    kept = predict(model, clean, noisy, timesteps, Prompts(embeds, of_frame), layout=layout, rotary=rotary)
    assert not torch.allclose(got, kept, atol=1e-2)


@torch.no_grad()
def test_a_noisy_frame_does_not_see_its_own_clean_frame(model):
    torch.manual_seed(2)
    clean = torch.randn(GEOMETRY.latent_shape(FRAMES))
    noisy = torch.randn(GEOMETRY.latent_shape(FRAMES))
    prompts = Prompts(torch.randn(1, 1, CONFIG.text_len, CONFIG.text_dim), torch.zeros(1, FRAMES).long())
    rotary = RotaryEmbedding(CONFIG, GEOMETRY, torch.device("cpu"))
    timesteps = torch.full((1, FRAMES), 500.0)
    before = predict(model, clean, noisy, timesteps, prompts, layout=Layout(FRAMES, 1), rotary=rotary)
    clean[:, :, 3] += 1
    after = predict(model, clean, noisy, timesteps, prompts, layout=Layout(FRAMES, 1), rotary=rotary)
    assert torch.equal(before[:, :, :4], after[:, :, :4])
    assert not torch.allclose(before[:, :, 4:], after[:, :, 4:])


@pytest.mark.parametrize("frames", [3, 16])
@torch.no_grad()
def test_bidirectional_frames_see_all_of_their_draw_and_nothing_else(model, frames):
    torch.manual_seed(5)
    layout = Layout(frames, 2, window=8, bidirectional=True)
    clean, noisy = torch.randn(GEOMETRY.latent_shape(frames)), torch.randn(GEOMETRY.latent_shape(2 * frames))
    prompts = Prompts(torch.randn(1, 1, CONFIG.text_len, CONFIG.text_dim), torch.zeros(1, frames).long())
    rotary = RotaryEmbedding(CONFIG, GEOMETRY, torch.device("cpu"))
    timesteps = torch.full((1, 2 * frames), 500.0)

    def velocities():
        return predict(model, clean, noisy, timesteps, prompts, layout=layout, rotary=rotary)

    before = velocities()
    clean += 1
    assert torch.equal(before, velocities())
    noisy[:, :, frames - 1] += 1
    after = velocities()
    assert not torch.allclose(before[:, :, 0], after[:, :, 0])
    assert torch.equal(before[:, :, frames:], after[:, :, frames:])


def test_smaller_windows_have_the_same_shapes_and_see_less():
    whole, small = Layout(16, 1, window=WINDOW_FRAMES), Layout(16, 1, window=3)
    before = WINDOW_FRAMES - 1
    assert small.past().shape == whole.past().shape == (16, before)
    assert whole.past()[before:].all()
    assert whole.past().sum(1)[:before].tolist() == [*range(before)]
    assert small.past().sum(1).tolist() == [0, 1] + [2] * 14
    assert small.past()[2:, -2:].all()
    chunked = Layout(12, 1, window=9, chunk=3)
    assert chunked.past().sum(1).tolist() == [0, 3, 6, 6]


def test_the_sink_takes_the_place_of_the_oldest_frames_once_they_are_evicted():
    layout = Layout(16, 1, window=9, sink=2)
    sink, rolling = layout.past().split([2, 8], dim=1)
    assert sink.any(1).tolist() == [False] * 9 + [True] * 7
    assert rolling.sum(1).tolist() == [*range(9)] + [6] * 7
    assert layout.sink_positions()[-2:] == [7, 8]


@torch.no_grad()
def test_draws_do_not_see_each_other(model):
    torch.manual_seed(3)
    clean = torch.randn(GEOMETRY.latent_shape(3))
    noisy = torch.randn(GEOMETRY.latent_shape(6))
    prompts = Prompts(torch.randn(1, 1, CONFIG.text_len, CONFIG.text_dim), torch.zeros(1, 3).long())
    rotary = RotaryEmbedding(CONFIG, GEOMETRY, torch.device("cpu"))
    timesteps = torch.full((1, 6), 500.0)
    before = predict(model, clean, noisy, timesteps, prompts, layout=Layout(3, 2), rotary=rotary)
    noisy[:, :, 3:] += 1
    after = predict(model, clean, noisy, timesteps, prompts, layout=Layout(3, 2), rotary=rotary)
    assert torch.equal(before[:, :, :3], after[:, :, :3])
    assert not torch.allclose(before[:, :, 3:], after[:, :, 3:])


@pytest.fixture
def _two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.usefixtures("_two_threads")
def test_the_compiled_pass_has_the_same_gradients(model):
    """Compiled to C++, and big enough for two threads, which once lost what both added to the gradient of one frame."""
    torch.manual_seed(6)
    geometry, frames, layout = Geometry(64, 64), 16, Layout(16, 3, window=9, sink=1)
    clean = torch.randn(2, *geometry.latent_shape(frames)[1:])
    noisy = torch.randn(2, *geometry.latent_shape(layout.draws * frames)[1:])
    embeds = torch.randn(2, 1, CONFIG.text_len, CONFIG.text_dim)
    prompts = Prompts(embeds, torch.zeros(2, frames).long())
    timesteps = torch.full((2, layout.draws * frames), 500.0)
    rotary = RotaryEmbedding(CONFIG, geometry, torch.device("cpu"))
    gradients = []
    for block_pass in (None, compiled()):
        model.zero_grad()
        velocities = predict(
            model, clean, noisy, timesteps, prompts, layout=layout, rotary=rotary, block_pass=block_pass
        )
        velocities.square().mean().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max(), msg=name)
