"""The video models that can be trained, by the ``model_type`` of their configuration. docs/models.md: adding one.

A layout is how a family lays a video into its sequence, and what its code offers: where frames stand, where vision
features go in, which positions tokens have. What is wrong there gives no error but wrong hidden states, so a model is
served only after its layout was checked, on random weights, against its own plain forward and its eager attention.
"""

from typing import Any

from appo.config import ConfigError
from appo.models.layout import Layout
from appo.models.layout_grid import ExaoneLayout, GridLayout, MarkedGridLayout, OmniLayout, VideoLlama3Layout
from appo.models.layout_images import Gemma3Layout, InternVLLayout, SmolVLMLayout
from appo.models.layout_videos import Gemma4Layout, LlavaOneVisionLayout

_RUN = "one run of tokens"
_TIMES = "frames behind their times"
_NUMBERS = "frames as images, numbered"
_IMAGES = "frames as images behind their times"
_WINDOWS = "most of its layers see a window of the tokens before"
_LINEAR = "its linear attention passes on a state, which a mask cannot keep from the next response"

LAYOUTS: dict[str, Layout] = {
    layout.model_type: layout
    for layout in (
        GridLayout("qwen2_vl", "Qwen2-VL", _RUN, True),
        GridLayout("qwen2_5_vl", "Qwen2.5-VL", _RUN, True),
        GridLayout("qwen3_vl", "Qwen3-VL", _TIMES, True),
        GridLayout("qwen3_vl_moe", "Qwen3-VL, mixture of experts", _TIMES, True),
        OmniLayout("qwen2_5_omni_thinker", "Qwen2.5-Omni", _RUN, True),
        OmniLayout("qwen3_omni_moe_thinker", "Qwen3-Omni", _RUN, True),
        MarkedGridLayout("glm4v", "GLM-4.1V", _TIMES, True),
        MarkedGridLayout("glm4v_moe", "GLM-4.5V", _TIMES, True),
        MarkedGridLayout("glm46v", "GLM-4.6V", _TIMES, True),
        GridLayout("qwen3_5", "Qwen3.5", _TIMES, False, _LINEAR),
        GridLayout("qwen3_5_moe", "Qwen3.5, mixture of experts", _TIMES, False, _LINEAR),
        VideoLlama3Layout("video_llama_3", "VideoLLaMA 3", _TIMES, True),
        ExaoneLayout("exaone4_5", "EXAONE 4.5", _RUN, False, _WINDOWS),
        InternVLLayout("internvl", "InternVL", _NUMBERS, True),
        LlavaOneVisionLayout("llava_onevision", "LLaVA-OneVision", _RUN, True),
        Gemma3Layout("gemma3", "Gemma 3", _IMAGES, False, f"{_WINDOWS}, and images from both sides"),
        SmolVLMLayout("smolvlm", "SmolVLM2", _IMAGES, True),
        Gemma4Layout("gemma4", "Gemma 4", _TIMES, False, _WINDOWS),
    )
}


def register_layout(layout: Layout) -> None:
    """Serve a further model. Check it first, as docs/models.md says. Raises ValueError for a type that is there."""
    if layout.model_type in LAYOUTS:
        raise ValueError(f"register_layout: `layout`: expected a new model type, got {layout.model_type!r}.")
    LAYOUTS[layout.model_type] = layout


def layout_of(config: Any) -> Layout:
    """The layout of a transformers configuration. Raises ConfigError naming the type that is not known to be right."""
    kind = getattr(config, "model_type", None)
    if kind not in LAYOUTS:
        raise ConfigError(
            f"model: expected one whose layout is known to be right ({', '.join(LAYOUTS)}), got {kind!r}. "
            "record_frame_mass works with it; to train it, its layout must be checked and added: docs/models.md."
        )
    return LAYOUTS[kind]


def layout_table() -> str:
    """The served models as a table in Markdown."""
    head = "| model | `model_type` | a video in the prompt | a group behind one prompt |\n|---|---|---|---|\n"
    return head + "".join(
        f"| {layout.models} | `{layout.model_type}` | {layout.frames} | "
        f"{'yes' if layout.shares_prompt else f'no: {layout.why_not}'} |\n"
        for layout in LAYOUTS.values()
    )
