"""Every model this engine runs, by name, as one table.

A preset says what the weights are (sizes that a checkpoint fixes), how the model was trained to be sampled (chunk,
steps, window), and where the files come from. What one user asks for is a
:class:`~causal_forcing.config.SessionConfig`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from causal_forcing.config import (
    DEFAULT_SHIFT,
    DEFAULT_STEPS,
    SessionConfig,
    SinkRope,
    TextEncoderConfig,
    TinyVaeConfig,
    TransformerConfig,
    VaeConfig,
)
from causal_forcing.errors import InvalidRequest

UNKNOWN_LICENCE = "not stated here: see the repository's model card"
"""Written where no licence could be checked."""

_SHA256 = re.compile(r"[0-9a-f]{64}")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class CheckpointFile:
    """One file of a public repository.

    What is not known is None, never guessed. A file is *pinned* when its contents cannot change without being noticed:
    its repository commit or its hash is known.

    Attributes:
        repo: Hugging Face repository, ``owner/name``.
        path: Path of the file inside it.
        revision: Full commit hash of the repository, or None when it is not known.
        size_bytes: Size in bytes, or None when it is not known.
        sha256: Full SHA-256 of the contents in hex, or None when it is not known.
        licence: Licence of the file.
    """

    repo: str
    path: str
    revision: str | None = None
    size_bytes: int | None = None
    sha256: str | None = None
    licence: str = UNKNOWN_LICENCE

    def __post_init__(self) -> None:
        if self.sha256 is not None and not _SHA256.fullmatch(self.sha256):
            raise ValueError(f"{self.path}: sha256 must be 64 lower-case hex digits, got {self.sha256!r}")
        if self.revision is not None and not _COMMIT.fullmatch(self.revision):
            raise ValueError(f"{self.path}: revision must be a full commit hash, got {self.revision!r}")

    @property
    def is_pinned(self) -> bool:
        """Whether a changed file would be noticed."""
        return self.revision is not None or self.sha256 is not None


@dataclass(frozen=True)
class PresetFiles:
    """The files of one preset, by part; None or absent where there is none to download.

    Attributes:
        transformer: The generator's weights.
        lora: Low-rank update that is merged into the generator at load.
        text_encoder: UMT5 encoder weights.
        tokenizer: ``tokenizer.json`` of the text encoder.
        vaes: VAE weights by type (``wan``, ``lightvae``, ``tae``, ``lighttae``).
    """

    transformer: CheckpointFile | None = None
    lora: CheckpointFile | None = None
    text_encoder: CheckpointFile | None = None
    tokenizer: CheckpointFile | None = None
    vaes: Mapping[str, CheckpointFile] = field(default_factory=dict)

    def __iter__(self) -> Iterator[tuple[str, CheckpointFile]]:
        """Iterate over ``(part, file)``; VAE parts are named ``vae/TYPE``."""
        for part in ("transformer", "lora", "text_encoder", "tokenizer"):
            file = getattr(self, part)
            if file is not None:
                yield part, file
        for vae, file in self.vaes.items():
            yield f"vae/{vae}", file


@dataclass(frozen=True)
class Preset:
    """One model: architecture, sampling defaults, files.

    Attributes:
        name: What users call it.
        summary: One line for people.
        transformer: Sizes of the generator.
        text_encoder: Sizes of the text encoder.
        vaes: Sizes of each VAE type that decodes this model's latents.
        chunk_frames: Latent frames generated at a time.
        denoising_steps: Default steps before warping.
        first_chunk_steps: Steps of the first chunk of a scene, or None for the same.
        shift: Timestep shift by which steps are warped. Small pictures want a small one (Esser et al. 2024, section
            5.3.2: it grows with the square root of the number of tokens).
        window_frames: Default attention window in latent frames.
        sink_frames: Default number of latent frames that are never evicted.
        sink_rope: Default place of the sink's keys.
        height: Native pixel rows.
        width: Native pixel columns.
        files: Where the weights come from; empty for a model that is embedded or that has no public files.
        checkpoint_key: Top-level entry of the generator's checkpoint to take, e.g. ``generator_ema``; None takes the
            first of the known ones.
        licence: Of the generator's weights.
        embedded: Whether the model ships with this package and needs no download.
        trained: Whether the weights were trained; False means seeded random weights, and every output says so.
    """

    name: str
    summary: str
    transformer: TransformerConfig
    text_encoder: TextEncoderConfig
    vaes: Mapping[str, VaeConfig | TinyVaeConfig]
    chunk_frames: int
    denoising_steps: tuple[int, ...] = DEFAULT_STEPS
    first_chunk_steps: tuple[int, ...] | None = None
    shift: float = DEFAULT_SHIFT
    window_frames: int = 21
    sink_frames: int = 0
    sink_rope: SinkRope = SinkRope.RELATIVE
    height: int = 480
    width: int = 832
    files: PresetFiles = PresetFiles()
    checkpoint_key: str | None = None
    licence: str = UNKNOWN_LICENCE
    embedded: bool = False
    trained: bool = True

    def vae_config(self, vae: str) -> VaeConfig | TinyVaeConfig:
        """Return the sizes of a VAE type.

        Raises:
            InvalidRequest: If this model has no such VAE (field ``vae``).
        """
        if vae not in self.vaes:
            raise InvalidRequest("vae", vae, f"preset {self.name} has {', '.join(self.vaes)}", reason="UNKNOWN_VAE")
        return self.vaes[vae]

    def session_config(self, **overrides: object) -> SessionConfig:
        """Return the defaults of a session of this model with some fields replaced.

        Steps that are given apply to the first chunk as well, unless its steps are given, too. The preset's sink gives
        way to a window that is given: it leaves room for a chunk, and without a window there is none.

        Raises:
            InvalidRequest: If a value is not allowed.
        """
        window = overrides.get("window_frames", self.window_frames)
        room = window - self.chunk_frames if isinstance(window, int) else 0
        defaults: dict[str, Any] = {
            "height": self.height,
            "width": self.width,
            "denoising_steps": self.denoising_steps,
            "first_chunk_steps": None if "denoising_steps" in overrides else self.first_chunk_steps,
            "window_frames": self.window_frames,
            "sink_frames": max(0, min(self.sink_frames, room)),
            "sink_rope": self.sink_rope,
        }
        return SessionConfig(**(defaults | overrides))


WAN_1_3B = TransformerConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30)
"""Wan2.1-T2V-1.3B. Source: Wan-AI/Wan2.1-T2V-1.3B config.json."""

WAN_14B = TransformerConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)
"""Wan2.1-T2V-14B. Source: Wan-AI/Wan2.1-T2V-14B config.json."""

UMT5_XXL = TextEncoderConfig()
"""google/umt5-xxl encoder."""

WAN_VAES: Mapping[str, VaeConfig | TinyVaeConfig] = {
    "wan": VaeConfig(base_dim=96),
    "lightvae": VaeConfig(base_dim=24),
    "tae": TinyVaeConfig(),
    "lighttae": TinyVaeConfig(takes_normalised_latents=False),
}
"""VAEs that decode Wan2.1 latents."""

# Commits, sizes and hashes. Source: hiroki-abe-58/ComfyUI-CausalForcing@3cd80af:runtime/cf_doctor.py (Hugging Face LFS
# records; the eight-digit prefixes agree with a second record) and docs/SETUP.md.
_CAUSAL_FORCING_COMMIT = "2f8eb8bb6eeb1238da9d13e5420d342a74d634a6"
_WAN_COMMIT = "37ec512624d61f7aa208f7ea8140a131f93afc9a"


def _causal_forcing(path: str, size_bytes: int, sha256: str) -> CheckpointFile:
    return CheckpointFile("zhuhz22/Causal-Forcing", path, _CAUSAL_FORCING_COMMIT, size_bytes, sha256, "Apache-2.0")


def _wan(path: str, size_bytes: int, sha256: str) -> CheckpointFile:
    return CheckpointFile("Wan-AI/Wan2.1-T2V-1.3B", path, _WAN_COMMIT, size_bytes, sha256, "Apache-2.0")


_TEXT_ENCODER = _wan(
    "models_t5_umt5-xxl-enc-bf16.pth",
    11_361_920_418,
    "7cace0da2b446bbbbc57d031ab6cf163a3d59b366da94e5afe36745b746fd81d",
)
_TOKENIZER = _wan(
    "google/umt5-xxl/tokenizer.json",
    16_837_417,
    "6e197b4d3dbd71da14b4eb255f4fa91c9c1f2068b20a2de2472967ca3d22602b",
)
_VAE_FILES = {
    "wan": _wan("Wan2.1_VAE.pth", 507_609_880, "38071ab59bd94681c686fa51d75a1968f64e470262043be31f7a094e442fd981"),
    # No commit, size or hash of these three is known. Source of the licence: daydreamlive/Autoencoders, a mirror.
    "lightvae": CheckpointFile("lightx2v/Autoencoders", "lightvaew2_1.pth", licence="Apache-2.0"),
    "tae": CheckpointFile("lightx2v/Autoencoders", "taew2_1.pth", licence="Apache-2.0 (taehv: MIT)"),
    "lighttae": CheckpointFile("lightx2v/Autoencoders", "lighttaew2_1.pth", licence="Apache-2.0"),
}


def _files(transformer: CheckpointFile, lora: CheckpointFile | None = None) -> PresetFiles:
    return PresetFiles(transformer, lora, _TEXT_ENCODER, _TOKENIZER, _VAE_FILES)


def _embedded_vae(base_dim: int, num_res_blocks: int) -> VaeConfig:
    """Return a VAE of the embedded model; its latents' statistics were measured by the training (``training.json``)."""
    trained = json.loads((Path(__file__).parent / "assets" / "tiny" / "training.json").read_text())
    return VaeConfig(
        base_dim=base_dim,
        num_res_blocks=num_res_blocks,
        latent_mean=tuple(trained["mean"]),
        latent_std=tuple(trained["std"]),
    )


