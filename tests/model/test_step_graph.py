"""A decoding step as a captured graph: the same tokens as without one. Graphs are played."""

import copy
import gc
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers.model_goldens import random_features, small_model
from helpers.played_graph import PlayedGraph, playing

from vxl_model.streaming import step_graph
from vxl_model.streaming.batch import StreamBatch

pytestmark = pytest.mark.core

PROMPT = [5, 6, 7]


@pytest.fixture
def model(monkeypatch):
    """A model that counts as on a GPU."""
    monkeypatch.setattr(step_graph, "refuse_model", lambda model: None)
    return small_model()


def watched(model, tokens=205, seed=1):
    return model.watch(input_ids=PROMPT, visual_features=random_features(tokens, seed))


def steps(model, memories, count=6, graphs=True):
    """Logits of `count` steps that decode one token of every memory, each continued greedily."""
    model.settings.decode_graphs = graphs
    batch = StreamBatch(state for memory in memories for state in memory.forks(1).states)
    ids = torch.arange(len(memories))[:, None] + 9
    found = []
    for _ in range(count):
        logits = model.decode_step(ids, batch).logits
        ids = logits[:, -1:].argmax(-1)
        found.append(logits)
    return torch.stack(found), batch


@pytest.mark.parametrize("exact", [True, False])
def test_graphs_decode_what_eager_steps_decode(model, exact):
    """Lengths, pages and ids of later steps are not those of the capture."""
    model.settings.batch_invariant = exact
    model.share_cache(4000)
    memories = [watched(model, n, n) for n in (205, 96, 150)]
    want, plain = steps(model, memories, graphs=False)
    with playing() as made:
        got, batch = steps(model, memories)
    assert [g.replays for g in made] == [6]
    assert torch.equal(got, want)
    for a, b in zip(plain.states, batch.states, strict=True):
        assert a.sequence.length == b.sequence.length
        assert a.vst_counts == b.vst_counts


def test_other_sequences_need_no_other_graph(model):
    """A graph runs any sequences of its cache; without batch invariance, one number of them."""
    model.share_cache(6000)
    memories = [watched(model, n, n) for n in (205, 96, 150, 60)]
    with playing() as made:
        for chosen in (memories[:3], memories, memories[::-1][:3], memories[1:]):
            got, _ = steps(model, chosen, 3)
            want, _ = steps_without_dropping(model, chosen)
            assert torch.equal(got, want)
        assert len(made) == 1
        steps(model, memories[:2], 2)
        steps(model, memories[:1], 2)
        assert len(made) == 3
        model.settings.batch_invariant = False
        steps(model, memories[:3], 2)
        steps(model, memories, 2)
        steps(model, memories[:3], 2)
        assert len(made) == 5


def test_rows_of_graphs():
    found = [step_graph.graph_rows(n) for n in range(1, 70)]
    assert found[:9] == [1, 2, 4, 4, 8, 8, 8, 8, 16]
    assert sorted(set(found)) == [1, 2, 4, *range(8, 73, 8)]
    assert all(0 <= rows - n < 8 for n, rows in enumerate(found, 1))


