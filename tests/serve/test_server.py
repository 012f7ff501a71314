"""The server through OpenAI's client, as its users reach it."""

import base64
import contextlib
import gc
import json
import time

import pytest

pytest.importorskip("fastapi", reason="make serve-check installs it in an environment of its own")
openai = pytest.importorskip("openai", reason="make serve-check installs it")

import httpx
from helpers.server import make_place, serving

QUESTION = "What happens?"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("serve"))


@pytest.fixture(scope="module")
def server(place):
    with serving(place, "--allow-folder", place) as (url, app):
        yield url, app


@pytest.fixture(scope="module")
def url(server):
    return server[0]


@pytest.fixture(scope="module")
def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def model(place):
    from vxl_model import VideoXLForConditionalGeneration

    return VideoXLForConditionalGeneration.from_pretrained(place / "tiny")


def watched(model, place, **options):
    return model.watch(place / "clip.mp4", **options)


def asked(text, **visual):
    parts = [{"type": f"{kind}_url", f"{kind}_url": {"url": url}} for kind, url in visual.items()]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def complete(client, messages, **options):
    options = {"max_tokens": 12, "temperature": 0, **options}
    return client.chat.completions.create(model="tiny", messages=messages, **options)


def text(reply):
    return reply.choices[0].message.content.strip()


def data_url(path, kind="video/mp4"):
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def upload(url, path, **fields):
    with open(path, "rb") as file:
        reply = httpx.post(f"{url}/v1/memories", files={"file": file}, data=fields, timeout=60)
    assert reply.status_code in (200, 202), reply.text
    return reply.json()


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"]


@pytest.mark.parametrize("how", ["upload", "data", "file"])
def test_a_question_about_a_video_is_that_of_ask(client, url, place, model, how):
    if how == "upload":
        named = f"memory:{upload(url, place / 'clip.mp4')['id']}"
    else:
        named = data_url(place / "clip.mp4") if how == "data" else "clip.mp4"
    reply = complete(client, asked(QUESTION, video=named))
    memory = watched(model, place)
    assert text(reply) == memory.ask(QUESTION, 12, do_sample=False)
    assert reply.choices[0].finish_reason in ("stop", "length")
    assert reply.usage.prompt_tokens_details.cached_tokens == memory.cached_tokens[0]
    suffix = len(model.processor.suffix_ids(QUESTION)[0])
    assert reply.usage.prompt_tokens == memory.cached_tokens[0] + suffix


def test_one_video_is_watched_once(client, url, server, place):
    before = server[1].state.memories.frames
    first = upload(url, place / "other.mp4", name="first")
    complete(client, asked("a", video=data_url(place / "other.mp4")))
    frames = server[1].state.memories.frames
    assert upload(url, place / "other.mp4")["id"] == first["id"]
    complete(client, asked("b", video="other.mp4"))
    assert server[1].state.memories.frames == frames == before + first["total_frames"]
    assert upload(url, place / "other.mp4", frames=2)["id"] != first["id"]


def test_settings_of_watching_are_those_of_watch(client, place, model):
    options = {"frames": 5, "ratio": 2}
    reply = complete(client, asked(QUESTION, video="clip.mp4"), extra_body=options)
    assert text(reply) == watched(model, place, **options).ask(QUESTION, 12, do_sample=False)


def test_several_turns(client, place, model):
    first = complete(client, asked(QUESTION, video="clip.mp4"))
    turns = [
        *asked(QUESTION, video="clip.mp4"),
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "Where?"},
    ]
    second = complete(client, turns)
    processor = model.processor
    ids = [*processor.suffix_ids(QUESTION)[0], *processor.text_ids("A cat.")[0]]
    ids += processor.text_ids("<|im_end|>\n<|im_start|>user\nWhere?")[0]
    ids += processor.text_ids("<|im_end|>\n<|im_start|>assistant\n")[0]
    wanted = watched(model, place).ask(ids, 12, do_sample=False, eos_token_id=processor.stop_ids)
    assert text(second) == processor.decode(wanted)
    assert first.usage.prompt_tokens < second.usage.prompt_tokens


