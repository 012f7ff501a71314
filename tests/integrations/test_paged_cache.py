"""`generate` over pages and over transformers' own caches."""

import copy
import pickle

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

from vxl_kernels import PoolExhausted, VstCache
from vxl_kernels.integrations.transformers import PagedCache, register, skip_cached

pytestmark = pytest.mark.core

BEAMS = {"num_beams": 3, "do_sample": False}
MODES = {
    "greedy": {"do_sample": False},
    "beams": BEAMS,
    "several": {**BEAMS, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "top_k": 5, "num_return_sequences": 2},
}


@pytest.fixture(autouse=True, scope="module")
def registered():
    register()


def generate(model, ids, mask=None, cache=None, new=12, **options):
    torch.manual_seed(5)
    given = {} if cache is None else {CACHE: cache}
    return model.generate(ids, attention_mask=mask, max_new_tokens=new, **given, **options)


def paged(model, sequences=1, tokens=128, page_size=8):
    return PagedCache.for_model(model, tokens, sequences, page_size=page_size)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("mode", MODES)
def test_generate(name, mode):
    """The ids of SDPA, over a DynamicCache and over pages, in a batch padded on the left."""
    model, ids, mask = decoder(name), random_ids(3, 20), padding(3, 20, "left")
    truth = generate(model, ids, mask, **MODES[mode])
    model.set_attn_implementation("vxl")
    assert torch.equal(generate(model, ids, mask, **MODES[mode]), truth)
    cache = paged(model, 9)
    assert torch.equal(generate(model, ids, mask, cache, **MODES[mode]), truth)
    assert cache.get_seq_length() == 31


def test_generate_under_autocast():
    """Rows of bf16 go to pages of float32."""
    model, ids, mask = decoder("qwen2"), random_ids(3, 20), padding(3, 20, "left")
    model.set_attn_implementation("vxl")
    with torch.autocast("cpu", torch.bfloat16):
        truth = generate(model, ids, mask)
        cache = paged(model, 3)
        assert torch.equal(generate(model, ids, mask, cache), truth)
    assert cache.pages.dtype == torch.float32


def test_static_cache():
    model, ids, mask = decoder("qwen2"), random_ids(2, 20), padding(2, 20, "left")
    truth = generate(model, ids, mask)
    model.set_attn_implementation("vxl")
    assert torch.equal(generate(model, ids, mask, cache_implementation="static"), truth)


@pytest.mark.parametrize("pages", [False, True])
def test_assisted_decoding(pages):
    """Candidates of another model, and of the prompt: rows are taken back by `crop`."""
    model, ids = decoder("qwen2"), random_ids(1, 8).repeat(1, 3)
    truth = generate(model, ids, new=20)
    model.set_attn_implementation("vxl")
    helper = decoder("qwen2", num_hidden_layers=1, attn_implementation="vxl")
    for options in ({"assistant_model": helper}, {"prompt_lookup_num_tokens": 3}):
        cache = paged(model) if pages else None
        assert torch.equal(generate(model, ids, None, cache, new=20, **options), truth)


@pytest.mark.parametrize("options", [{}, {"prompt_lookup_num_tokens": 3}])
def test_prompt_that_is_cached_already(options):
    """A cache that holds the start of the prompt, for each question a copy of it."""
    model, ids = decoder("qwen2"), random_ids(1, 8).repeat(1, 4)
    truth = generate(model, ids, new=20)
    model.set_attn_implementation("vxl")
    prefix = paged(model)
    with torch.no_grad():
        model(ids[:, :20], **{CACHE: prefix})
    for _ in range(2):
        with skip_cached(model):
            assert torch.equal(
                generate(model, ids, None, copy.copy(prefix), new=20, **options), truth
            )
    assert prefix.get_seq_length() == 20


def logits(model, cache, ids, mask=None):
    where = {}
    if mask is not None:
        where = {"attention_mask": mask, "position_ids": positions(mask)[:, -ids.shape[1] :]}
    with torch.no_grad():
        return model(ids, **where, **{CACHE: cache}).logits


@pytest.fixture
def model():
    model = shared_decoder("qwen2")
    model.set_attn_implementation("vxl")
    return model


def test_padding_takes_no_memory(model):
    ids = random_ids(2, 40)
    mask = torch.ones_like(ids)
    mask[0, :39] = 0
    cache = paged(model, 2, page_size=1)
    logits(model, cache, ids, mask)
    assert [cache.pages.length(seq) for seq in cache.sequences] == [1, 40]
    assert cache.pages.stats()["used_pages"] == 41


def test_copies_share_pages_and_are_independent(model):
    cache, ids = paged(model, 1, tokens=64, page_size=8), random_ids(1, 24)
    logits(model, cache, ids)
    before = cache.pages.free_pages
    copies = [copy.deepcopy(cache), copy.copy(cache)]
    assert cache.pages.free_pages == before
    tails = [random_ids(1, 5, seed) for seed in (7, 8, 9)]
    got = [logits(model, c, t) for c, t in zip([cache, *copies], tails, strict=True)]
    for tail, out in zip(tails, got, strict=True):
        alone = paged(model)
        logits(model, alone, ids)
        assert torch.equal(logits(model, alone, tail), out)
    del copies
    assert cache.pages.free_pages == before - 1  # the copies have given theirs back


