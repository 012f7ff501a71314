"""What Video-XL takes from Qwen2. No other file of the model imports a class of Qwen2 or repeats
one of its choices.

Video-XL on another language model starts with a file like this one. What that model does between
projection and rotation belongs into `attention.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2Config as TextConfig
from transformers import Qwen2ForCausalLM as TextForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP as TextMLP
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm as TextNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding as RotaryEmbedding

__all__ = [
    "MODEL_TYPE",
    "OUTPUT_BIAS",
    "QKV_BIAS",
    "ROPE_TYPES",
    "TENSOR_PARALLEL_PLAN",
    "TextConfig",
    "TextForCausalLM",
    "TextMLP",
    "TextNorm",
    "rotary_frequencies",
]

MODEL_TYPE = "qwen2"
QKV_BIAS, OUTPUT_BIAS = True, False
ROPE_TYPES = ("default", "linear", "llama3")  # those whose frequencies depend on no length
TENSOR_PARALLEL_PLAN: dict[str, str] = dict(TextConfig.base_model_tp_plan or {})


def rotary_frequencies(config: Any, device: torch.device) -> Tensor:
    """Rotation per position, float32 `(head_dim / 2,)`. The caller's default device and inference
    mode have no part in it, since it is kept for later calls."""
    with torch.inference_mode(False), torch.device("cpu"):
        return RotaryEmbedding(config).inv_freq.float().to(device).as_subclass(Tensor)
