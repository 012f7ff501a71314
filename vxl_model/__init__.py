"""Video-XL on `vxl_kernels`: the released checkpoint in, a video in, answers out.

`VideoXLForConditionalGeneration.from_pretrained(path).watch("video.mp4").ask("What happens?")`.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

from .checkpoint import apply_vst_to_qwen2
from .configuration import VideoXLConfig
from .layers import VideoXLModel
from .memory import VideoMemory
from .modeling import VideoXLForConditionalGeneration, VideoXLOutput
from .ratios import WindowRatios
from .steps import ExecutionSettings

__all__ = [
    "ExecutionSettings",
    "VideoMemory",
    "VideoXLConfig",
    "VideoXLForConditionalGeneration",
    "VideoXLOutput",
    "WindowRatios",
    "apply_vst_to_qwen2",
]

AutoConfig.register(VideoXLConfig.model_type, VideoXLConfig, exist_ok=True)
AutoModel.register(VideoXLConfig, VideoXLModel, exist_ok=True)
AutoModelForCausalLM.register(VideoXLConfig, VideoXLForConditionalGeneration, exist_ok=True)
AutoModelForImageTextToText.register(VideoXLConfig, VideoXLForConditionalGeneration, exist_ok=True)
