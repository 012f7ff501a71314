"""Videos that are watched once: ask, fork, append, save, in a pool that grows."""

from pathlib import Path

import pytest
import torch
from helpers.model_goldens import (
    random_features,
    relative,
    small_model,
    tiny_expected,
    tiny_model,
)
from helpers.paths import CHECKPOINT
from safetensors import safe_open
from torch._subclasses.fake_tensor import FakeTensorMode

from vxl_model import VideoMemory, VideoXLForConditionalGeneration, WindowRatios
from vxl_model.streaming.fingerprint import checkpoint_text_fingerprint, text_fingerprint
from vxl_model.streaming.state import joined

pytestmark = pytest.mark.core

WINDOW = 48
PROMPT = [5, 6, 7]
TAIL = torch.tensor([9, 10, 11])


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def features():
    return random_features(205)


def watch(model, features, **options):
    return model.watch(input_ids=PROMPT, visual_features=features, **options)


def same_memory(a, b, exactly=True):
    assert a.cached_tokens == b.cached_tokens
    assert a.vst_counts == b.vst_counts
    for layer in range(a.model.config.num_hidden_layers):
        for x, y in zip(a.keys_values(layer), b.keys_values(layer), strict=True):
            assert torch.equal(x, y) if exactly else relative(x, y) < 1e-6


def test_ask_equals_generate_and_leaves_no_trace(model, features):
    ids = torch.cat([torch.tensor(PROMPT), torch.tensor([-200]), TAIL])[None]
    want = model.generate(ids, visual_features=features[None], max_new_tokens=8, do_sample=False)
    memory = watch(model, features)
    before = [memory.keys_values(i) for i in range(3)]
    free = memory.batch.states[0].sequence.cache.pages.free_pages
    for question in (TAIL, TAIL.tolist(), TAIL[None]):
        answer = torch.as_tensor(memory.ask(question, max_new_tokens=8))
        assert answer.reshape(-1).tolist() == want[0, -8:].tolist()
    for i in range(3):
        for a, b in zip(before[i], memory.keys_values(i), strict=True):
            assert torch.equal(a, b)
    assert memory.batch.states[0].sequence.cache.pages.free_pages == free


def test_a_batch_of_questions_to_one_video(model, features):
    memory = watch(model, features)
    questions = torch.tensor([[9, 10], [11, 12], [9, 10]])
    answers = memory.ask(questions, max_new_tokens=5)
    for question, answer in zip(questions, answers, strict=True):
        assert memory.ask(question, max_new_tokens=5).tolist() == answer.tolist()


def test_questions_cost_one_video_and_their_suffixes(model, features):
    memory = watch(model, features.repeat(8, 1))
    cache = memory.batch.states[0].sequence.cache.pages
    used = cache.num_pages - cache.free_pages
    forks = [memory.fork() for _ in range(14)]
    assert cache.num_pages - cache.free_pages == used
    outs = [model(TAIL[None], memory=fork) for fork in forks]
    assert memory.batch.states[0].sequence.cache.pages is cache  # planned, so it has not grown
    tails = cache.num_pages - cache.free_pages - used
    assert tails <= 14  # a page each
    del outs, forks
    assert cache.num_pages - cache.free_pages == used


def test_forward_goes_on_from_a_memory(model, features):
    ids = torch.cat([torch.tensor(PROMPT), torch.tensor([-200]), TAIL])[None]
    whole = model(ids, visual_features=features[None])
    memory = watch(model, features)
    first = model(TAIL[None, :2], memory=memory)
    second = model(TAIL[None, 2:], memory=first.memory)
    assert relative(second.logits[0, -1], whole.logits[0, -1]) < 1e-5
    assert first.memory.cached_tokens == [memory.cached_tokens[0] + 2]  # is not changed by second
    assert second.memory.vst_counts[0][-2:] == [0, 0]


@pytest.mark.parametrize("pieces", [[205], [1] * 205, [48, 48, 109], [100, 0, 105], [47, 2, 156]])
@pytest.mark.parametrize("ratio", [4, [2, 4, 8], WindowRatios([2, 4, 8, 3, 5])])
def test_streaming_equals_watching_at_once(model, features, pieces, ratio):
    if isinstance(ratio, list):  # a drawn ratio has to divide the last window
        features = features[:204]
        pieces = [*pieces[:-1], pieces[-1] - 1]
    at_once = watch(model, features, ratio=ratio)
    stream = model.watch(input_ids=PROMPT, visual_features=[], ratio=ratio)
    for piece in features.split(pieces):
        if len(piece):
            stream.append(visual_features=piece)
    same_memory(stream, at_once)
    assert stream.visual_tokens == [len(features)]


def test_ask_in_the_middle_of_a_stream(model, features):
    stream = model.watch(input_ids=PROMPT, visual_features=[], ratio=[2, 4, 8])
    for cut in (60, 120, 204):
        stream.append(visual_features=features[stream.visual_tokens[0] : cut])
        so_far = watch(model, features[:cut], ratio=[2, 4, 8])
        assert (
            stream.ask(TAIL, max_new_tokens=5).tolist()
            == so_far.ask(TAIL, max_new_tokens=5).tolist()
        )
        same_memory(stream, so_far)


