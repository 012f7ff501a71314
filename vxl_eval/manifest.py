"""What lmms-eval reads to find the model: the entry point `vxl` of the group `lmms_eval.models`.

lmms-eval imports it at its start, so neither torch nor the model is imported here.
"""

from lmms_eval.models.registry_v2 import ModelManifest

__all__ = ["manifest"]

manifest = ModelManifest(
    model_id="vxl",
    simple_class_path="vxl_eval.lmms_model.VideoXL",
    aliases=("video_xl",),
)
