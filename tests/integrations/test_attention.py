"""`attn_implementation="vxl"` against transformers' own SDPA: logits, gradients, refusals."""

import copy

import pytest
import torch
from helpers.decoders import (
    ARCHITECTURES,
    CACHE,
    decoder,
    padding,
    positions,
    random_ids,
    shared_decoder,
)
from helpers.serving import serving
from transformers import DynamicCache, Gemma2Config, Gemma2ForCausalLM
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from vxl_kernels import vst_attention
from vxl_kernels.integrations.transformers import register
from vxl_kernels.integrations.transformers.attention import attention
from vxl_kernels.integrations.transformers.rows import RowPlan, row_plan, whole_cache

pytestmark = pytest.mark.core

TOLERANCE = 2e-6


@pytest.fixture(autouse=True, scope="module")
def registered():
    register()


def both(model, *args, **kwargs):
    """Outputs of a call with SDPA and with these kernels."""
    outs = []
    for implementation in ("sdpa", "vxl"):
        model.set_attn_implementation(implementation)
        outs.append(model(*args, **copy.deepcopy(kwargs)))
    return outs


def difference(x, y, mask=None):
    d = (x - y).abs()
    return float((d if mask is None else d[mask.bool()]).max())


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("side", [None, "left", "right", "both", "holes"])
def test_logits(name, side):
    ids = random_ids(3, 21)
    mask = None if side is None else padding(3, 21, side)
    where = {} if mask is None else {"attention_mask": mask, "position_ids": positions(mask)}
    with torch.no_grad():
        sdpa, vxl = both(shared_decoder(name), ids, **where)
    assert difference(sdpa.logits, vxl.logits, mask) <= TOLERANCE
    assert vxl.logits.isfinite().all()


@pytest.mark.parametrize("side", [None, "left", "right", "both", "holes"])
@pytest.mark.parametrize("pieces", [(21, 1, 1), (8, 13, 1), (300, 40, 1), (1, 1, 1, 7)])
def test_logits_over_a_cache(side, pieces):
    """Prefill in pieces, then decoding, over a cache that transformers makes. 300 tokens are more
    than two pages."""
    model, total = shared_decoder("qwen2"), sum(pieces)
    ids, mask = random_ids(4, total), padding(4, total, side)
    logits = []
    for implementation in ("sdpa", "vxl"):
        model.set_attn_implementation(implementation)
        cache, parts, start = DynamicCache(config=model.config), [], 0
        for rows in pieces:
            at = slice(start, start + rows)
            with torch.no_grad():
                out = model(
                    ids[:, at],
                    attention_mask=None if side is None else mask[:, : at.stop],
                    position_ids=positions(mask)[:, at],
                    **{CACHE: cache},
                )
            parts.append(out.logits)
            start = at.stop
        logits.append(torch.cat(parts, 1))
    assert difference(*logits, mask) <= TOLERANCE


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_sequences(name):
    """position_ids that begin again: each sequence is on its own, as with SDPA."""
    places = torch.cat([torch.arange(n) for n in (5, 1, 17, 2, 9)])[None]
    ids = random_ids(1, places.shape[1])
    with torch.no_grad():
        sdpa, vxl = both(shared_decoder(name), ids, position_ids=places, use_cache=False)
        causal = shared_decoder(name)(ids, use_cache=False)
    assert difference(sdpa.logits, vxl.logits) <= TOLERANCE
    assert difference(causal.logits, vxl.logits) > 1e-3


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("side", ["left", "right", "packed"])
def test_gradients(name, side):
    model, ids = decoder(name).train(), random_ids(2, 19)
    if side == "packed":
        where = {"position_ids": torch.cat([torch.arange(n) for n in (7, 12)]).expand(2, -1)}
        labels = ids
    else:
        mask = padding(2, 19, side)
        where = {"attention_mask": mask, "position_ids": positions(mask)}
        labels = ids.masked_fill(mask == 0, -100)
    found = []
    for implementation in ("sdpa", "vxl"):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        model(ids, labels=labels, use_cache=False, **where).loss.backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters()})
    for key, truth in found[0].items():
        assert difference(truth, found[1][key]) <= 2e-6 * max(1.0, float(truth.abs().max())), key


