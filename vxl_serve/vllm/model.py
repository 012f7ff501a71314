"""The language model of a Video-XL checkpoint, for vLLM."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM

__all__ = ["VideoXLTextModel"]

_TEXT_WEIGHTS = ("model.embed_tokens.", "model.layers.", "model.norm.", "lm_head.")


class VideoXLTextModel(Qwen2ForCausalLM):
    """Qwen2 that skips what only watching needs: VST weights, vision tower, projector."""

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Loads a checkpoint in the published layout."""
        return super().load_weights(
            (name, weight)
            for name, weight in weights
            if name.startswith(_TEXT_WEIGHTS) and ".beacon_" not in name
        )
