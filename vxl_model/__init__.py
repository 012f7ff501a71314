"""Video-XL on `vxl_kernels`: loads the released checkpoint, watches videos and answers questions.

`VideoXLForConditionalGeneration.from_pretrained(path).watch("video.mp4").ask("What happens?")`.
"""

import sys
from typing import TYPE_CHECKING, Any

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

# `python -m vxl_model` imports this package before its command knows what it needs. transformers
# takes seconds, and help and a wrong file name need nothing of it.
_IS_COMMAND = sys.argv[:1] == ["-m"] and "vxl_model" in sys.orig_argv

if TYPE_CHECKING or not _IS_COMMAND:
    from .public import (
        Conversation,
        ExecutionSettings,
        VideoMemory,
        VideoXLConfig,
        VideoXLForConditionalGeneration,
        VideoXLImageProcessor,
        VideoXLModel,
        VideoXLOutput,
        VideoXLProcessor,
        VideoXLVideoProcessor,
        WindowRatios,
        apply_vst_to_qwen2,
    )
else:

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from . import public

        return getattr(public, name)
