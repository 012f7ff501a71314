"""Any number of threads on one model and one memory give the bits of one thread, and no errors."""

import copy
import gc
import pickle
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers.model_goldens import random_features, small_model

PREFIX = [5, 6, 7]
QUESTIONS = [torch.tensor([9 + i, 10, 11 + 2 * i]) for i in range(8)]


@pytest.fixture
def model():
    return small_model()


@pytest.fixture(scope="module")
def features():
    return random_features(300)


@pytest.fixture
def small_pages(model, monkeypatch):
    """A cache that has to grow again and again."""
    monkeypatch.setattr("vxl_model.modeling.SLACK_TOKENS", 0)
    model.settings.page_size = 4


@pytest.fixture(autouse=True)
def switching():
    """Threads switch a thousand times as often as by default."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(before)


def ask(memory, question):
    """Returns the new ids and the logits of each step."""
    options = {"output_logits": True, "return_dict_in_generate": True, "do_sample": False}
    out = memory.model.generate(question[None], memory=memory, max_new_tokens=6, **options)
    return out.sequences, torch.stack(out.logits)


def same(answer, wanted):
    return all(torch.equal(a, b) for a, b in zip(answer, wanted, strict=True))


def in_threads(work, count):
    """Runs work(i) in `count` threads that start together."""
    barrier = threading.Barrier(count)

    def started(i):
        barrier.wait()
        return work(i)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(started, range(count)))


@pytest.mark.parametrize("tokens", [288, 300])
def test_many_threads_ask_one_memory(model, features, small_pages, tokens):
    """With 300 tokens, the first thread also encodes a last window that is not full."""
    memory = model.watch(input_ids=PREFIX, visual_features=[])
    memory.append(visual_features=features[:tokens])
    twin = model.watch(input_ids=PREFIX, visual_features=features[:tokens])
    wanted = [ask(twin, question) for question in QUESTIONS]
    cache = memory.batch.states[0].sequence.cache

    def work(i):
        picks = [(i + turn) % len(QUESTIONS) for turn in range(5)]
        return [same(ask(memory, QUESTIONS[pick]), wanted[pick]) for pick in picks]

    results = in_threads(work, 8)
    assert all(x for row in results for x in row)
    assert len(cache._places) <= 2  # every question has released its pages
    assert cache.pages.stats()["sequences"] == len(cache._places)


def test_one_thread_appends_while_others_ask(model, features, small_pages):
    """Each answer is right for one of the lengths that the video had during the call. No thread
    sees the video become shorter."""
    cuts = list(range(60, 301, 30))
    wanted = []
    for cut in cuts:
        so_far = model.watch(input_ids=PREFIX, visual_features=features[:60])
        for start in range(60, cut, 30):
            so_far.append(visual_features=features[start : start + 30])
        wanted.append([ask(so_far, question) for question in QUESTIONS[:3]])
    memory = model.watch(input_ids=PREFIX, visual_features=features[:60])
    done = threading.Event()

    def asks(i):
        seen = []
        while not done.is_set() or not seen:
            answer = ask(memory, QUESTIONS[i])
            seen.append(next(n for n, step in enumerate(wanted) if same(answer, step[i])))
        return seen

    def work(i):
        if i < 3:
            return asks(i)
        try:
            for start in range(60, 300, 30):
                memory.append(visual_features=features[start : start + 30])
        finally:
            done.set()
        return []

    for seen in in_threads(work, 4):
        assert seen == sorted(seen)
    assert memory.visual_tokens == [300]
    assert all(same(ask(memory, q), w) for q, w in zip(QUESTIONS[:3], wanted[-1], strict=True))


def test_an_append_is_seen_when_it_is_complete(model, features):
    memory = model.watch(input_ids=PREFIX, visual_features=features[:60])

    def look(*_):
        seen.append((memory.visual_tokens, memory.vst_counts, memory.cached_tokens))

    seen = []
    look()
    hook = model.model.layers[0].register_forward_hook(look)
    memory.append(visual_features=features[60:])
    hook.remove()
    assert len(seen) > 1
    assert seen.count(seen[0]) == len(seen)
    assert memory.visual_tokens == [300]


def test_threads_append_one_after_the_other(model, features):
    memory = model.watch(input_ids=PREFIX, visual_features=[])
    pieces = features[:288].split(12)
    in_threads(lambda i: [memory.append(visual_features=x) for x in pieces[i::4]], 4)
    assert memory.visual_tokens == [288]
    assert memory.vst_counts == [[0, *[12] * 6]]


def test_threads_watch_fork_read_and_generate_at_once(model, features, tmp_path):
    ids = torch.tensor([[*PREFIX, -200, 9, 10]])

    def watch():
        memory = model.watch(input_ids=PREFIX, visual_features=features)
        fork = memory.fork().append(visual_features=features[:60])
        return (*memory.keys_values(1), *fork.keys_values(2), ask(fork, QUESTIONS[0])[1])

    def generate():
        options = {"visual_features": [features], "max_new_tokens": 5, "do_sample": False}
        return model.generate(ids, **options), model.generate(ids, num_beams=3, **options)

    wanted = [watch(), generate()]
    results = in_threads(lambda i: [(watch, generate)[i % 2]() for _ in range(3)], 6)
    for i, runs in enumerate(results):
        assert all(same(run, wanted[i % 2]) for run in runs)


def test_a_sequence_that_ends_during_a_step_is_freed_after_it(model, features):
    """Garbage collection may run in any thread, whichever holds the lock."""
    memory = model.watch(input_ids=PREFIX, visual_features=features[:96])
    sequence = memory.batch.states[0].sequence
    cache = sequence.cache
    free, gone = cache.pages.free_pages, [sequence.fork() for _ in range(3)]
    with cache.step([gone.pop()], 200) as batch:
        within = cache.pages.stats()["sequences"]
        gone.clear()
        gc.collect()
        assert cache.pages.stats()["sequences"] == within
        batch.layer(0)
    gc.collect()
    assert cache.pages.stats()["sequences"] == 1
    assert cache.pages.free_pages == free


def test_copies_of_a_memory(model, features):
    """A copy is a fork. Pickling raises an error that says what to do instead."""
    memory = model.watch(input_ids=PREFIX, visual_features=features[:100])
    before = ask(memory, QUESTIONS[0])
    for twin in (copy.copy(memory), copy.deepcopy(memory)):
        assert twin.model is model
        twin.append(visual_features=features[100:])
        longer = model.watch(input_ids=PREFIX, visual_features=features[:100])
        longer.append(visual_features=features[100:])
        assert same(ask(twin, QUESTIONS[0]), ask(longer, QUESTIONS[0]))
        assert same(ask(memory, QUESTIONS[0]), before)
    states = copy.deepcopy(memory.batch).states
    assert states[0].sequence.length == memory.batch.states[0].sequence.length
    del states, twin
    for thing in (memory, memory.batch):
        with pytest.raises(TypeError, match=r"cannot be pickled.*save"):
            pickle.dumps(thing)
    assert same(ask(memory, QUESTIONS[0]), before)