def test_rows_that_are_not_needed_have_pages_of_their_own(model):
    """What they write is nobody's, and their pages go back with the graphs."""
    cache = model.share_cache(6000).pages
    memories = [watched(model, n, n) for n in (205, 96, 150)]
    sequences = [m.batch.states[0].sequence.place[1] for m in memories]
    before = [x for seq in sequences for layer in range(2) for x in cache.gather(seq, layer)]
    for m in memories:
        m.forks(1)
    free, count = cache.free_pages, cache.stats()["sequences"]
    with playing() as made:
        _, batch = steps(model, memories, 2)
        assert len(made[0].calls[0][1][1]) == 4
        del batch
        gc.collect()
        assert (cache.free_pages, cache.stats()["sequences"]) == (free - 1, count + 1)
        steps(model, memories, 1, graphs=False)
        gc.collect()
    assert (cache.free_pages, cache.stats()["sequences"]) == (free, count)
    after = [x for seq in sequences for layer in range(2) for x in cache.gather(seq, layer)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_cache_without_a_page_left_has_graphs_of_its_number(model):
    """Three sequences take the last pages: a step of them needs no other."""
    model.settings.page_size = 16
    cache = model.share_cache(4000).pages
    want, _ = steps(model, [watched(model, 90)] * 3, 2, graphs=False)
    used = cache.stats()["peak_used_pages"]
    for spare, rows in ((0, 3), (1, 4)):
        cache = model.share_cache((used + spare) * 16).pages
        with playing() as made:
            got, _ = steps(model, [watched(model, 90)] * 3, 2)
        assert torch.equal(got, want)
        assert len(made[0].calls[0][1][1]) == rows
        assert cache.stats()["peak_used_pages"] == used + spare


def test_spare_rows_count_once_their_pages_are_on_the_device(model, monkeypatch):
    cache = model.share_cache(4000).pages
    count, of_cache, upload = cache.stats()["sequences"], step_graph._OfCache(), cache._upload

    def failing(array):
        monkeypatch.setattr(cache, "_upload", upload)
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(cache, "_upload", failing)
    with pytest.raises(torch.OutOfMemoryError):
        of_cache.has_spare(cache, 2)
    assert cache.stats()["sequences"] == count
    assert of_cache.has_spare(cache, 2)
    assert cache.stats()["sequences"] == count + 2
    pages = [int(cache._manager.block_table(seq)[0]) for seq in of_cache.spare]
    assert of_cache.spare_table[:, 0].tolist() == pages


def test_how_a_graph_is_captured(model):
    """On a stream of the model's device. Other threads go on meanwhile."""
    with playing() as made:
        steps(model, [watched(model)], 1)
    how = made[0].how
    assert how["capture_error_mode"] == "thread_local"
    assert how["stream"].device == model.device


def test_the_number_of_graphs_is_bounded(model, monkeypatch):
    monkeypatch.setattr(step_graph, "_MOST", 2)
    model.share_cache(6000)
    memories = [watched(model, n, n) for n in (205, 96, 150)]
    with playing() as made:
        for count in (1, 2, 1, 3, 1, 2):  # 3 takes the place of 2, and 2 that of 3
            steps(model, memories[:count], 1)
    assert len(made) == 4


def steps_without_dropping(model, memories):
    """Eager steps that leave the graphs as they are: those that collect hidden states."""
    batch = StreamBatch(state for memory in memories for state in memory.forks(1).states)
    ids = torch.arange(len(memories))[:, None] + 9
    found = []
    for _ in range(3):
        logits = model.decode_step(ids, batch, hidden_states=True).logits
        ids = logits[:, -1:].argmax(-1)
        found.append(logits)
    return torch.stack(found), batch


def test_a_cache_that_grows_and_a_table_that_widens(model):
    memory = watched(model)
    model.settings.page_size = 16
    small = watched(model, 60)
    want = [steps(model, [m], 200, graphs=False)[0] for m in (small, memory)]
    with playing() as made:
        got = [steps(model, [m], 200)[0] for m in (small, memory)]
    assert len(made) > 2
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def test_graphs_end_with_their_cache_and_model(model):
    with playing():
        memory = watched(model)
        _, batch = steps(model, [memory], 2)
        graphs = step_graph.step_graphs(model)
        assert len(graphs._by_cache) == 1
        del memory, batch
        forget_tensors()
        gc.collect()
        assert len(graphs._by_cache) == 0
        model.settings.decode_graphs = False
        steps(model, [watched(model)], 1, graphs=False)
        assert model not in step_graph._graphs
        copy.deepcopy(model)


def forget_tensors():
    """A real graph holds addresses and no tensors."""
    for graph in PlayedGraph.made:
        graph.calls.clear()


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("order", [(False, True), (True, False)])
def test_steps_under_autocast_take_no_graph(model, exact, order):
    """A step has the precision of its own surroundings, not of those that were captured."""
    model.settings.batch_invariant = exact
    memory = watched(model)

    def each(graphs):
        for on in order:
            with torch.autocast("cpu", torch.bfloat16, enabled=on):
                yield steps(model, [memory], 2, graphs)[0]

    want = list(each(graphs=False))
    assert want[0].dtype != want[1].dtype
    with playing() as made:
        got = list(each(graphs=True))
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    assert [g.replays for g in made] == [2]


def test_other_weights_are_captured_anew(model):
    memory = watched(model)
    with playing() as made:
        steps(model, [memory], 2)
        model.lm_head.weight.data = model.lm_head.weight.data * 2
        got, _ = steps(model, [memory], 2)
    assert len(made) == 2
    want, _ = steps(model, [memory], 2, graphs=False)
    assert torch.equal(got, want)


def test_sequences_of_another_cache_are_other_sequences(model):
    """Their ids are alike. Weights that have changed in between are noticed all the same."""
    batches = [watched(model, n, n).forks(1) for n in (205, 205)]
    seqs = [batch.states[0].sequence.place[1] for batch in batches]
    assert seqs[0] == seqs[1]
    ids = torch.tensor([[9]])
    model.settings.decode_graphs = True
    with playing() as made:
        for batch in batches:
            model.decode_step(ids, batch)
        model.lm_head.weight.data = model.lm_head.weight.data * 2
        fork = StreamBatch([batches[0].states[0].fork()])
        got = model.decode_step(ids, batches[0]).logits
    assert len(made) == 3
    model.settings.decode_graphs = False
    assert torch.equal(got, model.decode_step(ids, fork).logits)


def test_one_graph_runs_at_a_time(model, monkeypatch):
    """They share memory, and steps on several caches may come from several threads."""
    inside, most = [], []
    replay = step_graph.StepGraphs._replay

    def watched_replay(self, *rest):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.05)
        try:
            return replay(self, *rest)
        finally:
            inside.pop()

    memories = [watched(model, n, n) for n in (205, 96, 150)]
    model.settings.decode_graphs = True
    monkeypatch.setattr(step_graph.StepGraphs, "_replay", watched_replay)
    batches = [memory.forks(1) for memory in memories]
    with playing(), ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda batch: model.decode_step(torch.tensor([[9]]), batch), batches))
    assert most == [1, 1, 1]