def test_gradients_through_a_padded_cache():
    model, ids, mask = decoder("llama"), random_ids(3, 40), padding(3, 40, "left")
    found = []
    for implementation in ("sdpa", "vxl"):
        model.set_attn_implementation(implementation)
        model.zero_grad()
        cache = DynamicCache(config=model.config)
        for at in (slice(0, 30), slice(30, 40)):
            out = model(
                ids[:, at],
                attention_mask=mask[:, : at.stop],
                position_ids=positions(mask)[:, at],
                **{CACHE: cache},
            )
        out.logits.square().mean().backward()
        found.append(model.model.layers[0].self_attn.k_proj.weight.grad.clone())
    assert float(found[0].abs().max()) > 1e-6
    assert difference(*found) <= 1e-5 * float(found[0].abs().max())


def test_gradient_checkpointing():
    model, ids, mask = decoder("qwen2").train(), random_ids(2, 12), padding(2, 12, "left")
    model.set_attn_implementation("vxl")
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()
        grads.append(model.model.layers[0].self_attn.q_proj.weight.grad.clone())
    assert torch.equal(*grads)


def test_bfloat16():
    """Half the distance that SDPA has from float32."""
    model, ids, mask = decoder("qwen2"), random_ids(2, 33), padding(2, 33, "left")
    with torch.no_grad():
        truth = model(ids, attention_mask=mask).logits
        sdpa, vxl = both(model.bfloat16(), ids, attention_mask=mask)
    assert vxl.logits.dtype == torch.bfloat16
    assert difference(vxl.logits, truth, mask) <= 1.5 * difference(sdpa.logits, truth, mask)


@pytest.mark.parametrize("backend", [name for name in serving() if name != "cpu"])
def test_named_backend(backend):
    register("vxl_other", backend=backend)
    model, ids, mask = decoder("qwen2"), random_ids(2, 9), padding(2, 9, "left")
    with torch.no_grad():
        truth = model(ids, attention_mask=mask).logits
        model.set_attn_implementation("vxl_other")
        logits = model(ids, attention_mask=mask).logits
    assert difference(truth, logits, mask) <= TOLERANCE


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend: got 'cuda', expected"):
        register("vxl_other", backend="cuda")


# -- the cached tokens of a padded batch -----------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 2, 7, 64, 130, 300])
@pytest.mark.parametrize("rows", [1, 5])
def test_left_padding_is_skipped_in_place(tokens, rows):
    """Keys of the cache are attended to where they are; NaN in what must not be read."""
    generator = torch.Generator().manual_seed(tokens)
    first = [0, tokens, tokens // 2, max(0, tokens - 3)]
    key, value = (torch.randn(4, 2, tokens + rows, 32, generator=generator) for _ in range(2))
    q = torch.randn(4, rows, 6, 32, generator=generator)
    kept = torch.arange(tokens) >= torch.tensor(first)[:, None]
    for b, start in enumerate(first):
        key[b, :, :start] = value[b, :, :start] = torch.nan
    own = [x[:, :, tokens:].transpose(1, 2) for x in (key, value)]
    cache = RowPlan(tokens, kept).cached(key, value)
    assert cache[0].untyped_storage().data_ptr() == key.untyped_storage().data_ptr()
    out = vst_attention(q, *own, *cache)
    for b, start in enumerate(first):
        alone = (x[b : b + 1, :, start:] for x in (key, value))
        want = vst_attention(
            q[b : b + 1], *(x[b : b + 1] for x in own), *whole_cache(*alone, tokens - start)
        )
        assert difference(out[b : b + 1], want) <= TOLERANCE


# -- refusals --------------------------------------------------------------------------------------


def refused(model, match, *args, **kwargs):
    model.set_attn_implementation("vxl")
    with pytest.raises(ValueError, match=match):
        model(*args, **kwargs)


@pytest.mark.parametrize("name", ["mistral", "qwen2"])
def test_sliding_window(name):
    """Accepted as long as the window holds the whole sequence, refused from then on."""
    window = {"qwen2": {"use_sliding_window": True, "max_window_layers": 1}}.get(name, {})
    model, ids = decoder(name, sliding_window=16, **window), random_ids(2, 17)
    with torch.no_grad():
        sdpa, vxl = both(model, ids[:, :16])
    assert difference(sdpa.logits, vxl.logits) <= TOLERANCE
    refused(model, "sliding_window: got a window or chunk of 16 tokens, .* 17 tokens", ids)
    with torch.no_grad():
        out = model.generate(ids[:, :12], max_new_tokens=5, do_sample=False)
    assert out.shape == (2, 17)
    with pytest.raises(ValueError, match="sliding_window"):
        model.generate(ids[:, :12], max_new_tokens=6, do_sample=False)


def test_packed_sequences_within_a_window():
    model = decoder("mistral", sliding_window=8)
    places = torch.arange(8).repeat(3)[None]
    ids = random_ids(1, 24)
    with torch.no_grad():
        sdpa, vxl = both(model, ids, position_ids=places, use_cache=False)
    assert difference(sdpa.logits, vxl.logits) <= TOLERANCE
    places = torch.arange(12).repeat(2)[None]
    refused(model, "sliding_window", ids, position_ids=places, use_cache=False)


def test_softcap():
    config = Gemma2Config(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    refused(Gemma2ForCausalLM(config), "softcap: got a softcap", random_ids(1, 5))


def test_dropout():
    model = decoder("llama", attention_dropout=0.1).train()
    refused(model, "attention_dropout: got 0.1, expected 0 in training", random_ids(1, 5))


def test_mask_of_four_dimensions():
    mask = torch.zeros(1, 1, 5, 5)
    match = "attention_mask: got a 4-dimensional mask"
    refused(shared_decoder("llama"), match, random_ids(1, 5), attention_mask=mask)


def test_not_causal():
    model = decoder("qwen2")
    model.config.is_causal = False
    refused(model, "row 0, which sees key 1", random_ids(1, 5))


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"s_aux": torch.zeros(4)}, "s_aux: got attention sinks"),
        ({"position_bias": torch.zeros(1)}, "position_bias"),
        ({"output_attentions": True}, "output_attentions"),
        ({"is_causal": False}, "row 0, which sees key 1"),
    ],
)
def test_other_attention(arguments, name):
    refused(shared_decoder("llama"), name, random_ids(1, 5), use_cache=False, **arguments)