def test_forks_go_their_own_ways(model, features):
    memory = watch(model, features[:100])
    fork = memory.fork()
    fork.append(visual_features=features[100:])
    same_memory(fork, watch(model, features))
    same_memory(memory, watch(model, features[:100]))
    memory.append(visual_features=features[100:150])
    same_memory(memory, watch(model, features[:150]))
    same_memory(fork, watch(model, features))


def test_a_pool_grows_and_keeps_what_is_shared(model, features, monkeypatch):
    monkeypatch.setattr("vxl_model.modeling.SLACK_TOKENS", 0)
    model.settings.page_size = 4
    try:
        stream = model.watch(input_ids=PROMPT, visual_features=[])
        pool = stream.batch.states[0].sequence.cache
        small = pool.pages.num_pages
        forks = []
        for piece in features.repeat(15, 1).split(300):
            stream.append(visual_features=piece)
            forks.append(stream.fork())
        grown = pool.pages
        assert grown.num_pages > small
        used = grown.num_pages - grown.free_pages
        longest = stream.cached_tokens[0]
        # Every fork is a prefix. Beyond the longest, each of them holds a page or two.
        assert used <= -(-longest // 4) + 3 * len(forks)
        del forks
        same_memory(stream, watch(model, features.repeat(15, 1)))
    finally:
        model.settings.page_size = 128


@pytest.mark.parametrize("tokens", [205, 192, 30])
def test_save_and_load(model, features, tokens, tmp_path):
    memory = watch(model, features[:tokens], ratio=WindowRatios([2, 4, 8, 3, 5]))
    memory.save(tmp_path / "video.vxl")
    loaded = model.load_memory(tmp_path / "video.vxl")
    same_memory(loaded, memory)
    assert (
        loaded.ask(TAIL, max_new_tokens=5).tolist() == memory.ask(TAIL, max_new_tokens=5).tolist()
    )
    for each in (loaded, memory) if tokens < 205 else ():
        each.append(visual_features=features[tokens:])
    same_memory(loaded, memory)


def test_visual_tokens_may_wait_on_different_devices(model, features, monkeypatch):
    """Those of a loaded memory are on the host, appended ones are where the caller has them. The
    meta device takes the place of a GPU."""
    encoder, seen = model.encoder(), []
    state = watch(model, features[:10]).batch.states[0].fork()
    state.pending = [features[:10].to("meta")]
    encoder.device = torch.device("meta")
    monkeypatch.setattr(model.settings, "chunks_per_step", 4)
    monkeypatch.setattr(encoder, "chunk_rows", lambda rows, layout: seen.append(rows))
    monkeypatch.setattr(encoder, "_run", lambda *rest: None)
    encoder.append(state, features[10:205])
    assert [(x.device.type, x.shape[1]) for x in seen] == [("meta", 4 * WINDOW)]
    assert state.pending_tokens == 205 - 4 * WINDOW
    with FakeTensorMode():
        pieces = [torch.empty(2, 64, device="cuda"), torch.empty(3, 64)]
        for device in (torch.device("cuda", 0), torch.device("cpu")):
            assert joined(pieces, device).device == device


def test_the_unfinished_window_is_a_tensor_of_the_file(model, features, tmp_path):
    """safetensors readers refuse a header of 100 MB, which a window in the header could exceed."""
    memory = watch(model, features[: WINDOW - 1])
    memory.save(tmp_path / "video.vxl")
    with safe_open(tmp_path / "video.vxl", framework="pt") as file:
        assert torch.equal(file.get_tensor("pending"), features[: WINDOW - 1])
    header = int.from_bytes((tmp_path / "video.vxl").read_bytes()[:8], "little")
    assert header < 4096


def test_a_memory_in_the_first_format_is_read(model, features):
    """The file holds 60 features of the fixture. Its unfinished window is in its header."""
    memory = model.load_memory(Path(__file__).parents[1] / "goldens" / "memory_1.vxl")
    want = watch(model, features[:60])
    same_memory(memory, want, exactly=False)
    for each in (memory, want):
        each.append(visual_features=features[60:])
    same_memory(memory, want, exactly=False)


def test_a_saved_draw_goes_on(model, features, tmp_path):
    features = features.repeat(3, 1)[:576]
    memory = watch(model, features[:100], ratio=[2, 4, 8])
    memory.save(tmp_path / "m")
    loaded = VideoMemory.load(tmp_path / "m", model).append(visual_features=features[100:])
    same_memory(loaded, watch(model, features, ratio=[2, 4, 8]))


def test_a_memory_of_another_model_is_refused(model, features, tmp_path):
    watch(model, features).save(tmp_path / "m")
    other = small_model()
    same_memory(other.load_memory(tmp_path / "m"), watch(model, features))  # equal weights
    with torch.no_grad():
        other.model.layers[1].self_attn.beacon_v_proj.weight[0, 0] += 1
    for stranger in (other, tiny_model()):
        with pytest.raises(ValueError, match="another model"):
            stranger.load_memory(tmp_path / "m")


def test_damaged_files_are_refused(model, features, tmp_path):
    path = tmp_path / "m"
    watch(model, features).save(path)
    whole = path.read_bytes()
    for name, damaged in {
        "cut": whole[: len(whole) // 2],
        "empty": b"",
        "text": b"not a memory",
        "flipped": whole[:-100] + bytes([whole[-100] ^ 1]) + whole[-99:],
    }.items():
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="path"):
            model.load_memory(path)
        assert name
    with pytest.raises(FileNotFoundError):
        model.load_memory(tmp_path / "nowhere")


def test_a_memory_survives_a_failed_append(model, features, monkeypatch):
    memory = watch(model, features[:100])
    want = watch(model, features)
    core = type(model.model)
    run = core.run

    def fails(*args, **kwargs):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(core, "run", fails)
    with pytest.raises(RuntimeError, match="luck"):
        memory.append(visual_features=features[100:])
    monkeypatch.setattr(core, "run", run)
    same_memory(memory, watch(model, features[:100]))
    same_memory(memory.append(visual_features=features[100:]), want)


def test_pixels_frame_by_frame():
    expected, model = tiny_expected(), tiny_model(ratio=4)
    at_once = model.watch(input_ids=expected["pre_ids"], pixel_values=expected["pixel_values"])
    stream = model.watch(input_ids=expected["pre_ids"], visual_features=[])
    for frame in expected["pixel_values"].split(2):
        stream.append(pixel_values=frame)
    same_memory(stream, at_once, exactly=False)


def test_batch_memories_can_be_split(model, features):
    ids = torch.tensor([[*PROMPT, -200, 9, 10]] * 2)
    out = model(ids, visual_features=[features, features[:61]])
    assert len(out.memory) == 2
    assert [len(m) for m in out.memory] == [1, 1]
    assert [m.visual_tokens[0] for m in out.memory[::-1]] == out.memory.visual_tokens[::-1]
    same_memory(out.memory[1:], out.memory[1])
    assert out.memory[:] is out.memory
    same_memory(
        out.memory[1],
        model(ids[:1], visual_features=[features[:61]]).memory,
    )
    with pytest.raises(ValueError, match="has ended"):
        out.memory[0].append(visual_features=features)


class Words:
    """A processor whose words are numbers."""

    stop_ids = ()

    def prefix_ids(self):
        return torch.tensor([PROMPT])

    def suffix_ids(self, question, answer_prefix=None):
        return torch.tensor([[int(word) for word in question.split()]])

    def decode(self, ids):
        return " ".join(str(int(i)) for i in ids)


def test_questions_in_words(features):
    model = small_model()
    model.processor = Words()
    memory = model.watch(visual_features=features)  # the processor's prompt
    same_memory(memory, watch(model, features))
    want = memory.ask(TAIL, max_new_tokens=6).tolist()
    assert memory.ask("9 10 11", max_new_tokens=6) == " ".join(map(str, want))
    both = [memory.ask(question, 6) for question in ("9 10 11", "12")]
    assert memory.ask(["9 10 11", "12"], 6) == both
    model.processor.stop_ids = [want[2]]
    assert memory.ask("9 10 11", max_new_tokens=6).split() == [
        str(i) for i in want[: want.index(want[2]) + 1]
    ]


def test_a_final_memory_holds_the_whole_video(model, features, tmp_path):
    memory = watch(model, features)
    memory.save(tmp_path / "final.vxl", final=True)
    back = VideoMemory.load(tmp_path / "final.vxl", model)
    same_memory(back, memory)
    with safe_open(tmp_path / "final.vxl", framework="pt") as file:
        assert len(file.get_tensor("key.0")) == memory.cached_tokens[0]
        assert "pending" not in file.keys()  # noqa: SIM118  (not a dict)
    with pytest.raises(ValueError, match="has ended"):
        back.append(visual_features=features)
    memory.append(visual_features=features)  # the memory itself goes on
    assert memory.visual_tokens == [2 * 205]


def test_a_vision_tower_has_no_part_in_the_text_fingerprint():
    model = VideoXLForConditionalGeneration.from_pretrained(CHECKPOINT)
    assert any("vision_tower" in name for name, _ in model.model.named_parameters())
    assert text_fingerprint(model.model) == checkpoint_text_fingerprint(CHECKPOINT, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_checkpoint_has_the_text_fingerprint_of_its_model(tmp_path, dtype):
    model = small_model()
    model.save_pretrained(tmp_path)
    found = checkpoint_text_fingerprint(tmp_path, dtype)
    model.to(dtype)
    assert found == text_fingerprint(model.model)
    with torch.no_grad():  # VST weights have no part in it
        model.model.layers[0].self_attn.beacon_q_proj.weight.zero_()
    assert found == text_fingerprint(model.model)
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[0, 0] += 1
    assert found != text_fingerprint(model.model)
