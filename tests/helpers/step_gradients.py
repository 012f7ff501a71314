"""Gradients through rotation, append and attention together."""

import torch

from vxl_kernels import rope_append, vst_attention
from vxl_kernels.testing import Inputs


def step_gradients(
    inputs: Inputs, inv_freq: torch.Tensor, backend: str
) -> tuple[torch.Tensor, ...]:
    """Gradients of q, k, v and both caches, for a loss of the result and the caches."""
    leaves = [t.nan_to_num().requires_grad_() for t in inputs.args()[:5]]
    caches = [leaf.clone() for leaf in leaves[3:]]
    rest = *caches, inputs.block_table, inputs.cache_seqlens, inputs.layout
    q, k = rope_append(*leaves[:3], *rest, inv_freq, backend=backend)
    out = vst_attention(q, k, leaves[2], *rest, backend=backend)
    loss = out.sin().sum() + sum(c.cos().sum() for c in caches)
    return torch.autograd.grad(loss, leaves)
