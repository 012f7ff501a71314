"""The public names of vxl_model, and what transformers' auto classes know of them."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.models.auto.video_processing_auto import AutoVideoProcessor

from .base_model import VideoXLModel
from .convert import apply_vst_to_qwen2
from .decoder.configuration import VideoXLConfig
from .inputs.preprocessing import VideoXLImageProcessor, VideoXLVideoProcessor
from .inputs.processing import VideoXLProcessor
from .modeling import VideoXLForConditionalGeneration, VideoXLOutput
from .settings import ExecutionSettings
from .streaming.conversation import Conversation
from .streaming.memory import VideoMemory
from .streaming.ratios import WindowRatios

__all__ = [
    "Conversation",
    "ExecutionSettings",
    "VideoMemory",
    "VideoXLConfig",
    "VideoXLForConditionalGeneration",
    "VideoXLImageProcessor",
    "VideoXLModel",
    "VideoXLOutput",
    "VideoXLProcessor",
    "VideoXLVideoProcessor",
    "WindowRatios",
    "apply_vst_to_qwen2",
]

AutoConfig.register(VideoXLConfig.model_type, VideoXLConfig, exist_ok=True)
AutoModel.register(VideoXLConfig, VideoXLModel, exist_ok=True)
for _auto in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    _auto.register(VideoXLConfig, VideoXLForConditionalGeneration, exist_ok=True)
AutoProcessor.register(VideoXLConfig, VideoXLProcessor, exist_ok=True)
AutoImageProcessor.register(
    VideoXLConfig, image_processor_classes={"pil": VideoXLImageProcessor}, exist_ok=True
)
AutoVideoProcessor.register(VideoXLConfig, VideoXLVideoProcessor, exist_ok=True)
# Trainer and pipelines look a model's class up by its name: the loss of label smoothing is
# shifted only for what is listed as a causal language model.
for _names in (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES):
    _names[VideoXLConfig.model_type] = VideoXLForConditionalGeneration.__name__
