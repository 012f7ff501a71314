"""Calls of forward, generate and ask as other models of transformers take them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.model_goldens import TINY, load_golden, relative, tiny_expected, tiny_model
from transformers import AutoModel, Trainer, TrainingArguments

from examples.demo_clip import byte_tokenizer
from vxl_model import VideoXLConfig, VideoXLForConditionalGeneration

pytestmark = pytest.mark.core

IDS = torch.tensor([[5, 6, 7, -200, 9, 10, 11]])
TEXT = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


@pytest.fixture(scope="module")
def model():
    return load_golden("tiny_r4_w48")[2]


@pytest.fixture(scope="module")
def video(model):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(108, model.config.hidden_size, generator=generator) * 0.1


def refused_before(model, monkeypatch, call, words):
    """The call is refused, and no row went through the decoder."""
    with monkeypatch.context() as patch:
        patch.setattr(type(model.model), "run", lambda *_: pytest.fail("computed first"))
        with pytest.raises(ValueError, match=words):
            call()


# -- forward ------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", [False, True])
def test_hidden_states_are_those_of_the_text_rows(model, video, labels):
    more = {"labels": IDS.clamp(min=0)} if labels else {}
    out = model(IDS, visual_features=[video], output_hidden_states=True, **more)
    assert len(out.hidden_states) == model.config.num_hidden_layers + 1
    assert all(x.shape == (1, 3, model.config.hidden_size) for x in out.hidden_states)
    embedded = model.model.embed_tokens(IDS[:, 4:])
    assert torch.equal(out.hidden_states[0], embedded)
    assert torch.allclose(model.lm_head(out.hidden_states[-1]), out.logits, atol=1e-6)
    assert model(IDS, visual_features=[video]).hidden_states is None


def test_hidden_states_of_a_padded_batch_and_of_kept_logits(model, video):
    ids = torch.tensor([[1, 1, 5, -200, 9, 10], [5, 6, 7, -200, 9, 10]])
    mask = (ids != 1).long()
    arguments = {"visual_features": [video, video], "attention_mask": mask}
    out = model(ids, **arguments, output_hidden_states=True, logits_to_keep=1)
    assert out.logits.shape[:2] == out.hidden_states[1].shape[:2] == (2, 1)
    alone = model(ids[:1, 2:], visual_features=[video], output_hidden_states=True)
    for got, want in zip(out.hidden_states, alone.hidden_states, strict=True):
        assert torch.allclose(got[0], want[0, -1:], atol=1e-6)


def test_generate_returns_hidden_states(model, video):
    out = model.generate(
        IDS,
        visual_features=[video],
        max_new_tokens=3,
        do_sample=False,
        output_hidden_states=True,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert [step[-1].shape[1] for step in out.hidden_states] == [1, 1, 1]
    for step, logits in zip(out.hidden_states, out.logits, strict=True):
        assert torch.allclose(model.lm_head(step[-1])[:, -1], logits, atol=1e-6)


@pytest.mark.parametrize("call", ["forward", "generate", "configuration", "base"])
def test_attentions_are_refused_before_anything_is_computed(model, video, monkeypatch, call):
    wanted = {"output_attentions": True}
    if call == "configuration":
        monkeypatch.setattr(model.generation_config, "output_attentions", True)
        wanted = {}
    generate = lambda: model.generate(IDS, visual_features=[video], **wanted)  # noqa: E731
    calls = {
        "generate": generate,
        "configuration": generate,
        "base": lambda: model.model(TEXT, **wanted),
    }
    forward = lambda: model(IDS, visual_features=[video], **wanted)  # noqa: E731
    refused_before(model, monkeypatch, calls.get(call, forward), "output_attentions: got True")


def test_tuples(model, video):
    out = model(IDS, visual_features=[video], return_dict=False)
    assert isinstance(out, tuple)
    assert torch.equal(out[0], model(IDS, visual_features=[video]).logits)
    changed = copy.deepcopy(model.config)
    changed.return_dict = False
    again = VideoXLForConditionalGeneration(changed).eval()
    again.load_state_dict(model.state_dict())
    loss, logits, *_ = again(TEXT, labels=TEXT)
    assert loss.ndim == 0
    assert logits.shape == (2, 4, model.config.vocab_size)
    assert isinstance(again.model(TEXT), tuple)


def test_embeddings_in_place_of_ids(model, video):
    embeds = model.model.embed_tokens(TEXT).detach()
    assert torch.equal(model(inputs_embeds=embeds).logits, model(TEXT).logits)
    memory = model.watch(input_ids=[5, 6], visual_features=video)
    one = model(inputs_embeds=embeds[:1], memory=memory)
    assert torch.equal(one.logits, model(TEXT[:1], memory=memory).logits)
    next_one = model(inputs_embeds=embeds[:1, :1], cache=one.cache).logits
    want = model(torch.cat([TEXT[:1], TEXT[:1, :1]], 1), memory=memory).logits[:, -1:]
    assert torch.allclose(next_one, want, atol=1e-5)
    embeds.requires_grad_()
    out = model(inputs_embeds=embeds, labels=TEXT)
    assert float(out.loss.detach()) == pytest.approx(float(model(TEXT, labels=TEXT).loss.detach()))
    out.loss.backward()
    assert float(embeds.grad.abs().max()) > 0
    for wrong, words in (
        ({"input_ids": TEXT, "inputs_embeds": embeds}, "input_ids and inputs_embeds: got both"),
        ({"inputs_embeds": embeds[0]}, "inputs_embeds: got shape"),
        ({"inputs_embeds": embeds, "visual_features": [video, video]}, "inputs_embeds: got visual"),
    ):
        with pytest.raises(ValueError, match=words):
            model(**wrong)


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_from_embeddings(model, beams):
    embeds = model.model.embed_tokens(TEXT).detach()
    options = {"max_new_tokens": 4, "num_beams": beams, "do_sample": False}
    want = model.generate(TEXT, **options)[:, TEXT.shape[1] :]
    assert torch.equal(model.generate(inputs_embeds=embeds, **options), want)


def test_positions_are_checked(model, video, monkeypatch):
    for good in ([[0, 1, 2, 3]], [[7, 8, 9, 10]], [[0, 1, 2, 3], [5, 6, 7, 8]]):
        assert torch.equal(model(TEXT, position_ids=torch.tensor(good)).logits, model(TEXT).logits)
    padded = torch.tensor([[1, 5, 6, 7]])
    mask, positions = (padded != 1).long(), torch.tensor([[0, 0, 1, 2]])
    model(padded, attention_mask=mask, position_ids=positions)
    for wrong, words in (
        ([[0, 1, 0, 1]], "position_ids: got a step of -1 after column 1 of row 0"),
        ([[0, 1]], "position_ids: got shape"),
        ([[0, 1, 2, 3]] * 3, "position_ids: got 3 rows"),
    ):
        call = lambda ids=wrong: model(TEXT, position_ids=torch.tensor(ids))  # noqa: E731
        refused_before(model, monkeypatch, call, words)
        with pytest.raises(ValueError, match="position_ids"):
            model.model(TEXT, position_ids=torch.tensor(wrong))


def test_the_model_without_its_head(model):
    ids = torch.tensor([[1, 1, 5, 6], [7, 8, 9, 10], [1, 5, 6, 1]])
    mask = (ids != 1).long()
    out = model.model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    logits = model(ids, attention_mask=mask).logits
    assert torch.allclose(model.lm_head(out.last_hidden_state), logits, atol=1e-5)
    assert not bool(out.last_hidden_state[0, :2].any())
    assert len(out.hidden_states) == model.config.num_hidden_layers + 1
    embeds = model.model.embed_tokens(ids)
    again = model.model(inputs_embeds=embeds, attention_mask=mask)
    assert torch.equal(again.last_hidden_state, out.last_hidden_state)
    assert again.last_hidden_state.requires_grad
    for wrong in ({}, {"input_ids": ids, "inputs_embeds": embeds}):
        with pytest.raises(ValueError, match="input_ids and inputs_embeds"):
            model.model(**wrong)
    with pytest.raises(ValueError, match="input_ids: got -200"):
        model.model(IDS)
    loaded = AutoModel.from_pretrained(TINY)
    assert loaded(TEXT).last_hidden_state.shape == (2, 4, loaded.config.hidden_size)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_model_without_its_head_sees_videos(model, video, side):
    """As its head with `num_items_in_batch`: each column predicts the next one, -200 included."""
    row = IDS[0].tolist()
    shorter, text = [row[0], *row[3:]], [*row[:2], *row[-1:]]
    rows = [x + [1] * (len(row) - len(x)) for x in (row, shorter, text)]
    if side == "left":
        rows = [[1] * (len(row) - len(x)) + x for x in (row, shorter, text)]
    ids = torch.tensor(rows)
    given = {"attention_mask": (ids != 1).long(), "visual_features": [video, video[:40], None]}
    out = model.model(ids, **given, output_hidden_states=True)
    want = model(ids, **given, num_items_in_batch=1, output_hidden_states=True)
    # PyTorch's product of other rows at once may have other bits.
    assert torch.allclose(model.lm_head(out.last_hidden_state), want.logits, atol=1e-5)
    assert len(out.hidden_states) == len(want.hidden_states)
    assert all(map(torch.equal, out.hidden_states, want.hidden_states))
    model.ratio = 2  # of the model and of its head
    other = model.model(ids, **given).last_hidden_state
    model.ratio = None
    assert not torch.equal(other, out.last_hidden_state)
    assert torch.equal(model.model(ids, **given, ratio=2).last_hidden_state, other)


# -- ask ----------------------------------------------------------------------------------------


def test_several_answers_and_whole_outputs(model, video):
    memory = model.watch(input_ids=[5], visual_features=video)
    several = {"do_sample": True, "num_return_sequences": 3}
    assert memory.ask(torch.tensor([9, 10]), 4, **several).shape == (3, 4)
    plain = memory.ask(torch.tensor([9, 10]), 4)
    out = memory.ask(torch.tensor([9, 10]), 4, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(out.sequences[0], plain)
    assert len(out.scores) == 4


def test_stop_strings(model, video):
    """With -200 in the prompt, and by `ask`, which knows the tokenizer."""
    tokenizer = byte_tokenizer(model.config.vocab_size)
    options = {"visual_features": [video], "max_new_tokens": 8, "do_sample": False}
    whole = model.generate(IDS, **options)[0, IDS.shape[1] :]
    stop = tokenizer.decode(whole[1:3])
    assert len(stop) == 2
    cut = model.generate(IDS, stop_strings=[stop], tokenizer=tokenizer, **options)
    assert torch.equal(cut[0, IDS.shape[1] :], whole[:3])


# -- conversations ------------------------------------------------------------------------------


def test_a_conversation_reads_each_turn_once(model, video, monkeypatch):
    memory = model.watch(input_ids=[5, 6], visual_features=video)
    turns = [torch.tensor([9, 10, 11]), torch.tensor([12, 13]), torch.tensor([14])]
    rows, run = [], type(model.model).run

    def counted(self, hidden, context, *rest, **named):
        rows.append(hidden.shape[1])
        return run(self, hidden, context, *rest, **named)

    talk, whole = memory.conversation(), []
    for turn in turns:
        whole += turn.tolist()
        want = memory.ask(torch.tensor(whole), 4)
        rows.clear()
        with monkeypatch.context() as patch:
            patch.setattr(type(model.model), "run", counted)
            answer = talk.ask(turn, 4)
        assert torch.equal(answer, want)
        # The turn, the last id of the answer before it, and all but the last new id.
        first = len(turn) + (len(talk.turns) > 1)
        assert rows == [first] + [1] * (len(answer) - 1)
        whole += answer.tolist()
    assert memory.cached_tokens != talk.memory.cached_tokens
    assert [question.tolist() for question, _ in talk.turns] == [x.tolist() for x in turns]
    for wrong in ({"num_beams": 2}, {"num_return_sequences": 2}):
        with pytest.raises(ValueError, match="1 in a conversation"):
            talk.ask(turns[0], 4, **wrong)
    two = model(torch.cat([IDS, IDS]), visual_features=[video, video]).memory
    with pytest.raises(ValueError, match="a memory of 2 videos"):
        two.conversation()


# -- configuration ------------------------------------------------------------------------------


def test_the_tower_has_a_configuration():
    config = VideoXLConfig.from_pretrained(TINY)
    assert config.vision_config.hidden_size == 32
    assert set(config.sub_configs) == {"vision_config"}
    released = VideoXLConfig(mm_vision_tower="openai/clip-vit-large-patch14-336")
    assert released.vision_config.num_hidden_layers == 24
    assert released.published_vision() is None  # the name tells the shape
    assert "vision_config" not in released.published()
    assert VideoXLConfig().vision_config is None


@pytest.mark.parametrize("how", ["from_pretrained", "setter", "tower alone"])
def test_the_attention_of_the_tower_can_be_chosen(how, monkeypatch):
    if how == "from_pretrained":
        model = tiny_model(attn_implementation="eager")
    elif how == "tower alone":
        model = tiny_model(attn_implementation={"vision_config": "eager"})
    else:
        model = tiny_model()
        model.set_attn_implementation("eager")
    layer = model.model.vision_tower.vision_tower.vision_model.encoder.layers[0]
    assert layer.self_attn.config._attn_implementation == "eager"
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *_, **__: pytest.fail("SDPA"))
    next(model.encode_pixels(tiny_expected()["pixel_values"][:1]))


# -- Trainer ------------------------------------------------------------------------------------


def trainer(model, video, folder, metrics=None, **options):
    ids, labels = IDS[0], IDS[0].masked_fill(IDS[0] < 0, -100)
    data = [{"input_ids": ids, "labels": labels, "visual_features": video}] * 2
    arguments = TrainingArguments(
        str(folder),
        max_steps=1,
        use_cpu=True,
        report_to=[],
        remove_unused_columns=False,
        save_strategy="no",
        per_device_eval_batch_size=2,
        **options,
    )

    def collated(batch):
        return {
            "input_ids": torch.stack([x["input_ids"] for x in batch]),
            "labels": torch.stack([x["labels"] for x in batch]),
            "visual_features": [x["visual_features"] for x in batch],
        }

    return Trainer(
        copy.deepcopy(model),
        arguments,
        train_dataset=data,
        eval_dataset=data,
        data_collator=collated,
        compute_metrics=metrics,
    )


def test_label_smoothing(model, video, tmp_path):
    """The logits of a loss that the caller computes have the columns of the labels, and give the
    loss that the model computes."""
    made = trainer(model, video, tmp_path, label_smoothing_factor=0.1)
    made.train()
    assert made.evaluate()["eval_loss"] > 0
    labels = IDS.masked_fill(IDS < 0, -100)
    tokens = torch.tensor(5)
    arguments = {"visual_features": [video], "num_items_in_batch": tokens}
    logits = model(IDS, **arguments).logits
    assert logits.shape[:2] == IDS.shape
    want = model(IDS, labels=labels, **arguments).loss
    shifted = F.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum") / tokens
    assert float(shifted.detach()) == pytest.approx(float(want.detach()), rel=1e-5)


def test_predictions_are_gathered_without_the_memory(model, video, tmp_path):
    made = trainer(model, video, tmp_path)
    found = made.predict(made.eval_dataset)
    assert found.predictions.shape[:2] == found.label_ids.shape


@pytest.mark.parametrize("how", ["float32", "autocast", "bfloat16"])
def test_evaluation_with_metrics(model, video, tmp_path, how):
    """Logits and labels of the metrics fit column by column: the right tokens are found where the
    labels are the model's own."""
    ids, given = IDS, {"visual_features": [video], "num_items_in_batch": 1}
    with torch.no_grad():
        logits = model(ids, **given).logits[0]
    own = torch.cat([ids[0, :1], logits[:-1].argmax(-1)]).masked_fill(ids[0] < 0, -100)
    found = []

    def metrics(prediction):
        found.append(prediction)
        said, wanted = prediction.predictions[:, :-1].argmax(-1), prediction.label_ids[:, 1:]
        return {"accuracy": float((said == wanted)[wanted != -100].mean())}

    chosen = copy.deepcopy(model)
    chosen = chosen.bfloat16() if how == "bfloat16" else chosen
    made = trainer(chosen, video, tmp_path, metrics, bf16=how == "autocast")
    for row in made.eval_dataset:
        row["labels"] = own
    result = made.evaluate()
    error = relative(torch.as_tensor(found[0].predictions[0]), logits)
    assert error < (1e-5 if how == "float32" else 0.02)
    assert result["eval_accuracy"] == 1
    supervised = F.cross_entropy(logits[:-1], own[1:])
    assert result["eval_loss"] == pytest.approx(float(supervised), rel=0.02)
