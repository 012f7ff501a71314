"""Video-XL on `vxl_kernels`: loads the released checkpoint, watches videos and answers questions.

`VideoXLForConditionalGeneration.from_pretrained(path).watch("video.mp4").ask("What happens?")`.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

from .convert import apply_vst_to_qwen2
from .decoder.configuration import VideoXLConfig
from .decoder.layers import VideoXLModel
from .modeling import VideoXLForConditionalGeneration, VideoXLOutput
from .settings import ExecutionSettings
from .streaming.memory import VideoMemory
from .streaming.ratios import WindowRatios

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
