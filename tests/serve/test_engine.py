"""The engine: questions that are decoded together get the ids of `memory.ask`."""

import asyncio
import gc
import threading

import pytest
import torch
from helpers.paths import CHECKPOINT

from examples.demo_clip import byte_tokenizer
from vxl_model import VideoXLForConditionalGeneration, VideoXLProcessor
from vxl_serve.engine import Engine
from vxl_serve.questions import FullError, Question, TooLargeError
from vxl_serve.sampling import AnswerText, Chosen, Sampler, Sampling

TOKENS = 4096


@pytest.fixture(scope="module")
def model():
    model = VideoXLForConditionalGeneration.from_pretrained(CHECKPOINT)
    model.processor = VideoXLProcessor(byte_tokenizer(128))
    return model


@pytest.fixture
def engine(model):
    engine = Engine(model, TOKENS)
    yield engine
    engine.close()


def watched(model, tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(tokens, model.config.hidden_size, generator=generator)
    return model.watch(visual_features=features, input_ids=torch.arange(1, 9), ratio=4)


def asked(count, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 120, (3 + 2 * i,), generator=generator).tolist() for i in range(count)]


def alone(memory, ids, new=12):
    return memory.ask(ids, new, do_sample=False, eos_token_id=None).tolist()


async def ids_of(answer, index=0):
    return [event.chosen.token async for event in answer if event.index == index]


def together(engine, questions):
    """The ids of all questions, asked at once."""

    async def run():
        return await asyncio.gather(*(ids_of(engine.ask(question)) for question in questions))

    return asyncio.run(run())


def question(memory, ids, **sampling):
    return Question(ids, Sampling(max_tokens=12, **sampling), lambda: memory)


def free_pages(engine):
    engine.call(lambda: None).result()  # the step that has told its last token is over
    gc.collect()
    return engine.cache.pages.free_pages


def test_questions_about_several_videos_at_once_get_the_ids_of_ask(engine, model):
    memories = [watched(model, tokens, seed) for seed, tokens in enumerate((96, 130, 48))]
    pairs = [(memory, ids) for memory in memories for ids in asked(4)]
    wanted = [alone(memory, ids) for memory, ids in pairs]
    before = free_pages(engine)
    assert together(engine, [question(memory, ids) for memory, ids in pairs]) == wanted
    assert free_pages(engine) == before
    assert engine.steps < sum(map(len, wanted)) / 4  # they were decoded together


@pytest.mark.parametrize(("rows", "first_steps"), [(512, 1), (10, 4)])
def test_questions_that_wait_are_read_in_one_step_up_to_a_number_of_rows(
    engine, model, monkeypatch, rows, first_steps
):
    """Texts of 3, 3, 5, 5, 7 and 7 ids with 10 rows a step: two, two, one and one."""
    monkeypatch.setattr("vxl_serve.engine.QUESTION_ROWS", rows)
    memory, hold = watched(model, 96, 0), threading.Event()
    texts = [ids for ids in asked(3) for _ in range(2)]

    async def run():
        engine.call(hold.wait)
        answers = [engine.ask(question(memory, ids)) for ids in texts]
        hold.set()
        return await asyncio.gather(*map(ids_of, answers))

    assert asyncio.run(run()) == [alone(memory, ids) for ids in texts]
    assert engine.steps == 12 + first_steps - 1


def test_answers_of_questions_read_together_have_room_to_their_end(model):
    """Pages that further answers take after the step count for the questions after them."""
    engine = Engine(model, 10 * model.settings.page_size)
    memory, hold = watched(model, 48, 0), threading.Event()
    ids, tokens = [1, 2], model.settings.page_size

    async def run():
        engine.call(hold.wait)
        many = [Question(ids, Sampling(tokens, n=3), lambda: memory) for _ in range(3)]
        answers = [engine.ask(each) for each in many]
        hold.set()
        return await asyncio.gather(*(ids_of(each, 2) for each in answers))

    assert asyncio.run(run()) == [alone(memory, ids, tokens)] * 3
    assert not engine.errors
    engine.close()


