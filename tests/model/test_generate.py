"""Batches, beams, sampling, streamers and stopping criteria through HF's `generate`."""

import itertools

import pytest
import torch
from helpers.model_goldens import input_ids, load_golden, small_model
from transformers import MaxTimeCriteria, StoppingCriteria, StoppingCriteriaList, TextStreamer
from transformers.generation.streamers import BaseStreamer

from vxl_model import WindowRatios

pytestmark = pytest.mark.core

LENGTHS = [108, 61, 200, 48]


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def videos(model):
    generator = torch.Generator().manual_seed(3)
    hidden = model.config.hidden_size
    return [torch.randn(n, hidden, generator=generator) * 0.1 for n in LENGTHS]


def ids_of(*tails, prompt=(5, 6, 7)):
    """Rows with equal prefixes and left-padded suffixes, and their mask."""
    rows = [[*prompt, -200, *tail] for tail in tails]
    width = max(map(len, rows))
    ids = torch.tensor([[1] * (width - len(r)) + r for r in rows])
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
    return ids, mask


TAILS = [[9, 10, 11], [12], [13, 14, 15, 16, 17], [18, 19]]


def test_batch_gives_the_same_bits_as_alone(model, videos):
    ids, mask = ids_of(*TAILS)
    together = model(ids, visual_features=videos, attention_mask=mask)
    generated = model.generate(
        ids,
        visual_features=videos,
        attention_mask=mask,
        max_new_tokens=6,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    for i, tail in enumerate(TAILS):
        one = ids_of(tail)[0]
        alone = model(one, visual_features=[videos[i]])
        assert torch.equal(together.logits[i, -len(tail) :], alone.logits[0])
        assert together.memory.vst_counts[i] == alone.memory.vst_counts[0]
        for layer in range(model.config.num_hidden_layers):
            for a, b in zip(
                together.memory.keys_values(layer, i), alone.memory.keys_values(layer), strict=True
            ):
                assert torch.equal(a, b)
        single = model.generate(
            one,
            visual_features=[videos[i]],
            max_new_tokens=6,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        assert torch.equal(generated.sequences[i, ids.shape[1] :], single.sequences[0, -6:])
        for a, b in zip(generated.logits, single.logits, strict=True):
            assert torch.equal(a[i], b[0])


def test_one_product_for_the_batch_is_close(model, videos):
    ids, mask = ids_of(*TAILS)
    options = {"visual_features": videos, "attention_mask": mask, "do_sample": False}
    options |= {"output_logits": True, "return_dict_in_generate": True, "max_new_tokens": 4}
    exact = torch.stack(model.generate(ids, **options).logits)
    model.settings.batch_invariant = False
    try:
        fast = torch.stack(model.generate(ids, **options).logits)
    finally:
        model.settings.batch_invariant = True
    assert torch.allclose(exact, fast, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_both_names_of_the_cache(model, videos, name):
    """HF renamed a model's cache. A loop with either name works."""
    ids, _ = ids_of([9, 10])
    out = model(ids, visual_features=videos[:1])
    for got in (getattr(out, name), out[name], out.get(name)):
        assert got is out.memory.batch
    assert name in out
    assert list(out) == ["logits", "memory"]  # once, though it has three names
    expected = model.generate(ids, visual_features=videos[:1], max_new_tokens=4, do_sample=False)
    for step in range(4):
        ids = torch.cat([ids, out.logits[:, -1:].argmax(-1)], dim=1)
        if step % 2:
            out = model(**model.prepare_inputs_for_generation(ids, **{name: out[name]}))
        else:
            out = model(ids[:, -1:], **{name: out[name]})
    assert torch.equal(ids, expected)


def test_a_pass_with_gradients_has_no_cache(model, videos):
    ids, _ = ids_of([9, 10])
    out = model(ids, visual_features=[videos[0].clone().requires_grad_()])
    for name in ("past_key_values", "cache", "memory"):
        assert name not in out
        assert out.get(name, "none") == "none"
        assert getattr(out, name) is None


def test_padding_is_never_seen(model, videos):
    ids, mask = ids_of([9, 10, 11])
    plain = model(ids, visual_features=videos[:1])
    for left, right in ((3, 0), (0, 2), (2, 4)):
        for filler in (0, 100):
            pad = (left, right)
            padded = torch.nn.functional.pad(ids, pad, value=filler)
            masked = torch.nn.functional.pad(mask, pad)
            out = model(padded, visual_features=videos[:1], attention_mask=masked)
            assert torch.equal(out.logits[:, : 3 if right else None], plain.logits)
            assert not out.logits[:, 3:].any()


def test_beams_match_a_search_over_everything(model, videos):
    """Two steps, with enough beams for every continuation that matters. The expected result scores
    each pair alone."""
    ids, _ = ids_of([9, 10])
    features = videos[:1]
    beams = model.generate(
        ids,
        visual_features=features,
        max_new_tokens=2,
        num_beams=8,
        do_sample=False,
        eos_token_id=None,
        length_penalty=0.0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    memory = model(ids, visual_features=features).memory
    first = model(ids, visual_features=features).logits[0, -1].log_softmax(-1)
    best = (-float("inf"), None)
    for token in first.topk(8).indices.tolist():
        out = model(torch.tensor([[token]]), memory=memory)
        second = out.logits[0, -1].log_softmax(-1)
        score = float(first[token] + second.max())
        best = max(best, (score, [token, int(second.argmax())]))
    assert beams.sequences[0, -2:].tolist() == best[1]
    assert float(beams.sequences_scores[0]) == pytest.approx(best[0], rel=1e-4)


def test_beams_encode_the_video_once(model, videos, monkeypatch):
    calls = []
    run = type(model.model).run

    def counted(self, hidden, context, *rest):
        calls.append(context.layout)
        return run(self, hidden, context, *rest)

    monkeypatch.setattr(type(model.model), "run", counted)
    ids, mask = ids_of(*TAILS[:2])
    out = model.generate(
        ids,
        visual_features=videos[:2],
        attention_mask=mask,
        max_new_tokens=5,
        num_beams=3,
        num_return_sequences=3,
        do_sample=False,
    )
    assert out.shape[0] == 6
    windows = sum(-(-n // 48) for n in LENGTHS[:2])
    assert sum(layout.chunks for layout in calls if layout is not None) == windows


def test_beams_in_a_batch_are_beams_alone(model, videos):
    ids, mask = ids_of(*TAILS[:3])
    options = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False}
    together = model.generate(ids, visual_features=videos[:3], attention_mask=mask, **options)
    for i, tail in enumerate(TAILS[:3]):
        alone = model.generate(ids_of(tail)[0], visual_features=[videos[i]], **options)
        assert together[i, ids.shape[1] :].tolist() == alone[0, -5:].tolist()


def test_sampling_is_seeded(model, videos):
    ids, _ = ids_of([9, 10])
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        out = model.generate(
            ids,
            visual_features=videos[:1],
            max_new_tokens=12,
            do_sample=True,
            temperature=5.0,
            top_k=0,
        )
        draws.append(out.tolist())
    assert draws[0] == draws[1] != draws[2]


def test_processors_ignore_the_placeholder(model, videos):
    ids, _ = ids_of([9, 10])
    out = model.generate(
        ids,
        visual_features=videos[:1],
        max_new_tokens=6,
        do_sample=False,
        repetition_penalty=1.5,
        no_repeat_ngram_size=2,
    )
    new = out[0, ids.shape[1] :].tolist()
    assert len(set(itertools.pairwise(new))) == len(new) - 1
    assert out[0, : ids.shape[1]].tolist() == ids[0].tolist()


class Collect(BaseStreamer):
    def __init__(self):
        self.seen, self.ended = [], False

    def put(self, value):
        self.seen += value.flatten().tolist()

    def end(self):
        self.ended = True


class StopAt(StoppingCriteria):
    def __init__(self, tokens):
        self.tokens = tokens

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.tokens)


def test_streamer_and_stopping_criteria(model, videos):
    ids, _ = ids_of([9, 10])
    streamer = Collect()
    criteria = StoppingCriteriaList([StopAt(ids.shape[1] + 4), MaxTimeCriteria(60)])
    out = model.generate(
        ids,
        visual_features=videos[:1],
        max_new_tokens=50,
        do_sample=False,
        streamer=streamer,
        stopping_criteria=criteria,
    )
    assert out.shape[1] == ids.shape[1] + 4
    assert streamer.seen == [i for i in out[0].tolist() if i != -200]
    assert streamer.ended


def test_text_streamer_decodes_no_placeholder(model, videos, capsys):
    class Tokenizer:
        def decode(self, ids, **options):
            assert min(int(i) for i in ids) >= 0
            return " ".join(str(int(i)) for i in ids) + " "

    ids, _ = ids_of([9, 10])
    model.generate(
        ids,
        visual_features=videos[:1],
        max_new_tokens=3,
        do_sample=False,
        streamer=TextStreamer(Tokenizer()),
    )
    assert "9 10" in capsys.readouterr().out


def test_eos_ends_a_row_and_not_its_neighbour(model, videos):
    ids, mask = ids_of(*TAILS[:2])
    options = {"visual_features": videos[:2], "attention_mask": mask, "do_sample": False}
    free = model.generate(ids, max_new_tokens=6, **options)[:, ids.shape[1] :]
    eos = int(free[0, 2])
    assert eos not in free[1].tolist()
    out = model.generate(ids, max_new_tokens=6, eos_token_id=eos, pad_token_id=0, **options)
    out = out[:, ids.shape[1] :]
    stop = free[0].tolist().index(eos) + 1
    assert out[0].tolist() == free[0, :stop].tolist() + [0] * (6 - stop)
    assert out[1].tolist() == free[1].tolist()


def test_text_alone(model):
    ids = torch.tensor([[3, 4, 5, 6]])
    out = model(ids)
    assert out.logits.shape == (1, 4, model.config.vocab_size)
    new = model.generate(ids, max_new_tokens=3, do_sample=False)
    step = model(new[:, :-1]).logits[0, -3:].argmax(-1)
    assert step.tolist() == new[0, -3:].tolist()


def test_ratios(model, videos):
    ids, _ = ids_of([9])

    def sizes(ratio):
        memory = model(ids, visual_features=videos[2:3], ratio=ratio).memory
        return memory.vst_counts[0][1:-1]

    assert sizes(8) == [6, 6, 6, 6, 1]
    assert sizes(WindowRatios([2, 4, 8, 16, 8])) == [24, 12, 6, 3, 1]
    drawn = sizes([2, 4, 8])
    assert drawn == sizes([2, 4, 8])  # the draw restarts
    assert set(drawn[:4]) <= {24, 12, 6}
    assert sizes(16)[-1] == 0  # 8 tokens are left, no VST
    model.ratio = 8
    try:
        assert sizes(None) == sizes(8)
    finally:
        model.ratio = None


def test_upstream_draw():
    case, tensors, model = load_golden("mixed_steprandom_w48")
    out = model(input_ids(tensors), visual_features=tensors["image_features"][None])
    assert out.memory.vst_counts == [case["beacon_sizes"]]
    mixed = model(
        torch.cat([input_ids(tensors)] * 2), visual_features=[tensors["image_features"]] * 2
    )
    assert mixed.memory.vst_counts == [case["beacon_sizes"]] * 2
