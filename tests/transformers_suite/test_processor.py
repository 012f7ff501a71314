"""transformers' common tests of processors on Video-XL's."""

import unittest
from pathlib import Path

import pytest

pytest.importorskip("parameterized")
pytest.importorskip("av")
pytest.importorskip("PIL")
from transformers_suite.fetch import leave_out, mixins

from examples.demo_clip import byte_tokenizer
from vxl_model import VideoXLImageProcessor, VideoXLProcessor, VideoXLVideoProcessor

try:
    (common,) = mixins("test_processing_common")
except ImportError as error:
    pytest.skip(str(error), allow_module_level=True)

PARTS = ("0_images", "1_videos")
# Tests that do not apply to Video-XL, by the reason.
NOT_APPLICABLE = {
    "a call cannot change the checkpoint's preprocessing": [
        "test_save_load_pretrained_additional_features",
        *(f"test_kwargs_overrides_default_subprocessor_kwargs_{x}" for x in PARTS),
        *(f"test_structured_kwargs_nested_from_dict_{x}" for x in PARTS),
        *(f"test_unstructured_kwargs_{x}" for x in PARTS),
        *(f"test_unstructured_kwargs_batched_{x}" for x in PARTS),
    ],
    "a text has one visual part": [
        "test_flat_kwarg_applied_when_modality_dict_lacks_it",
        "test_model_input_names",
        "test_processor_text_has_no_visual",
        "test_processor_with_multiple_inputs",
    ],
    "a processor can be made of sizes and means alone, without parts": [
        "test_init_arguments_not_in_class_attributes",
        "test_init_arguments_not_in_processor_kwargs",
    ],
    "a visual part is one id, so nothing is replaced by as many tokens": [
        "test_apply_chat_template_assistant_mask",
        "test_if_input_has_mismatching_tokens_and_mm_data",
        "test_replacement_offsets",
    ],
    "pixels are a list of a tensor for each text": [
        "test_apply_chat_template_video_frame_sampling"
    ],
    "decoded text is stripped": ["test_tokenizer_decode_defaults"],
}
# Earlier releases ask for one tensor in these too, and do not read `skip_tensor_conversion`.
if "skip_tensor_conversion" not in Path(common.__file__).read_text():
    NOT_APPLICABLE["pixels are a list of a tensor for each text"] += [
        "test_apply_chat_template_decoded_video_0",
        *(f"test_apply_chat_template_{kind}_{i}" for kind in ("image", "video") for i in (0, 1)),
    ]


@leave_out(NOT_APPLICABLE)
class ProcessorTest(common.ProcessorTesterMixin, unittest.TestCase):
    processor_class = VideoXLProcessor

    @classmethod
    def _setup_tokenizer(cls):
        return byte_tokenizer(128)

    @classmethod
    def _setup_image_processor(cls):
        return VideoXLImageProcessor()

    @classmethod
    def _setup_video_processor(cls):
        return VideoXLVideoProcessor()