_TABLE = (
    Preset(
        name="causal-forcing-framewise",
        summary="Causal Forcing, one latent frame at a time, 4 steps; text and image to video",
        transformer=WAN_1_3B,
        text_encoder=UMT5_XXL,
        vaes=WAN_VAES,
        chunk_frames=1,
        files=_files(
            _causal_forcing(
                "framewise/causal_forcing.pt",
                5_676_220_819,
                "70cae8c3b0b7191fa9840b4f6fe8655ba0cf5c6520c87ba85a46b861c3735cd3",
            )
        ),
        checkpoint_key="generator_ema",
        licence="Apache-2.0",
    ),
    Preset(
        name="causal-forcing-framewise-2step",
        summary="Causal Forcing++, one latent frame at a time, 2 steps (first chunk 4)",
        transformer=WAN_1_3B,
        text_encoder=UMT5_XXL,
        vaes=WAN_VAES,
        chunk_frames=1,
        denoising_steps=(1000, 500),
        first_chunk_steps=DEFAULT_STEPS,
        files=_files(
            _causal_forcing(
                "causal-forcing++/framewise-2step.pt",
                5_676_220_819,
                "8f899a016dffb9539788fac82c6200e43ef6e23b6e61ec6b885bb507a760ce42",
            )
        ),
        checkpoint_key="generator_ema",
        licence="Apache-2.0",
    ),
    Preset(
        name="causal-forcing-framewise-1step",
        summary="Causal Forcing++, one latent frame at a time, 1 step (first chunk 4)",
        transformer=WAN_1_3B,
        text_encoder=UMT5_XXL,
        vaes=WAN_VAES,
        chunk_frames=1,
        denoising_steps=(1000,),
        first_chunk_steps=DEFAULT_STEPS,
        files=_files(
            _causal_forcing(
                "causal-forcing++/framewise-1step.pt",
                5_676_220_819,
                "bdb1b475fc88d528f510158a0990cd457f02c661b527ceb11ca9e4728533e2d0",
            )
        ),
        checkpoint_key="generator_ema",
        licence="Apache-2.0",
    ),
    Preset(
        name="causal-forcing-chunkwise",
        summary="Causal Forcing, three latent frames at a time, 4 steps",
        transformer=WAN_1_3B,
        text_encoder=UMT5_XXL,
        vaes=WAN_VAES,
        chunk_frames=3,
        files=_files(
            _causal_forcing(
                "chunkwise/causal_forcing.pt",
                5_676_282_643,
                "cf75ee5cc6f4e2e336c59c973f5544655d8f0aa481761efe6de1b9cb2eb0cd9d",
            )
        ),
        checkpoint_key="generator",
        licence="Apache-2.0",
    ),
    Preset(
        name="self-forcing",
        summary="Self-Forcing (DMD), three latent frames at a time, 4 steps",
        transformer=WAN_1_3B,
        text_encoder=UMT5_XXL,
        vaes=WAN_VAES,
        chunk_frames=3,
        files=_files(
            # Source: a public runtime check for Self-Forcing that pins this file (Hugging Face LFS record).
            CheckpointFile(
                "gdhe17/Self-Forcing",
                "checkpoints/self_forcing_dmd.pt",
                "2f8b779212da279d212c22a509b66ad6552f350e",
                5_676_252_553,
                "a0413986d9734e02c09504e1520f5697ba6df731bb2f0f35577485e9cc8f56a3",
            )
        ),
        checkpoint_key="generator_ema",
    ),
    Preset(
        name="longlive",
        summary="LongLive 1.0, three latent frames at a time, 4 steps, window 12 with a sink of 3, merged LoRA",
        transformer=WAN_1_3B,
        text_encoder=UMT5_XXL,
        vaes=WAN_VAES,
        chunk_frames=3,
        window_frames=12,
        sink_frames=3,
        # Sizes from one public listing of a download; no commit and no hash is known.
        files=_files(
            CheckpointFile("Efficient-Large-Model/LongLive-1.3B", "models/longlive_base.pt", size_bytes=5_676_334_208),
            CheckpointFile("Efficient-Large-Model/LongLive-1.3B", "models/lora.pt", size_bytes=2_800_056_690),
        ),
        checkpoint_key="generator",
    ),
    Preset(
        name="wan-14b",
        summary="Sizes of Wan2.1-T2V-14B for causal checkpoints of your own; has no files to download",
        transformer=WAN_14B,
        text_encoder=UMT5_XXL,
        vaes=WAN_VAES,
        chunk_frames=3,
        files=PresetFiles(text_encoder=_TEXT_ENCODER, tokenizer=_TOKENIZER, vaes=_VAE_FILES),
    ),
    Preset(
        name="tiny",
        summary="The embedded model: the same classes at sizes that two CPU cores run in real time",
        transformer=TransformerConfig(
            dim=192, ffn_dim=640, num_heads=6, num_layers=6, freq_dim=256, text_dim=128, text_len=64
        ),
        text_encoder=TextEncoderConfig(
            vocab_size=512, d_model=128, d_kv=32, num_heads=4, d_ff=256, num_layers=2, text_len=64
        ),
        vaes={
            "wan": _embedded_vae(16, 1),
            "lightvae": _embedded_vae(4, 2),
        },
        chunk_frames=1,
        first_chunk_steps=(1000, 917, 833, 750, 667, 583, 500, 417, 333, 250, 167, 83),
        shift=1.0,
        window_frames=9,
        sink_frames=1,
        height=64,
        width=64,
        licence="Apache-2.0",
        embedded=True,
    ),
)

PRESETS: Mapping[str, Preset] = MappingProxyType({preset.name: preset for preset in _TABLE})
"""All presets by name."""


def get_preset(name: str) -> Preset:
    """Return the preset of that name.

    Raises:
        InvalidRequest: If there is none (field ``preset``).
    """
    if name not in PRESETS:
        raise InvalidRequest("preset", name, f"must be one of {', '.join(PRESETS)}", reason="UNKNOWN_PRESET")
    return PRESETS[name]