def test_pictures_and_text_alone(client, place, model):
    from PIL import Image

    picture = Image.open(place / "one.png")
    pixels = model.processor.image_to_pixels(picture)
    memory = model.watch(pixel_values=pixels, image_sizes=picture.size)
    reply = complete(client, asked(QUESTION, image=data_url(place / "one.png", "image/png")))
    assert text(reply) == memory.ask(QUESTION, 12, do_sample=False)
    system = [{"role": "system", "content": "Be brief."}]
    reply = complete(client, [*system, {"role": "user", "content": "Hello"}])
    ids = model.processor.text_ids(
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    options = {"max_new_tokens": 12, "eos_token_id": model.processor.stop_ids}
    wanted = model.generate(ids, do_sample=False, **options)[0, ids.shape[1] :]
    assert text(reply) == model.processor.decode(wanted)


def test_streaming(client, place):
    messages = asked(QUESTION, video="clip.mp4")
    whole = complete(client, messages)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(complete(client, messages, **options))
    pieces = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert "".join(pieces) == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] is not None
    assert chunks[-1].usage == whole.usage


def test_sampling_parameters(client, place):
    messages = asked(QUESTION, video="clip.mp4")
    greedy = complete(client, messages)
    sampled = {"temperature": 1.0, "seed": 3, "n": 3}
    three = complete(client, messages, **sampled)
    again = complete(client, messages, **sampled)
    contents = [choice.message.content for choice in three.choices]
    assert contents == [choice.message.content for choice in again.choices]
    assert len(set(contents)) > 1
    whole = greedy.choices[0].message.content
    stop = whole[3:5]
    cut = complete(client, messages, stop=stop).choices[0]
    assert cut.message.content == whole[: whole.index(stop)]
    assert cut.finish_reason == "stop"
    told = complete(client, messages, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert all(token.logprob == token.top_logprobs[0].logprob for token in told)


def test_memories_are_listed_told_asked_and_deleted(client, url, place):
    about = upload(url, place / "clip.mp4", frames=3, name="mine")
    lines = httpx.get(f"{url}/v1/memories/{about['id']}/events", timeout=60).text.split("\n\n")
    last = json.loads([line for line in lines if line][-1].removeprefix("data: "))
    assert (last["status"], last["frames"], last["name"]) == ("ready", 3, "mine")
    listed = httpx.get(f"{url}/v1/memories").json()["data"]
    assert last in listed
    body = {"question": QUESTION, "max_tokens": 12, "temperature": 0}
    reply = httpx.post(f"{url}/v1/memories/{about['id']}/ask", json=body).json()
    named = asked(QUESTION, video=f"memory:{about['id']}")
    assert (
        reply["choices"][0]["message"]["content"]
        == complete(client, named).choices[0].message.content
    )
    assert httpx.delete(f"{url}/v1/memories/{about['id']}").json()["deleted"]
    assert httpx.get(f"{url}/v1/memories/{about['id']}").status_code == 404
    with pytest.raises(openai.NotFoundError):
        complete(client, named)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_frees_its_place(url, server, place, stream):
    engine = server[1].state.memories.engine
    about = upload(url, place / "clip.mp4")
    httpx.get(f"{url}/v1/memories/{about['id']}/events", timeout=60)
    bias = {str(token): -100 for token in range(125, 128)}  # the answer does not end by itself
    body = {"question": QUESTION, "max_tokens": 4096, "logit_bias": bias, "stream": stream}
    before = engine.answers
    where = f"{url}/v1/memories/{about['id']}/ask"
    with (
        contextlib.suppress(httpx.ReadTimeout),
        httpx.stream("POST", where, json=body, timeout=0.3) as reply,
    ):
        next(reply.iter_lines())
    end = time.monotonic() + 10
    while engine.running or engine.waiting:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert engine.answers == before  # it was not decoded to its end


def test_health_metrics_and_page(url):
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}
    counts = httpx.get(f"{url}/metrics").text
    for name in ("vxl_tokens_total", "vxl_first_token_seconds_count", "vxl_requests_total"):
        assert name in counts
    assert httpx.get(url).headers["content-type"].startswith("text/html")