def test_text_alone(engine, model):
    ids = asked(1)[0]
    wanted = model.generate(
        torch.tensor([ids]), max_new_tokens=12, do_sample=False, eos_token_id=None
    )
    text = Question(ids, Sampling(max_tokens=12))
    assert together(engine, [text]) == [wanted[0, len(ids) :].tolist()]


def test_questions_join_and_leave_while_others_run(engine, model):
    memory = watched(model, 96, 0)
    first, second, third = asked(3)

    async def run():
        long = engine.ask(question(memory, first))
        events = aiter(long)
        begun = [(await anext(events)).chosen.token]
        short = Question(second, Sampling(max_tokens=2), lambda: memory)
        joined = await ids_of(engine.ask(short))
        gone = engine.ask(Question(third, Sampling(max_tokens=2000), lambda: memory))
        await anext(aiter(gone))
        gone.cancel()
        return begun + [event.chosen.token async for event in events], joined

    before = free_pages(engine)
    assert asyncio.run(run()) == (alone(memory, first), alone(memory, second, 2))
    assert free_pages(engine) == before


@pytest.mark.parametrize("company", [0, 5])
def test_samples_of_a_seed_do_not_depend_on_the_company(engine, model, company):
    memory, (ids, *others) = watched(model, 96, 1), asked(6)
    drawn = question(memory, ids, temperature=0.9, top_p=0.95, seed=7)
    questions = [drawn] + [question(memory, x, temperature=1.5) for x in others[:company]]
    want = together(engine, [drawn])[0]
    assert together(engine, questions)[0] == want
    assert want != together(engine, [question(memory, ids, temperature=0.9, seed=8)])[0]


def test_several_answers_share_one_reading_of_the_question(engine, model):
    memory, ids = watched(model, 96, 1), asked(1)[0]
    before = free_pages(engine)

    async def run(**sampling):
        answers = {}
        async for event in engine.ask(question(memory, ids, **sampling)):
            answers.setdefault(event.index, []).append(event.chosen.token)
        return answers

    assert asyncio.run(run(n=3)) == dict.fromkeys(range(3), alone(memory, ids))
    drawn = asyncio.run(run(n=3, temperature=1.0, seed=3))
    assert len({tuple(x) for x in drawn.values()}) == 3
    assert drawn[0] == asyncio.run(run(temperature=1.0, seed=3))[0]
    assert free_pages(engine) == before


def test_more_questions_than_the_cache_has_room_for_wait(model):
    """Nobody is left out, and pages come back."""
    engine = Engine(model, 8 * model.settings.page_size)
    memory = watched(model, 96, 0)
    ids = asked(1)[0]
    wanted, before = alone(memory, ids), free_pages(engine)
    assert before < 8
    assert together(engine, [question(memory, ids)] * 20) == [wanted] * 20
    assert free_pages(engine) == before
    engine.close()


def test_what_does_not_fit_alone_is_refused(model):
    most = 3 * model.settings.page_size  # the video, its last window, a question
    engine = Engine(model, most)
    memory = watched(model, 96, 0)

    async def run(tokens):
        return await ids_of(engine.ask(Question([1, 2], Sampling(tokens), lambda: memory)))

    wanted = alone(memory, [1, 2], 3)
    for tokens in (most, most - 20):  # beside the video there is less
        with pytest.raises(TooLargeError):
            asyncio.run(run(tokens))
    assert asyncio.run(run(3)) == wanted
    engine.close()


def test_room_is_made_before_a_question_is_turned_away(model):
    kept = []
    engine = Engine(
        model, 6 * model.settings.page_size, make_room=lambda: bool(kept) and not kept.clear()
    )
    memory = watched(model, 48, 0)
    kept += [watched(model, 48, 1), watched(model, 48, 2)]
    tokens = 2 * model.settings.page_size
    asking = Question([1, 2], Sampling(tokens), lambda: memory)
    answer = together(engine, [asking])
    assert not kept
    assert answer == [alone(memory, [1, 2], tokens)]
    engine.close()