def test_module_that_is_not_causal():
    x = torch.zeros(1, 2, 5, 16)
    module = torch.nn.Module()
    for options, own in (({"is_causal": False}, True), ({}, False)):
        module.is_causal = own
        with pytest.raises(ValueError, match="is_causal: got False, expected True"):
            attention(module, x, x, x, None, **options)
    with pytest.raises(ValueError, match="value: got head_dim 8, expected 16 as query"):
        attention(module, x, x, x[..., :8], None, is_causal=True)


def mask_arguments(batch=2, rows=6):
    model = shared_decoder("mistral")
    model.set_attn_implementation("vxl")
    embeds = torch.zeros(batch, rows, 64)
    cache = {"past_key_values" if CACHE == "past_key_values" else "cache": None}
    return {"config": model.config, "inputs_embeds": embeds, "attention_mask": None, **cache}


@pytest.mark.parametrize("make", [create_causal_mask, create_sliding_window_causal_mask])
def test_mask_functions_of_the_caller(make):
    assert make(**mask_arguments()) is None
    with pytest.raises(ValueError, match="attention mask: got a mask function"):
        make(**mask_arguments(), and_mask_function=lambda b, h, q, k: q - k < 3)


def test_blocks_that_see_each_other():
    blocks = torch.tensor([[-1, 0, 0, 0, -1, -1]]).expand(2, -1)
    with pytest.raises(ValueError, match="row 1, which sees key 2"):
        create_causal_mask(**mask_arguments(), block_sequence_ids=blocks)


def test_mask_that_hides_a_token_is_refused():
    """Any mask function is looked at, whatever made it."""
    with pytest.raises(ValueError, match="row 4, which does not see key 1"):
        row_plan(1, 6, 6, mask_function=lambda b, h, q, k: (k <= q) & ((k != 1) | (q != 4)))


def test_head_dim():
    model = decoder("llama", num_attention_heads=8, num_key_value_heads=8)
    refused(model, "head_dim 8, expected 16 to 256", random_ids(1, 5))


def test_values_of_another_dtype_than_keys():
    """Autocast rounds values, but not keys that a rotation has brought back to float32."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 4, 3, 16, generator=generator)
    key, value = torch.randn(2, 1, 2, 9, 16, generator=generator)
    rounded = value.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = attention(torch.nn.Module(), q, key, rounded, None, is_causal=True)
    want, _ = attention(torch.nn.Module(), q, key, rounded.float(), None, is_causal=True)
    torch.testing.assert_close(out.float(), want, rtol=1e-2, atol=1e-2)