def test_a_memory_leaves_the_cache_and_comes_back(place, tmp_path, model):
    """Three videos take turns in a cache for two. A disk for one file keeps the last one."""
    page = 2 * 2 * 2 * 16 * 128 * 4  # bytes: K and V, layers, heads, head_dim, rows, float32
    with serving(place, "--store", tmp_path, "--cache", 10 * page) as (url, app):
        memories = [upload(url, place / "clip.mp4", frames=n, ratio=2) for n in (6, 7, 8)]
        body = {"question": QUESTION, "max_tokens": 12, "temperature": 0}
        for _ in range(2):
            for frames, about in zip((6, 7, 8), memories, strict=True):
                reply = httpx.post(f"{url}/v1/memories/{about['id']}/ask", json=body, timeout=60)
                wanted = watched(model, place, frames=frames, ratio=2)
                got = reply.json()["choices"][0]["message"]["content"].strip()
                assert got == wanted.ask(QUESTION, 12, do_sample=False)
        resident = [e for e in app.state.memories.of("") if e.memory is not None]
        assert 0 < len(resident) < 3
    with serving(place, "--store", tmp_path, "--disk", "64K") as (url, _):
        assert len(httpx.get(f"{url}/v1/memories").json()["data"]) == 3  # found again
        about = upload(url, place / "clip.mp4", frames=6, ratio=2)
        assert about["status"] == "ready"
        httpx.post(f"{url}/v1/memories/{about['id']}/ask", json=body)
        new = upload(url, place / "clip.mp4", frames=5, ratio=2)
        httpx.get(f"{url}/v1/memories/{new['id']}/events", timeout=60)
        left = {entry["id"] for entry in httpx.get(f"{url}/v1/memories").json()["data"]}
        assert new["id"] in left
        assert memories[1]["id"] not in left


def test_a_live_memory_that_cannot_be_saved_is_forgotten(url, server, monkeypatch):
    import io

    from helpers.clips import picture
    from PIL import Image
    from websockets.sync.client import connect

    memories = server[1].state.memories

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(memories, "keep", full)
    pages = memories.engine.cache.pages
    before = memories.engine.call(lambda: pages.free_pages).result()
    file = io.BytesIO()
    Image.fromarray(picture(1, 64, 64)).save(file, "PNG")
    with connect(f"ws{url[4:]}/v1/live") as socket:
        named = json.loads(socket.recv())["memory"]
        socket.send(file.getvalue())
        assert json.loads(socket.recv()) == {"frames": 1}
        assert memories.engine.call(lambda: pages.free_pages).result() < before
    end = time.monotonic() + 10
    while any(entry.id == named for entry in memories.of("")):
        assert time.monotonic() < end
        time.sleep(0.01)
    gc.collect()
    assert memories.engine.call(lambda: pages.free_pages).result() == before


def test_live_frames(client, url, place, model):
    import io

    from helpers.clips import picture
    from PIL import Image
    from websockets.sync.client import connect

    frames = [picture(n, 64, 64) for n in range(6)]
    with connect(f"ws{url[4:]}/v1/live?ratio=2") as socket:
        named = json.loads(socket.recv())["memory"]

        def send(frame):
            file = io.BytesIO()
            Image.fromarray(frame).save(file, "PNG")
            socket.send(file.getvalue())
            return json.loads(socket.recv())

        def ask(text):
            socket.send(json.dumps({"question": text, "max_tokens": 12, "temperature": 0}))
            answer, done = "", False
            while not done:
                piece = json.loads(socket.recv())
                answer, done = answer + piece["answer"], piece["done"]
            return answer.strip()

        def wanted(count):
            import numpy as np

            memory = model.watch(np.stack(frames[:count]), ratio=2)
            return memory.ask(QUESTION, 12, do_sample=False)

        socket.send(json.dumps({"question": QUESTION}))
        assert "first frame" in json.loads(socket.recv())["error"]
        assert [send(frame) for frame in frames[:3]] == [{"frames": n} for n in (1, 2, 3)]
        assert ask(QUESTION) == wanted(3)
        socket.send(b"no picture")
        assert "JPEG" in json.loads(socket.recv())["error"]
        for frame in frames[3:]:
            send(frame)
        assert text(complete(client, asked(QUESTION, video=f"memory:{named}"))) == wanted(6)
    httpx.get(f"{url}/v1/memories/{named}/events", timeout=30)  # ends when it is saved
    about = httpx.get(f"{url}/v1/memories/{named}").json()
    assert (about["status"], about["frames"]) == ("ready", 6)
    assert text(complete(client, asked(QUESTION, video=f"memory:{named}"))) == wanted(6)
