"""transformers' common tests of models on Video-XL, with text alone and with pixels."""

import unittest

import pytest
import torch

pytest.importorskip("parameterized")
from transformers_suite.fetch import mixins

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


class TextTest(common.ModelTesterMixin, training.TrainingTesterMixin, unittest.TestCase):
    all_model_classes = (VideoXLForConditionalGeneration,)
    model_tester = None
    pixels = False
    has_attentions = False
    _is_composite = False

    def setUp(self):
        self.model_tester = ModelTester(self.pixels)

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        if return_labels:
            inputs["labels"] = torch.zeros_like(inputs_dict["input_ids"])
        return inputs

    def test_config(self):
        tester = config_common.ConfigTester(self, config_class=VideoXLConfig, hidden_size=64)
        tester.run_common_tests()


class PixelsTest(TextTest):
    pixels = True
