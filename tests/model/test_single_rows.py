"""A decoding step of many sequences: each has the bits of a step with it only, and weights
are read once. Several questions in one call leave at their ends."""

import pytest
import torch
from helpers.model_goldens import random_features, small_model, wide_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import StoppingCriteria, StoppingCriteriaList

from vxl_model.decoder import projections, single_rows
from vxl_model.decoder.qwen2 import TextNorm
from vxl_model.streaming.batch import StreamBatch

PROMPT = [5, 6, 7]
QUESTIONS = [[9, 10, 11], [12], [13, 14, 15, 16, 17], [18, 19], [12, 13]]


@torch.no_grad()
def asked(model, questions=QUESTIONS):
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(100, model.config.hidden_size, generator=generator)
    memory = model.watch(input_ids=PROMPT, visual_features=features.to(model.dtype))
    states = memory.forks(len(questions)).states
    for state, question in zip(states, questions, strict=True):
        model.encoder().append_suffix([state], torch.tensor([question]), 1)
    return states


def step(model, states, ids):
    forks = StreamBatch([state.fork() for state in states])
    return model.decode_step(torch.tensor(ids)[:, None], forks).logits


def check_rows(model, most=40):
    states = asked(model)
    states = [states[i % len(states)] for i in range(most)]
    ids = [20 + i for i in range(most)]
    alone = torch.cat([step(model, [s], [i]) for s, i in zip(states, ids, strict=True)])
    assert len({tuple(row.flatten().tolist()) for row in alone}) == most
    for rows in (2, 3, 8, 17, most):
        assert torch.equal(step(model, states[:rows], ids[:rows]), alone[:rows])
    return alone


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_do_not_know_one_another(dtype, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check_rows(wide_model(dtype))
    finally:
        torch.set_num_threads(before)


def test_weights_are_read_once(monkeypatch):
    calls = []

    def counted(x, weight, bias=None, **options):
        calls.append(len(x))
        return torch.nn.functional.linear(x, weight, bias)

    for module in (projections, single_rows):
        monkeypatch.setattr(module, "invariant_linear", counted)
    model = wide_model()
    states = asked(model)
    calls.clear()
    step(model, states, [1, 2, 3, 4, 5])
    assert calls == [5] * (2 * 7 + 1)


def test_without_the_setting_products_are_pytorchs(monkeypatch):
    model = wide_model()
    states = asked(model)
    exact = step(model, states, [1, 2, 3, 4, 5])
    model.settings.batch_invariant = False
    for module in (projections, single_rows):
        monkeypatch.setattr(module, "invariant_linear", None)
    fast = step(model, states, [1, 2, 3, 4, 5])
    torch.testing.assert_close(exact, fast, rtol=1e-4, atol=1e-4)


class Doubled(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 2 * self.inner(x)


PLACES = ["self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj", "mlp.act_fn", "mlp",
          "input_layernorm"]  # fmt: skip


@pytest.mark.parametrize("way", ["module", "hook"])
@pytest.mark.parametrize("place", PLACES)
def test_a_module_that_is_more_is_called_with_one_sequence(place, way):
    model = wide_model()
    plain = check_rows(model, 6)
    seen = []
    for layer in model.model.layers:
        owner, _, name = place.rpartition(".")
        owner = layer.get_submodule(owner)
        module = getattr(owner, name)
        module.register_forward_pre_hook(lambda _, x: seen.append(len(x[0])))
        if way == "module":
            setattr(owner, name, Doubled(module))
        else:
            module.register_forward_hook(lambda _, x, out: 2 * out)
    assert not torch.equal(check_rows(model, 6), plain)
    batch = 6 if place == "input_layernorm" and way == "hook" else 1
    assert max(seen) <= batch


def test_compiled_norms_and_mlps_are_called_with_one_sequence():
    model = wide_model()
    for layer in model.model.layers:
        layer.compile_dense(backend="eager")
    check_rows(model, 6)


def test_an_unusually_wide_norm_is_called_with_one_row():
    norm = TextNorm(40000)
    x = torch.randn(20, 1, 40000)
    assert torch.equal(single_rows.norm_rows(norm, x), torch.cat([norm(r) for r in x.split(1)]))


@pytest.mark.parametrize(
    "what", ["plain", "weight's dtype", "weight's class", "hook", "subclass", "autocast"]
)
def test_norms_of_a_gpu_are_one_call(what, monkeypatch):
    """On a fake GPU. What is more than the norm is called with one sequence at a time."""
    fused, modules = [], []

    def recorded(x, shape, weight, eps):
        fused.append((x.shape, shape, weight.shape, eps))
        return x.clone()

    class Other(TextNorm):
        pass

    monkeypatch.setattr(single_rows, "rms_norm", recorded)
    monkeypatch.setattr(TextNorm, "forward", lambda self, x: modules.append(len(x)) or x.clone())
    # A CPU's PyTorch refuses to switch autocast of a GPU on.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: what == "autocast")
    norm = (Other if what == "subclass" else TextNorm)(16, eps=3e-5)
    if what == "hook":
        norm.register_forward_hook(lambda _, x, out: 2 * out)
    if what == "weight's class":  # as in tensor parallelism
        norm.weight = type("Part", (nn.Parameter,), {})(norm.weight.data)
    dtype = torch.float16 if what == "weight's dtype" else torch.float32
    with FakeTensorMode(), torch.no_grad():
        out = single_rows.norm_rows(norm, torch.empty(5, 1, 16, dtype=dtype, device="cuda"))
    assert out.shape == (5, 1, 16)
    plain = what == "plain"
    assert fused == ([((5, 1, 16), (16,), (16,), 3e-5)] if plain else [])
    assert modules == ([] if plain else [1] * 5)


def test_the_fused_norm_is_the_modules():
    """Up to rounding, an epsilon that counts included."""
    norm, x = TextNorm(64, eps=0.5).double(), torch.randn(3, 1, 64).double()
    norm.weight.data = torch.randn(64).double()
    fused = single_rows.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)
    torch.testing.assert_close(fused, norm(x), rtol=1e-6, atol=0)  # the module's sums are float32


# -- several questions in one call -----------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def memory(model):
    return model.watch(input_ids=PROMPT, visual_features=random_features(205))


OPTIONS = [
    {},
    {"repetition_penalty": 1.7},
    {"no_repeat_ngram_size": 2},
    {"min_length": 9},
    {"num_beams": 3},
    {"num_beams": 2, "num_return_sequences": 2},
    {"bad_words_ids": [[3], [4, 5]]},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_list_of_questions(model, memory, options):
    free = memory.ask(torch.tensor(QUESTIONS[0]), 8, eos_token_id=None)
    stops = sorted({int(free[3]), int(memory.ask(torch.tensor(QUESTIONS[3]), 8)[-1])})
    call = {"max_new_tokens": 8, "eos_token_id": stops, "pad_token_id": 1, **options}
    alone = [memory.ask(torch.tensor(q), **call) for q in QUESTIONS]
    together = memory.ask(QUESTIONS, **call)
    assert isinstance(together, list)
    for one, other in zip(alone, together, strict=True):
        if "num_return_sequences" in options:
            other = nn.utils.rnn.pad_sequence(other, batch_first=True, padding_value=1)
        assert one.tolist() == other.tolist()
    if not options:
        assert len({len(answer) for answer in together}) > 1  # they end at different steps


@pytest.mark.parametrize("name", ["bad_words_ids", "encoder_no_repeat_ngram_size", "sequence_bias"])
def test_padding_is_no_part_of_a_question(memory, name):
    """Padded with its id, a question of one id would look like several of it: what looks for
    several ids would find them."""
    [free] = memory.ask(torch.tensor([7]), 1, eos_token_id=None).tolist()
    options = {
        "bad_words_ids": {"bad_words_ids": [[7, 7, free]]},
        "sequence_bias": {"sequence_bias": [[[7, 7, 11], 99.0]]},
        "encoder_no_repeat_ngram_size": {
            "encoder_no_repeat_ngram_size": 2,
            "sequence_bias": [[[7], 99.0]],
        },
    }[name]
    call = {"max_new_tokens": 2, "eos_token_id": None, "pad_token_id": 0, **options}
    alone = memory.ask(torch.tensor([7]), **call)
    together = memory.ask([[7], [3, 4, 5, 6]], **call)
    assert together[0].tolist() == alone.tolist()


def test_rows_leave_at_their_end(model, memory, monkeypatch):
    answers = memory.ask(QUESTIONS, 8, eos_token_id=None)
    stop = int(answers[0][2])
    rows, run = [], type(model.model).run

    def counted(self, hidden, context, *rest):
        if hidden.shape[1] == 1 and rest[:1] == (None,):
            rows.append(len(hidden))
        return run(self, hidden, context, *rest)

    monkeypatch.setattr(type(model.model), "run", counted)
    cut = [a.tolist().index(stop) + 1 if stop in a else 8 for a in answers]
    got = memory.ask(QUESTIONS, 8, eos_token_id=stop, pad_token_id=0)
    assert [len(x) for x in got] == cut
    assert rows == [sum(n > done for n in cut) for done in range(1, max(cut))]
    for answer, full in zip(got, answers, strict=True):
        assert answer.tolist() == full[: len(answer)].tolist()


class StopAtRow(StoppingCriteria):
    """Ends row 1 after two new tokens, without an end token."""

    def __call__(self, input_ids, scores, **kwargs):
        ended = torch.zeros(len(input_ids), dtype=torch.bool)
        ended[1:2] = input_ids.shape[1] >= 5 + 2
        return ended


def test_ends_of_other_criteria(memory):
    plain = memory.ask(QUESTIONS, 6)
    got = memory.ask(
        QUESTIONS, 6, stopping_criteria=StoppingCriteriaList([StopAtRow()]), pad_token_id=0
    )
    for i, (one, other) in enumerate(zip(plain, got, strict=True)):
        assert other.tolist() == one[: 2 if i == 1 else 6].tolist()


def test_logits_of_rows_that_left_are_zero_and_others_unchanged(model, memory):
    ids = torch.tensor([[9, 10], [11, 12], [13, 14]])
    call = {"memory": memory, "max_new_tokens": 6, "output_logits": True, "pad_token_id": 0}
    call["return_dict_in_generate"] = call["output_hidden_states"] = True
    free = model.generate(ids, eos_token_id=None, **call)
    stop = int(free.sequences[1, 3])
    out = model.generate(ids, eos_token_id=stop, **call)
    ended = torch.zeros(3, dtype=torch.bool)
    for n, (a, b) in enumerate(zip(free.logits, out.logits, strict=False)):
        assert torch.equal(a[~ended], b[~ended])
        assert not b[ended].any()
        assert all(not x[ended].any() for x in out.hidden_states[n])
        ended |= out.sequences[:, 2 + n] == stop
    assert ended.any()


def test_a_question_for_each_video(model):
    ids = torch.tensor([[*PROMPT, -200, 9], [*PROMPT, -200, 10]])
    both = model(ids, visual_features=[random_features(n, n) for n in (60, 205)]).memory
    for options in ({}, {"no_repeat_ngram_size": 2}, {"num_beams": 2}):
        answers = both.ask([[9], [10, 11, 12]], 5, **options)
        for video, question, answer in zip(both, ([9], [10, 11, 12]), answers, strict=True):
            assert answer.tolist() == video.ask(question, 5, **options).tolist()
    with pytest.raises(ValueError, match="question: got 3 questions, expected 2, one for each"):
        both.ask([[9], [10], [11]], 5)


@pytest.mark.parametrize(
    ("question", "options", "message"),
    [
        (["a", [1]], {}, "question: got texts and ids in one list"),
        ([[1], []], {}, "question 1: got"),
        ([[1], [[1]]], {}, "question 1: got"),
        ([[1], [2]], {"streamer": object()}, "streamer: got a list of questions"),
        ([[1], [2]], {"return_dict_in_generate": True}, "return_dict_in_generate: got a list"),
        ([[1], [2]], {"answer_prefix": "x"}, "answer_prefix: got 'x', expected none with ids"),
        ([[1], [-200]], {}, "-200"),
    ],
)
def test_refusals(memory, question, options, message):
    with pytest.raises(ValueError, match=message):
        memory.ask(question, 2, **options)
