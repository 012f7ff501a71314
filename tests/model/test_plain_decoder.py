"""A memory as a cache of a plain Qwen2 with the same weights, and back."""

import pytest
import torch
from helpers.decoders import CACHE
from helpers.model_goldens import load_golden
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM, StaticCache

from vxl_kernels.integrations.transformers import register, skip_cached

pytestmark = pytest.mark.core

QUESTION = torch.tensor([9, 10, 11, 12])
NEW = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module")
def model():
    return load_golden("tiny_r4_w48")[2]


@pytest.fixture(scope="module")
def plain(model):
    """A Qwen2 that knows no video, with the model's weights."""
    config = Qwen2Config.from_dict(model.config.to_dict())
    decoder = Qwen2ForCausalLM(config).eval()
    weights = model.state_dict()
    decoder.load_state_dict({name: weights[name] for name in decoder.state_dict()})
    return decoder


def watch(model, tokens=109, seed=3):
    """Two windows, and a rest that questions see though it is not a window."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(tokens, model.config.hidden_size, generator=generator)
    return model.watch(input_ids=[5, 6, 7], visual_features=features)


@pytest.fixture(scope="module")
def memory(model):
    return watch(model)


def answer(plain, inputs, **options):
    start = inputs["input_ids"].shape[1]
    inputs[CACHE] = inputs.pop("past_key_values")
    return plain.generate(**inputs, **{**NEW, **options})[:, start:]


@pytest.mark.parametrize("attention", ["sdpa", "eager", "vxl"])
def test_greedy(plain, memory, attention):
    register()
    plain.set_attn_implementation(attention)
    truth = memory.ask(QUESTION, **NEW)
    assert torch.equal(answer(plain, memory.generate_inputs(QUESTION))[0], truth)
    plain.set_attn_implementation("sdpa")


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"repetition_penalty": 1.5}])
def test_other_modes(plain, memory, options):
    truth, inputs = memory.ask(QUESTION, **{**NEW, **options}), memory.generate_inputs(QUESTION)
    inputs["past_key_values"].batch_repeat_interleave(options.get("num_beams", 1))
    assert torch.equal(answer(plain, inputs, **options)[0], truth)


def test_candidates(plain, memory):
    """What `generate` of a memory refuses: assisted decoding and prompt lookup."""
    truth = memory.ask(QUESTION, **NEW)
    one_layer = {"num_hidden_layers": 1, "layer_types": ["full_attention"]}
    small = Qwen2Config.from_dict({**plain.config.to_dict(), **one_layer})
    for options in (
        {"assistant_model": Qwen2ForCausalLM(small).eval()},
        {"prompt_lookup_num_tokens": 2},
    ):
        with skip_cached(plain):
            new = answer(plain, memory.generate_inputs(QUESTION), **options)
        assert torch.equal(new[0], truth)


def test_contrastive_search_is_refused(plain, memory):
    """It is not a part of transformers 5 but code on the Hub. It needs hidden states of all tokens,
    which neither a memory nor a cache holds."""
    options = {"penalty_alpha": 0.6, "top_k": 4}
    calls = (
        lambda: answer(plain, memory.generate_inputs(QUESTION), do_sample=False, **options),
        lambda: memory.ask(QUESTION, **{**NEW, **options}),
    )
    for call in calls:
        with pytest.raises(ValueError, match="Contrastive Search"):
            call()


def test_several_rows(plain, memory):
    """Rollouts: one video, many answers."""
    inputs = memory.generate_inputs(QUESTION, rows=3)
    assert inputs["past_key_values"].get_seq_length() == memory.cached_tokens[0]
    new = answer(plain, inputs)
    assert torch.equal(new, memory.ask(QUESTION, **NEW).expand(3, -1))


@pytest.mark.parametrize("rows", [1, 2])
def test_way_back(plain, memory, rows):
    """A question, its answer and a second question: the same ids as in one piece."""
    inputs = memory.generate_inputs(QUESTION, rows)
    cache = inputs["past_key_values"]
    first = answer(plain, inputs)
    before = memory.cached_tokens
    longer = memory.from_cache(cache)
    assert memory.cached_tokens == before
    assert longer.cached_tokens == [before[0] + len(QUESTION) + first.shape[1] - 1] * rows
    more = torch.tensor([20, 21])
    again = longer.ask(torch.cat([first[:, -1:], more.expand(rows, -1)], 1), **NEW)
    whole = memory.ask(torch.cat([QUESTION, first[0], more]), **NEW)
    assert torch.equal(again, whole.expand(rows, -1))
    for layer in range(len(cache.layers)):
        k, v = longer.keys_values(layer, rows - 1)
        assert torch.equal(k, cache.layers[layer].keys[-1].transpose(0, 1))
        assert torch.equal(v, cache.layers[layer].values[-1].transpose(0, 1))
    with pytest.raises(ValueError, match="has ended"):
        longer[0].append(visual_features=torch.zeros(4, 64))


def test_nothing_new(memory):
    assert memory.from_cache(memory.to_cache()).cached_tokens == memory.cached_tokens


def test_refusals(model, plain, memory):
    with pytest.raises(ValueError, match="rows: got 0"):
        memory.to_cache(0)
    with pytest.raises(ValueError, match="question: got shape"):
        memory.generate_inputs(QUESTION[None])
    with pytest.raises(ValueError, match="cache: got a StaticCache"):
        memory.from_cache(StaticCache(config=plain.config, max_cache_len=8))
    with pytest.raises(ValueError, match="cache: got an empty one"):
        memory.from_cache(DynamicCache())
    other = watch(model, seed=4).to_cache()
    with pytest.raises(ValueError, match="cache: got other tokens in row 0"):
        memory.from_cache(other)
    short = memory.to_cache()
    short.crop(-1)
    with pytest.raises(ValueError, match=f"cache: got {memory.cached_tokens[0] - 1} tokens"):
        memory.from_cache(short)


def test_videos_of_several_lengths(model):
    ids = torch.tensor([[5, -200, 9], [5, -200, 9]])
    features = [torch.randn(n, model.config.hidden_size) for n in (96, 60)]
    both = model(ids, visual_features=features).memory
    with pytest.raises(ValueError, match=r"to_cache: got videos of .* memory\[i\].to_cache"):
        both.to_cache()
    assert both[1].to_cache().get_seq_length() == both.cached_tokens[1]