def test_a_full_queue_refuses_and_clients_take_turns(model):
    engine = Engine(model, TOKENS, most_running=1, most_waiting=8)
    memory, hold = watched(model, 48, 0), threading.Event()
    order = []

    async def one(client):
        answer = engine.ask(Question([1, 2], Sampling(2), lambda: memory, client))
        await ids_of(answer)
        order.append(client)

    async def run():
        engine.call(hold.wait)
        tasks = [asyncio.create_task(one("a")) for _ in range(6)]
        tasks += [asyncio.create_task(one(x)) for x in "bc"]
        await asyncio.sleep(0)
        with pytest.raises(FullError, match="8 questions"):
            engine.ask(Question([1], Sampling(2)))
        hold.set()
        await asyncio.gather(*tasks)

    asyncio.run(run())
    assert order[:3] == ["a", "b", "c"]
    engine.close()


def test_who_has_left_the_queue_takes_no_place_in_it(model):
    engine = Engine(model, TOKENS, most_waiting=4)
    memory, hold = watched(model, 48, 0), threading.Event()

    async def run():
        engine.call(hold.wait)
        left = [engine.ask(question(memory, [1, 2])) for _ in range(4)]
        with pytest.raises(FullError):
            engine.ask(question(memory, [1, 2]))
        for answer in left:
            answer.cancel()
        assert engine.waiting == 0
        stays = [engine.ask(question(memory, [1, 2])) for _ in range(4)]
        stays[1].cancel()
        stays[1].cancel()
        assert engine.waiting == 3
        hold.set()
        return [await ids_of(answer) for answer in (stays[0], *stays[2:])]

    assert asyncio.run(run()) == [alone(memory, [1, 2])] * 3
    assert engine.answers == 3
    engine.close()


def test_a_client_who_gives_up_a_question_keeps_the_turn(model):
    engine = Engine(model, TOKENS, most_running=1)
    memory, hold = watched(model, 48, 0), threading.Event()
    order = []

    async def one(client):
        await ids_of(engine.ask(Question([1, 2], Sampling(2), lambda: memory, client)))
        order.append(client)

    async def run():
        engine.call(hold.wait)
        left = engine.ask(Question([1, 2], Sampling(2), lambda: memory, "a"))
        tasks = [asyncio.create_task(one(x)) for x in "aab"]
        await asyncio.sleep(0)
        left.cancel()
        hold.set()
        await asyncio.gather(*tasks)

    asyncio.run(run())
    assert order == ["a", "b", "a"]
    engine.close()


def test_a_question_that_fails_fails_alone(engine, model):
    memory, ids = watched(model, 96, 0), asked(1)[0]

    def broken():
        raise OSError("the file is gone")

    async def run():
        answers = [
            engine.ask(question(memory, ids)),
            engine.ask(Question(ids, Sampling(), broken)),
            engine.ask(question(memory, ids, logit_bias={10**6: 1.0})),
        ]
        return await asyncio.gather(*map(ids_of, answers), return_exceptions=True)

    before = free_pages(engine)
    right, gone, wrong = asyncio.run(run())
    assert right == alone(memory, ids)
    assert isinstance(gone, OSError)
    assert isinstance(wrong, IndexError)
    assert free_pages(engine) == before


def test_a_step_that_fails_is_taken_again_one_by_one(engine, model, monkeypatch):
    memory, (first, second) = watched(model, 96, 0), asked(2)
    step = type(model).decode_step

    def failing(self, text, batch, *rest):
        if len(batch) > 1:
            raise RuntimeError("no memory for so many")
        return step(self, text, batch, *rest)

    wanted = [alone(memory, first), alone(memory, second)]
    monkeypatch.setattr(type(model), "decode_step", failing)
    assert together(engine, [question(memory, x) for x in (first, second)]) == wanted