def test_crop_and_reset(model):
    ids, mask = random_ids(2, 30), padding(2, 30, "holes")
    cache = paged(model, 2)
    whole = logits(model, cache, ids, mask)
    cache.crop(-12)
    assert cache.get_seq_length() == 18
    again = logits(model, cache, ids[:, 18:], mask)
    assert (again - whole[:, 18:])[mask[:, 18:].bool()].abs().max() <= 2e-6
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.pages.free_pages == cache.pages.num_pages
    assert torch.equal(logits(model, cache, ids, mask), whole)
    with pytest.raises(ValueError, match="crop: got 3, expected minus"):
        cache.crop(3)


def test_rows_are_selected_and_repeated(model):
    ids, mask = random_ids(3, 12), padding(3, 12, "left")
    cache, next_ids = paged(model, 6), random_ids(6, 1)
    logits(model, cache, ids, mask)
    cache.batch_repeat_interleave(2)
    assert cache.batch_size == 6
    wide = torch.cat([mask.repeat_interleave(2, 0), torch.ones(6, 1, dtype=torch.int64)], 1)
    out = logits(model, copy.copy(cache), next_ids, wide)
    rows = torch.tensor([4, 1, 1])
    cache.batch_select_indices(rows)
    again = logits(model, cache, next_ids[rows], wide[rows])
    assert (again - out[rows]).abs().max() <= 2e-6


def test_sequences_of_a_shared_pool(model):
    """Sequences of other lengths are padded on the left."""
    cache, ids = paged(model, 4), random_ids(1, 20)
    pool = cache.pages
    logits(model, cache, ids)
    parts = [pool.fork(cache.sequences[0]), pool.fork(cache.sequences[0])]
    pool.truncate(parts[1], 15)
    mask = torch.ones(2, 21, dtype=torch.int64)
    mask[1, :5] = 0
    both = PagedCache(pool, parts)
    assert both.get_seq_length() == 20
    out = logits(model, both, random_ids(2, 1), mask)
    cache.crop(-5)
    assert (logits(model, cache, random_ids(2, 1)[1:]) - out[1:]).abs().max() <= 2e-6


def test_pool_exhausted_leaves_the_cache_as_before(model):
    cache, ids = paged(model, 2, tokens=16, page_size=8), random_ids(2, 40)
    first = logits(model, cache, ids[:, :9])
    with pytest.raises(PoolExhausted):
        logits(model, cache, ids[:, 9:])
    assert cache.get_seq_length() == 9
    cache.crop(-9)
    assert torch.equal(logits(model, cache, ids[:, :9]), first)


def test_interrupted_forward(model):
    """Half a forward does not count, and is not forgotten in silence."""
    cache, ids = paged(model), random_ids(1, 10)
    logits(model, cache, ids)
    stop = model.model.layers[2].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        logits(model, cache, ids)
    stop.remove()
    assert cache.get_seq_length() == 10
    with pytest.raises(ValueError, match=r"stopped at layer 2, expected crop\(0\) or reset"):
        logits(model, cache, ids)
    cache.crop(0)
    truth = logits(model, None, ids.repeat(1, 2))[:, 10:]
    assert (logits(model, cache, ids) - truth).abs().max() <= 2e-6


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_other_attention_is_refused(attention):
    model = decoder("qwen2", attn_implementation=attention)
    with pytest.raises(ValueError, match=r'PagedCache: .*attn_implementation="vxl"'):
        logits(model, paged(model), random_ids(1, 4))


def test_refusals(model):
    cache, ids = paged(model, 2), random_ids(2, 6)
    with pytest.raises(ValueError, match="require a gradient"):
        model(ids, **{CACHE: cache})
    logits(model, cache, ids, padding(2, 6, "left"))
    with pytest.raises(ValueError, match="PagedCache: got 2 sequences, expected 1"):
        logits(model, cache, ids[:1], torch.ones(1, 12))
    with pytest.raises(ValueError, match="attention_mask: got other padding"):
        logits(model, cache, ids, torch.ones(2, 12))
    with pytest.raises(ValueError, match="attention_mask: got other padding"):
        logits(model, cache, ids)
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(cache)
    assert cache.get_seq_length() == 6


def test_geometry_of_the_model(model):
    cache = PagedCache.for_model(model.bfloat16(), 100, 2)
    model.float()
    assert cache.pages.dtype == torch.bfloat16
    assert cache.pages.num_pages == 2
    assert (cache.pages.num_layers, cache.pages.kv_heads, cache.pages.head_dim) == (3, 2, 16)
    assert isinstance(cache.pages, VstCache)
    assert "0 sequences of 0 tokens" in repr(cache)
    with pytest.raises(ValueError, match="tokens: got 0"):
        PagedCache.for_model(model, 0)
