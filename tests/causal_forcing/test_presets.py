"""The preset table: complete, consistent, and silent about what is not known."""

import pickle
from dataclasses import asdict, replace

import pytest
import torch

from causal_forcing.config import DEFAULT_SHIFT, SessionConfig
from causal_forcing.engine import Engine
from causal_forcing.errors import InvalidRequest
from causal_forcing.presets import PRESETS, CheckpointFile, get_preset
from causal_forcing.prompts import PromptUpdate, WeightedPrompt

DOWNLOADABLE = [preset for preset in PRESETS.values() if preset.files.transformer is not None]


def test_every_checkpoint_of_this_architecture_has_a_preset():
    assert set(PRESETS) == {
        "causal-forcing-framewise",
        "causal-forcing-framewise-2step",
        "causal-forcing-framewise-1step",
        "causal-forcing-chunkwise",
        "self-forcing",
        "longlive",
        "wan-14b",
        "tiny",
    }


@pytest.mark.parametrize("preset", PRESETS.values(), ids=lambda p: p.name)
def test_defaults_are_a_valid_session(preset):
    config = SessionConfig(
        height=preset.height,
        width=preset.width,
        denoising_steps=preset.denoising_steps,
        first_chunk_steps=preset.first_chunk_steps,
        window_frames=preset.window_frames,
        sink_frames=preset.sink_frames,
        sink_rope=preset.sink_rope,
    )
    assert config.window_frames is not None
    assert config.window_frames - config.sink_frames >= preset.chunk_frames
    assert preset.text_encoder.d_model == preset.transformer.text_dim
    assert preset.text_encoder.text_len == preset.transformer.text_len
    assert set(preset.vaes) == ({"wan", "lightvae"} if preset.embedded else {"wan", "lightvae", "tae", "lighttae"})


@pytest.mark.parametrize("preset", PRESETS.values(), ids=lambda p: p.name)
def test_a_preset_crosses_process_boundaries(preset):
    assert pickle.loads(pickle.dumps(preset)) == preset
    assert asdict(preset)["name"] == preset.name


@pytest.mark.parametrize("preset", DOWNLOADABLE, ids=lambda p: p.name)
def test_a_downloadable_preset_names_every_part(preset):
    parts = dict(preset.files)
    assert {"transformer", "text_encoder", "tokenizer", "vae/wan"} <= set(parts)
    assert ("lora" in parts) == (preset.name == "longlive")


def test_plus_plus_presets_take_four_steps_for_the_first_chunk():
    assert get_preset("causal-forcing-framewise-2step").denoising_steps == (1000, 500)
    assert get_preset("causal-forcing-framewise-1step").denoising_steps == (1000,)
    for name in ("causal-forcing-framewise-2step", "causal-forcing-framewise-1step"):
        assert get_preset(name).first_chunk_steps == (1000, 750, 500, 250)


def test_hashes_begin_with_the_independently_published_prefixes():
    prefixes = {
        "causal-forcing-framewise": "70cae8c3",
        "causal-forcing-framewise-2step": "8f899a01",
        "causal-forcing-framewise-1step": "bdb1b475",
        "causal-forcing-chunkwise": "cf75ee5c",
    }
    for name, prefix in prefixes.items():
        file = get_preset(name).files.transformer
        assert file is not None
        assert file.sha256 is not None
        assert file.sha256.startswith(prefix)


def test_only_files_with_a_commit_or_a_hash_count_as_pinned():
    file = CheckpointFile("owner/name", "x.pt")
    assert not file.is_pinned
    assert replace(file, revision="a" * 40).is_pinned
    assert replace(file, sha256="b" * 64).is_pinned


@pytest.mark.parametrize("field", [{"sha256": "70cae8c3"}, {"revision": "main"}, {"sha256": "Z" * 64}])
def test_half_a_hash_is_refused(field):
    with pytest.raises(ValueError, match=r"x\.pt"):
        CheckpointFile("owner/name", "x.pt", **field)


def test_an_unknown_preset_names_the_known_ones():
    with pytest.raises(InvalidRequest) as caught:
        get_preset("sora")
    assert caught.value.metadata["field"] == "preset"
    assert "tiny" in caught.value.message


def test_an_unknown_vae_names_the_known_ones():
    with pytest.raises(InvalidRequest) as caught:
        get_preset("tiny").vae_config("vqgan")
    assert caught.value.metadata["field"] == "vae"
    assert "lightvae" in caught.value.message


@pytest.mark.parametrize(("window", "sink"), [(None, 0), (1, 0), (4, 1), (5, 2), (6, 3), (21, 3)])
def test_the_default_sink_gives_way_to_a_window_that_is_given(window, sink):
    preset = get_preset("longlive")
    assert (preset.sink_frames, preset.chunk_frames) == (3, 3)
    assert preset.session_config(window_frames=window).sink_frames == sink


def test_a_sink_that_is_given_does_not():
    with pytest.raises(InvalidRequest, match=r"^sink_frames: got 1; must be 0 without a window"):
        get_preset("tiny").session_config(window_frames=None, sink_frames=1)


def test_small_pictures_have_a_shift_of_their_own():
    assert {name for name, preset in PRESETS.items() if preset.shift != DEFAULT_SHIFT} == {"tiny"}
    engine = Engine.load(get_preset("tiny"), vae=None)

    def latents(shift):
        session = replace(engine, preset=replace(engine.preset, shift=shift)).new_session(engine.session_config())
        session.update_prompt(PromptUpdate((WeightedPrompt("a red circle"),)))
        return session.generate_chunk().latents

    assert torch.equal(latents(engine.preset.shift), latents(1.0))
    assert not torch.equal(latents(1.0), latents(DEFAULT_SHIFT))
