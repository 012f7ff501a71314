"""Tiny decoders of transformers with random weights."""

import functools
import inspect

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

ARCHITECTURES = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": 512}),
}
VOCABULARY = 97
# By which name a model takes its cache: the second since 5.24.
_PARAMETERS = inspect.signature(Qwen2ForCausalLM.forward).parameters
CACHE = "past_key_values" if "past_key_values" in _PARAMETERS else "cache"


def decoder(name, **options):
    """A decoder in evaluation mode, the same weights in every call."""
    config, model, own = ARCHITECTURES[name]
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    torch.manual_seed(0)
    return model(config(**{**sizes, **own, **options})).eval()


@functools.cache
def shared_decoder(name):
    """One to read from."""
    return decoder(name)


def random_ids(batch, tokens, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (batch, tokens), generator=generator)


def padding(batch, tokens, side):
    """A mask of padding: "left", "right", "both", or "holes" in the middle, other in each row."""
    mask = torch.ones(batch, tokens, dtype=torch.int64)
    for row in range(batch):
        n = 3 * row + 2 * (row == batch - 1)  # the first row has none
        if side in ("left", "both"):
            mask[row, :n] = 0
        if side in ("right", "both") and n:
            mask[row, -n:] = 0
        if side == "holes":
            mask[row, 4 : 4 + n] = 0
    return mask


def positions(mask):
    return (mask.cumsum(1) - 1).clamp(min=0)
