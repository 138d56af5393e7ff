"""The base class of a pipeline's parameters."""

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict


def ui_field_config(**hints: Any) -> dict[str, Any]:
    """Return the extra that tells the settings panel about a field; refuses hints that Scope does not know."""
    known = {"order", "component", "modes", "is_load_param", "label", "category"}
    assert hints.keys() <= known, hints.keys() - known
    return {"ui": {"category": "configuration", "is_load_param": False} | hints}


class ModeDefaults(BaseModel):
    """Defaults that a mode overrides."""

    model_config = ConfigDict(extra="forbid")
    default: bool = False


class BasePipelineConfig(BaseModel):
    """Parameters that every pipeline has."""

    model_config = ConfigDict(extra="forbid")
    pipeline_id: ClassVar[str] = "base"
    modes: ClassVar[dict[str, ModeDefaults]] = {"text": ModeDefaults(default=True)}
    height: int = 512
    width: int = 512
    manage_cache: bool = True
    base_seed: int = 42
    denoising_steps: list[int] | None = None
    lora_merge_strategy: str | None = None
    noise_scale: float | None = None
    noise_controller: bool | None = None
    input_size: int | None = 1
    ref_images: list[str] | None = None
    vace_context_scale: float = 1.0

    @classmethod
    def get_schema_with_metadata(cls) -> dict[str, Any]:
        """Return what the settings panel is drawn from."""
        return {"id": cls.pipeline_id, "config_schema": cls.model_json_schema()}
