"""Texts of any lengths, read together with decoding steps. Each has the bits of a step with it
only. If one fails, none is read."""

import pytest
import torch
from helpers.model_goldens import random_features, small_model, wide_model
from torch import nn

from vxl_kernels import PoolExhausted
from vxl_model.decoder import context, projections, single_rows
from vxl_model.streaming.batch import StreamBatch

pytestmark = pytest.mark.core
# Two that are being answered, short questions, and one that is too long for a shared pass.
SIZES = [1, 17, 1, 5, 90, 64, 3]


def texts(sizes=SIZES):
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(1, 100, (n,), generator=generator) for n in sizes]


def videos(model, count=7):
    """Sequences of several memories, some of which share pages."""
    width = model.config.hidden_size
    shared = model.share_cache(4096)
    assert shared.pages.page_size == 128
    memories = []
    for tokens in (100, 205):
        features = torch.randn(tokens, width, generator=torch.Generator().manual_seed(tokens))
        features = features.to(model.dtype) * 0.1
        memories.append(model.watch(input_ids=[5, 6, 7], visual_features=features))
    return [memories[i % 2].forks(1).states[0] for i in range(count)]


def forks(states):
    return StreamBatch([state.fork() for state in states])


def kept(batch):
    found = []
    for state in batch.states:
        cache, seq = state.sequence.place
        found += [x for layer in range(cache.num_layers) for x in cache.gather(seq, layer)]
    return found


@torch.no_grad()
def read_alone(model, state, text):
    """Logits of the last token as a question's pass gives them."""
    hidden = model.encoder().append_suffix([state], text[None], 1)
    return single_rows.linear_rows(model.lm_head, hidden, None)[0, 0]


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_text_has_the_bits_that_it_has_alone(dtype, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        model = wide_model(dtype)
        states, given = videos(model), texts()
        together = forks(states)
        logits = model.text_step(given, together)
        tolerance = 1e-4 if dtype == torch.float32 else 0.05
        close = {"rtol": tolerance, "atol": tolerance}
        for i, (state, text) in enumerate(zip(states, given, strict=True)):
            alone = forks([state])
            assert torch.equal(model.text_step([text], alone)[0], logits[i])
            again = state.fork()
            if len(text) in (1, 90):  # longer than what shares a pass, or a decoding step
                assert torch.equal(read_alone(model, again, text), logits[i])
            else:
                torch.testing.assert_close(read_alone(model, again, text), logits[i], **close)
            assert again.sequence.length == together.states[i].sequence.length
            pairs = zip(kept(alone), kept(StreamBatch([together.states[i]])), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)
    finally:
        torch.set_num_threads(before)


def test_single_tokens_have_the_bits_of_a_decoding_step():
    model = wide_model()
    states, given = videos(model), texts()
    logits = model.text_step(given, forks(states))
    ones = [i for i, n in enumerate(SIZES) if n == 1]
    ids = torch.stack([given[i] for i in ones])
    decoded = model.decode_step(ids, forks([states[i] for i in ones])).logits[:, 0]
    assert torch.equal(logits[ones], decoded)
    # and what follows a question has those of an answer to it alone
    after = forks(states)
    model.text_step(given, after)
    ids = torch.arange(20, 20 + len(states))[:, None]
    step = model.decode_step(ids, after).logits
    for i, state in enumerate(states):
        alone = forks([state])
        model.text_step([given[i]], alone)
        assert torch.equal(model.decode_step(ids[i : i + 1], alone).logits[0], step[i])


def test_weights_are_read_once_for_short_texts(monkeypatch):
    model = wide_model()
    states, given = videos(model, 4), texts([1, 17, 1, 5])
    calls = []

    def counted(x, weight, bias=None, **options):
        calls.append(x.shape[:2])
        return nn.functional.linear(x, weight, bias)

    for module in (projections, single_rows):
        monkeypatch.setattr(module, "invariant_linear", counted)
    model.text_step(given, forks(states))
    first, last = [(1, 24)] * 7, [(1, 24)] * 3 + [(4, 1)] * 4
    assert calls == first + last + [(4, 1)]


def test_without_batch_invariance_all_go_together(monkeypatch):
    model = wide_model()
    states, given = videos(model), texts()
    exact = model.text_step(given, forks(states))
    model.settings.batch_invariant = False
    passes = []
    run = type(model.model).run

    def counted(self, hidden, *rest):
        passes.append(tuple(hidden.shape[:2]))
        return run(self, hidden, *rest)

    monkeypatch.setattr(type(model.model), "run", counted)
    fast = model.text_step(given, forks(states))
    assert passes == [(1, sum(SIZES))]
    torch.testing.assert_close(exact, fast, rtol=1e-4, atol=1e-4)


def test_a_device_without_ragged_kernels(monkeypatch):
    model = wide_model()
    states, given = videos(model), texts()
    want = model.text_step(given, forks(states))
    monkeypatch.setattr("vxl_model.streaming.encoder.serves", lambda *x: False)
    monkeypatch.setattr(context, "vst_attention_varlen", None)
    got = model.text_step(given, forks(states))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    for i, state in enumerate(states):
        assert torch.equal(model.text_step([given[i]], forks([state]))[0], got[i])


@pytest.mark.parametrize("place", ["self_attn.q_proj", "mlp.down_proj", "mlp", "input_layernorm"])
def test_other_modules_are_called_with_one_sequence(place):
    model = wide_model()
    states, given = videos(model), texts()
    for layer in model.model.layers:
        layer.get_submodule(place).register_forward_hook(lambda _, x, out: 2 * out)
    logits = model.text_step(given, forks(states))
    for i, state in enumerate(states):
        assert torch.equal(model.text_step([given[i]], forks([state]))[0], logits[i])


def test_compiled_layers_take_one_sequence_at_a_time():
    model = wide_model()
    states, given = videos(model), texts()
    for layer in model.model.layers:
        layer.compile_dense(backend="eager")
    logits = model.text_step(given, forks(states))
    for i, state in enumerate(states):
        assert torch.equal(model.text_step([given[i]], forks([state]))[0], logits[i])


def test_all_or_nothing(monkeypatch):
    """Where the long text fails, after the short ones were read, and where there is no room."""
    model = wide_model()
    states, given = videos(model), texts()
    want = model.text_step(given, forks(states))
    batch = forks(states)
    lengths = [state.sequence.length for state in batch.states]
    run = type(model.model).run

    def failing(self, hidden, *rest):
        if hidden.shape[1] == 90:
            raise RuntimeError("no memory")
        return run(self, hidden, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(type(model.model), "run", failing)
        with pytest.raises(RuntimeError, match="no memory"):
            model.text_step(given, batch)
    assert [state.sequence.length for state in batch.states] == lengths
    with pytest.raises(PoolExhausted):
        model.text_step(texts([1, 17, 1, 5, 5000, 64, 3]), batch)
    assert [state.sequence.length for state in batch.states] == lengths
    assert torch.equal(model.text_step(given, batch), want)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([[1]], "texts: got 1 texts, expected 2, one for each sequence"),
        ([[1], []], r"texts\[1\]: got shape \(0,\), expected ids"),
        ([[[1]], [1]], r"texts\[0\]: got shape \(1, 1\), expected ids"),
    ],
)
def test_refusals(given, message):
    model = small_model()
    memory = model.watch(input_ids=[5], visual_features=random_features(50))
    with pytest.raises(ValueError, match=message):
        model.text_step([torch.tensor(x, dtype=torch.long) for x in given], memory.forks(2))