def test_a_graph_waits_for_the_last_one_on_any_stream(model, monkeypatch):
    """Threads may have streams of their own, and only the host does one step after another."""
    fill, batches = step_graph.FixedBatch.fill, [watched(model, n, n).forks(1) for n in (205, 96)]

    def logged(self, *rest):
        PlayedGraph.log.append(("fill", self))
        fill(self, *rest)

    monkeypatch.setattr(step_graph.FixedBatch, "fill", logged)
    model.settings.decode_graphs = True
    with playing():
        for batch in batches * 2:
            model.decode_step(torch.tensor([[9]]), batch)
        kinds = [kind for kind, _ in PlayedGraph.log]
        events = [event for kind, event in PlayedGraph.log if kind in ("record", "wait")]
    assert kinds == ["fill", "replay", "record", *["wait", "fill", "replay", "record"] * 3]
    assert events[:-1:2] == events[1::2]


def test_a_graph_waits_for_one_whose_step_failed(model, monkeypatch):
    batches = [watched(model, n, n).forks(1) for n in (205, 96)]
    model.settings.decode_graphs = True
    token = torch.tensor([[9]])
    with playing():
        model.decode_step(token, batches[0])
        monkeypatch.setattr(PlayedGraph, "replay", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model.decode_step(token, batches[0])
        monkeypatch.undo()
        model.settings.decode_graphs = True
        model.decode_step(token, batches[1])
        events = [event for kind, event in PlayedGraph.log if kind in ("record", "wait")]
    assert len(events) == 5
    assert events[:-1:2] == events[1::2]


def test_generate_takes_the_graph(model):
    memory = watched(model)
    want = memory.ask(torch.tensor([9, 10, 11]), max_new_tokens=8)
    model.settings.decode_graphs = True
    with playing() as made:
        got = memory.ask(torch.tensor([9, 10, 11]), max_new_tokens=8)
    assert torch.equal(torch.as_tensor(got), torch.as_tensor(want))
    assert [g.replays for g in made] == [7]


def test_a_model_on_a_cpu_is_refused():
    model = small_model()
    memory = watched(model)
    length = memory.cached_tokens
    expected = "settings.decode_graphs: got a model on cpu, expected a model on one CUDA device"
    with pytest.raises(ValueError, match=expected):
        steps(model, [memory], 1)
    assert memory.cached_tokens == length
