"""The parameters, as Scope's settings panel shows them."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from scope.core.pipelines.base_schema import BasePipelineConfig, ModeDefaults, ui_field_config

from causal_forcing.version import __version__

VaeType = Literal["wan", "lightvae", "tae", "lighttae"]
PolicyName = Literal["cross_attention", "recache", "flush", "scene_cut"]


class CausalForcingConfig(BasePipelineConfig):  # type: ignore[misc]  # Scope is not installed where types are checked
    """Parameters of the pipeline ``causal-forcing``; those marked as load parameters hold until it is loaded again."""

    pipeline_id: ClassVar[str] = "causal-forcing"
    pipeline_name: ClassVar[str] = "Causal Forcing"
    pipeline_description: ClassVar[str] = (
        "Endless, promptable video from Causal Forcing (Wan2.1 1.3B, four steps, frame by frame), on this machine's "
        "GPU or on a Causal Forcing server."
    )
    pipeline_version: ClassVar[str] = __version__
    docs_url: ClassVar[str | None] = "https://github.com/thu-ml/Causal-Forcing"
    estimated_vram_gb: ClassVar[float | None] = None  # with a server, none is needed; memory is checked when loading
    supports_lora: ClassVar[bool] = True
    supports_cache_management: ClassVar[bool] = True
    supports_quantization: ClassVar[bool] = True
    min_dimension: ClassVar[int] = 16
    inputs: ClassVar[list[str]] = []
    modes: ClassVar[dict[str, ModeDefaults]] = {"text": ModeDefaults(default=True)}
    default_temporal_interpolation_method: ClassVar[Literal["linear", "slerp"] | None] = "linear"
    default_temporal_interpolation_steps: ClassVar[int | None] = 4

    server: str = Field(
        default="",
        description="host:port of a Causal Forcing server that generates; empty generates in this process",
        json_schema_extra=ui_field_config(order=1, is_load_param=True, label="Server"),
    )
    preset: str = Field(
        default="causal-forcing-framewise",
        description="Model to run in this process (see `causal-forcing download --help`)",
        json_schema_extra=ui_field_config(order=2, is_load_param=True, label="Model"),
    )
    vae_type: VaeType = Field(
        default="wan",
        description="Decoder: wan is the original, lightvae is pruned by 75 %, tae and lighttae are tiny autoencoders",
        json_schema_extra=ui_field_config(order=3, is_load_param=True, label="VAE"),
    )
    height: int = Field(
        default=480,
        ge=16,
        description="Frame height in pixels, a multiple of 16",
        json_schema_extra=ui_field_config(order=4, component="resolution", is_load_param=True),
    )
    width: int = Field(
        default=832,
        ge=16,
        description="Frame width in pixels, a multiple of 16",
        json_schema_extra=ui_field_config(order=4, component="resolution", is_load_param=True),
    )
    base_seed: int = Field(
        default=42,
        ge=0,
        description="Source of all noise",
        json_schema_extra=ui_field_config(order=5, is_load_param=True, label="Seed"),
    )
    manage_cache: bool = Field(
        default=True,
        description="Begin again at once when the steps change, rather than at the next reset",
        json_schema_extra=ui_field_config(order=6, component="cache", is_load_param=False),
    )
    denoising_steps: list[int] = Field(
        default=[1000, 750, 500, 250],
        description="Timesteps of the denoising, descending; fewer are faster",
        json_schema_extra=ui_field_config(order=7, component="denoising_steps", is_load_param=True),
    )
    quantization: Literal["fp8_e4m3fn"] | None = Field(
        default=None,
        description="8-bit floating point for the transformer, on GPUs that compute in it",
        json_schema_extra=ui_field_config(order=8, component="quantization", is_load_param=True),
    )
    window_frames: int = Field(
        default=21,
        ge=1,
        description="Latent frames (four pixel frames each) that the model looks back on",
        json_schema_extra=ui_field_config(order=9, is_load_param=True, label="Window"),
    )
    sink_frames: int = Field(
        default=0,
        ge=0,
        description="Earliest latent frames that the model never forgets",
        json_schema_extra=ui_field_config(order=10, is_load_param=True, label="Sink"),
    )
    switch_policy: PolicyName = Field(
        default="cross_attention",
        description="What a new prompt does to the remembered frames: keep, look again (recache), forget most (flush) "
        "or all (scene_cut)",
        json_schema_extra=ui_field_config(order=11, is_load_param=False, label="Prompt switch"),
    )
    first_frame_image: str | None = Field(
        default=None,
        description="Picture that the video starts from, taken up at the next reset",
        json_schema_extra=ui_field_config(order=12, component="image", category="input", label="First frame"),
    )
    lora_merge_strategy: Literal["permanent_merge"] = Field(
        default="permanent_merge",
        description="LoRAs are merged into the weights when they are loaded",
        json_schema_extra=ui_field_config(order=13, component="lora", is_load_param=True),
    )
