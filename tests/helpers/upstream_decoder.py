"""The smallest Video-XL decoder on this package's operators, for the goldens.

Weights have upstream's names. `Decoder.run` encodes prefix, windows and suffix as the upstream code
does, and caches what it would cache.
"""

import torch
import torch.nn.functional as F

from vxl_kernels import ChunkLayout, rope_append, vst_attention, vst_linear
from vxl_kernels.testing import inverse_frequencies


class Decoder:
    def __init__(self, case, weights, capacity, backend):
        self.case, self.weights, self.backend = case, weights, backend
        shape = (case["layers"], 1, capacity, case["kv_heads"], case["head_dim"])
        self.k_cache, self.v_cache = torch.full(shape, torch.nan), torch.full(shape, torch.nan)
        self.block_table = torch.zeros(1, 1, dtype=torch.int32)
        self.cache_seqlens = torch.zeros(1, dtype=torch.int32)
        self.inv_freq = inverse_frequencies(case["head_dim"], case["rope_theta"])

    def norm(self, x, name):
        variance = x.pow(2).mean(-1, keepdim=True)
        return x * torch.rsqrt(variance + self.case["rms_norm_eps"]) * self.weights[name]

    def project(self, x, name, attn, layout):
        raw, vst = f"{attn}.{name}", f"{attn}.beacon_{name}"
        names = (f"{raw}.weight", f"{raw}.bias", f"{vst}.weight", f"{vst}.bias")
        out = vst_linear(x, *(self.weights[n] for n in names), layout, backend=self.backend)
        return out.unflatten(-1, (-1, self.case["head_dim"]))

    def run(self, hidden, layout=None):
        """hidden (1, rows, hidden) through all layers. Caches what the layout caches."""
        for i in range(self.case["layers"]):
            layer = f"model.layers.{i}"
            attn = f"{layer}.self_attn"
            x = self.norm(hidden, f"{layer}.input_layernorm.weight")
            q, k, v = (self.project(x, n, attn, layout) for n in ("q_proj", "k_proj", "v_proj"))
            cache = (self.k_cache[i], self.v_cache[i], self.block_table, self.cache_seqlens)
            q, k = rope_append(q, k, v, *cache, layout, self.inv_freq, backend=self.backend)
            out = vst_attention(q, k, v, *cache, layout, backend=self.backend).flatten(2)
            hidden = hidden + out @ self.weights[f"{attn}.o_proj.weight"].T
            x = self.norm(hidden, f"{layer}.post_attention_layernorm.weight")
            gate, up, down = (
                self.weights[f"{layer}.mlp.{n}_proj.weight"] for n in ("gate", "up", "down")
            )
            hidden = hidden + (F.silu(x @ gate.T) * (x @ up.T)) @ down.T
        kept = hidden.shape[1] if layout is None else layout.chunks * layout.vsts_per_chunk
        self.cache_seqlens += kept
        return hidden

    def embed(self, ids):
        return self.weights["model.embed_tokens.weight"][ids][None]

    def watch(self, features, ratios, chunks, order):
        """Encodes all windows. Equal neighbours go `chunks` at a time."""
        vst = self.weights["model.beacon_embed_tokens.weight"][0]
        window = self.case["window"]
        pieces = list(features.split(window))
        at = 0
        while at < len(pieces):
            n = 1
            while (
                n < chunks
                and at + n < len(pieces)
                and len(pieces[at + n]) == len(pieces[at])
                and ratios[at + n] == ratios[at]
            ):
                n += 1
            layout = ChunkLayout(len(pieces[at]), ratios[at], n, order)
            rows = vst.repeat(1, layout.rows, 1)
            rows[0, layout.raw_rows()] = torch.cat(pieces[at : at + n])
            self.run(rows, layout)
            at += n

    def logits(self, ids):
        hidden = self.run(self.embed(ids))
        x = self.norm(hidden, "model.norm.weight")
        return (x @ self.weights["lm_head.weight"].T)[0]