def test_questions_are_answered_during_long_work(engine, model):
    memory, ids = watched(model, 96, 0), asked(1)[0]
    answered = threading.Event()

    def long():
        while not answered.is_set():
            engine.share(0.0)

    async def run():
        work = engine.call(long, long=True)
        answer = await ids_of(engine.ask(question(memory, ids)))
        assert not work.done()
        answered.set()
        work.result()
        return answer

    assert asyncio.run(run()) == alone(memory, ids)


def test_closing_ends_what_waits(model):
    engine = Engine(model, TOKENS)
    memory, hold = watched(model, 48, 0), threading.Event()

    async def run():
        engine.call(hold.wait)
        answer = engine.ask(question(memory, [1, 2]))
        closing = asyncio.create_task(asyncio.to_thread(engine.close))
        await asyncio.sleep(0.05)
        hold.set()
        await closing
        with pytest.raises(FullError, match="closing"):
            await ids_of(answer)
        with pytest.raises(FullError, match="closing"):
            engine.ask(question(memory, [1, 2]))

    asyncio.run(run())


def test_closing_passes_over_work_that_was_called_off(model):
    engine, hold = Engine(model, TOKENS), threading.Event()
    engine.call(hold.wait)
    off, waits = (engine.call(lambda: None, long=True) for _ in range(2))
    assert off.cancel()
    closing = threading.Thread(target=engine.close)
    closing.start()
    while not engine._closing:
        pass
    hold.set()
    closing.join()
    with pytest.raises(FullError, match="closing"):
        waits.result(timeout=5)


# -- sampling ------------------------------------------------------------------------------------


def test_penalties_and_biases_move_the_choice():
    logits = torch.tensor([1.0, 0.9, 0.0])

    def chosen(count=3, **sampling):
        sampler = Sampler(Sampling(**sampling))
        return [sampler.choose(logits).token for _ in range(count)]

    assert chosen() == [0, 0, 0]
    assert chosen(logit_bias={2: 5.0}) == [2, 2, 2]
    assert chosen(presence_penalty=0.5) == [0, 1, 0]
    assert chosen(4, frequency_penalty=0.5) == [0, 1, 0, 1]


@pytest.mark.parametrize("temperature", [0.0, 1e-320, 1e-40, 9e-6])
def test_temperatures_that_scores_cannot_be_divided_by_are_greedy(temperature):
    sampler = Sampler(Sampling(temperature=temperature, top_p=0.5))
    assert sampler.choose(torch.tensor([1.0, 1.001, -3e38])).token == 1


def test_log_probabilities():
    logits = torch.tensor([1.0, 3.0, 2.0])
    got = Sampler(Sampling(top_logprobs=2)).choose(logits)
    wanted = logits.log_softmax(0)
    assert got.token == 1
    assert got.logprob == pytest.approx(float(wanted[1]))
    assert [token for token, _ in got.top] == [1, 2]
    assert Sampler(Sampling()).choose(logits) == Chosen(1)


def text_of(raw, stop=()):
    text = AnswerText(lambda ids: bytes(ids).decode(errors="replace"), stop)
    pieces = []
    for byte in raw:
        pieces.append(text.add(byte))
        if text.stopped:
            return pieces
    return [*pieces, text.finish()]


@pytest.mark.parametrize("words", ["plain", "für 東京 🎬", "🎬🎬", ""])
def test_text_comes_in_whole_characters(words):
    pieces = text_of(words.encode())
    assert "".join(pieces) == words
    assert not any("\ufffd" in piece for piece in pieces)


def test_text_that_is_no_character_comes_through():
    raw = b"a\xff\xffb\xe2\x82"
    assert "".join(text_of(raw)) == raw.decode(errors="replace")


@pytest.mark.parametrize(
    ("stop", "wanted"),
    [(["lazy"], "the quick la"), (["k la", "x"], "the quic"), (["zz"], None), (["the"], "")],
)
def test_stop_texts_are_cut_and_never_shown_in_part(stop, wanted):
    words = "the quick la" + "lazy dog"
    pieces = text_of(words.encode(), stop)
    assert "".join(pieces) == (words if wanted is None else wanted)
    for n in range(len(pieces) + 1):
        assert words.startswith("".join(pieces[:n]))
