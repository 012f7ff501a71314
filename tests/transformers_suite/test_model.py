"""transformers' common tests of models on Video-XL, with text alone and with pixels."""

import unittest

import pytest
import torch

pytest.importorskip("parameterized")
from transformers_suite.fetch import leave_out, mixins

from vxl_model import VideoXLConfig, VideoXLForConditionalGeneration

try:
    common, config_common, training = mixins(
        "test_modeling_common", "test_configuration_common", "test_training_mixin"
    )
except ImportError as error:
    pytest.skip(str(error), allow_module_level=True)

VISION = {
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 56,
    "patch_size": 14,
    "projection_dim": 32,
    "hidden_act": "quick_gelu",
}
TEXT = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "beacon_window": 8,
    "beacon_ratio": [2],
}


class ModelTester:
    """A tiny configuration and inputs for it."""

    batch_size, seq_length, is_training = 3, 9, True
    num_hidden_layers, hidden_size, num_attention_heads, vocab_size = 2, 64, 4, 99
    frames, image_size, patch_size = 5, 56, 14

    def __init__(self, pixels):
        self.pixels = pixels

    def get_config(self):
        tower = {"mm_vision_tower": "openai/clip-tiny", "mm_hidden_size": 32}
        return VideoXLConfig(**TEXT, **({**tower, "vision_config": VISION} if self.pixels else {}))

    def prepare_config_and_inputs_for_common(self):
        ids = common.ids_tensor([self.batch_size, self.seq_length], 96) + 3
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if self.pixels:
            ids[:, 3] = -200
            shape = [self.batch_size, self.frames, 3, self.image_size, self.image_size]
            inputs["pixel_values"] = common.floats_tensor(shape)
        return self.get_config(), inputs


# Tests that do not apply to Video-XL, by the reason.
NOT_APPLICABLE = {
    "a checkpoint that lacks weights is refused": [
        "test_correct_missing_keys",
        "test_model_weights_reload_no_missing_tied_weights",
    ],
    "the source distribution does not hold the tests of generate": [
        "test_generation_tester_mixin_inheritance"
    ],
    "hidden states are those of the text rows, cut out of all rows": [
        "test_retain_grad_hidden_states_attentions"
    ],
    "labels are as input_ids: shift_labels is not taken": [
        "test_causal_lm_loss_honors_shift_labels"
    ],
}
NOT_APPLICABLE_TO_PIXELS = {
    "hidden states are those of the text rows, cut out of all rows": ["test_hidden_states_output"],
    "-200, the place of the video, has no embedding": ["test_inputs_embeds"],
}


@leave_out(NOT_APPLICABLE)
class Common(common.ModelTesterMixin):
    all_model_classes = (VideoXLForConditionalGeneration,)
    pixels = False
    has_attentions = False  # attention weights are never made
    _is_composite = False

    def setUp(self):
        self.model_tester = ModelTester(self.pixels)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        if return_labels:
            inputs["labels"] = torch.zeros_like(inputs_dict["input_ids"])
        return inputs


class TextTest(Common, training.TrainingTesterMixin, unittest.TestCase):
    model_tester = None

    # The others write the published layout, which transformers' own keys are not part of.
    def test_config(self):
        tester = config_common.ConfigTester(self, config_class=VideoXLConfig, hidden_size=64)
        for part in (
            tester.create_and_test_config_common_properties,
            tester.create_and_test_config_to_json_string,
            tester.create_and_test_config_to_json_file,
            tester.create_and_test_config_with_num_labels,
            tester.check_config_can_be_init_without_params,
        ):
            part()


@leave_out(NOT_APPLICABLE_TO_PIXELS)
class PixelsTest(Common, unittest.TestCase):
    pixels = True
    test_all_params_have_gradient = False  # the tower's last layers are never run
