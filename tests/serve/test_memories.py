"""Memories that two threads change: the engine's, which makes and drops them, and the event loop's,
which lists and deletes them."""

import asyncio

import pytest

pytest.importorskip("fastapi", reason="make serve-check installs it in an environment of its own")

from helpers.server import make_place, options

from vxl_serve.cli import _settings
from vxl_serve.engine import Engine
from vxl_serve.memories import Entry, Memories
from vxl_serve.questions import FullError
from vxl_serve.settings import RequestError


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("memories"))


@pytest.fixture
def memories(place, tmp_path):
    from vxl_model import VideoXLForConditionalGeneration

    model = VideoXLForConditionalGeneration.from_pretrained(place / "tiny")
    settings = _settings(options(place, "--store", tmp_path / "store", "--allow-folder", place))
    made = Memories(settings, lambda room: Engine(model, 4096, make_room=room))
    yield made
    made.close()


async def watching(memories, **given):
    source = await memories.sources.named("clip.mp4", "url")
    watched = {"frames": None, "fps": None, "ratio": None, **given}
    return await memories.watch(
        "", [source], watched, memories.model.processor.prefix_ids()[0].tolist()
    )


def made(memories, **given):
    async def run():
        entry = await watching(memories, **given)
        await memories.ready(entry)
        return entry

    return asyncio.run(run())


class Leaving(Entry):
    """A reader looks at a memory while another one is removed."""

    def __getattribute__(self, name):
        others = object.__getattribute__(self, "__dict__").get("others")
        if others and name in ("owner", "status", "bytes"):
            others.popitem()
        return object.__getattribute__(self, name)


@pytest.mark.parametrize("what", ["of", "bytes", "watch", "evict", "disk"])
def test_memories_leave_while_others_are_looked_at(memories, what):
    for i in range(6):
        entry = Leaving(f"mem-{i}", "", "", "video", {}, [], status="ready")
        entry.others, entry.memory = memories._entries, True
        memories._entries[entry.id] = entry
    looks = {
        "of": lambda: memories.of(""),
        "bytes": lambda: memories.bytes,
        "watch": lambda: made(memories),
        "evict": memories._evict,
        "disk": memories._within_disk,
    }
    looks[what]()
    assert len(memories) < 6


def test_a_memory_that_is_deleted_while_its_file_is_opened(memories):
    """Its name belongs to a later one then, which stays."""
    opened = memories.sources.open

    async def run():
        async def first():
            memories.sources.open = delete_then(ValueError("damaged"))
            await watching(memories)

        def delete_then(error):
            def refuse(*_):
                (entry,) = memories.of("")
                memories.delete(entry)
                later = Entry(entry.id, "", "later", "video", {}, [], status="queued")
                memories._entries[entry.id] = later
                raise error

            return refuse

        with pytest.raises(ValueError, match="damaged"):
            await first()

    asyncio.run(run())
    memories.sources.open = opened
    assert [entry.name for entry in memories.of("")] == ["later"]


def test_a_memory_that_is_deleted_while_it_is_loaded(memories, monkeypatch):
    from vxl_model import VideoMemory

    entry, load = made(memories), VideoMemory.load
    assert memories.engine.call(memories._evict).result()

    def deleted_meanwhile(path, model):
        memory = load(path, model)
        memories.delete(entry)
        return memory

    monkeypatch.setattr(VideoMemory, "load", deleted_meanwhile)
    with pytest.raises(RequestError, match="deleted"):
        memories.engine.call(lambda: memories.resident(entry)).result()
    assert entry.memory is None  # it would hold its pages


def test_a_memory_that_is_deleted_while_it_is_saved(memories, monkeypatch):
    from vxl_model import VideoMemory

    save = VideoMemory.save

    def deleted_meanwhile(self, path, final=False):
        save(self, path, final)
        memories.delete(memories.of("")[0])

    monkeypatch.setattr(VideoMemory, "save", deleted_meanwhile)
    with pytest.raises(RequestError, match="deleted"):
        made(memories)
    assert not list(memories.settings.store.glob("mem-*"))
    assert memories.of("") == []


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"null", b'{"id": "caf\xe9"}', b"[" * 100_000],
    ids=["empty", "list", "null", "latin1", "deep"],
)
def test_a_damaged_record_does_not_stop_the_next_server(memories, content):
    entry = made(memories)
    record = memories.settings.store / f"{entry.id}.json"
    record.write_bytes(content)
    memories.close()
    again = Memories(memories.settings, lambda room: Engine(memories.model, 4096, make_room=room))
    assert again.of("") == []
    again.close()
    assert not list(memories.settings.store.glob("mem-*"))


def test_an_engine_that_closes_leaves_no_memory_behind(memories, monkeypatch):
    def closing(*_, **__):
        raise FullError("the engine is closing")

    monkeypatch.setattr(memories.engine, "call", closing)
    with pytest.raises(FullError):
        asyncio.run(watching(memories))
    assert memories.of("") == []
