"""vLLM with memories of videos: the greedy ids of `memory.ask`, from vLLM's own engine on a CPU."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

pytest.importorskip("vllm", reason="make vllm-check installs it in an environment of its own")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # so that a test sees the connector
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

from helpers.paths import TESTS
from vllm import LLM, SamplingParams
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown

from vxl_model import VideoXLConfig, VideoXLForConditionalGeneration
from vxl_serve.vllm import Prefix, publish
from vxl_serve.vllm.connector import VxlConnector

FRAMES, NEW = (20, 13, 40, 7, 25), 12


def tiny_model(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    config = VideoXLConfig(
        hidden_size=256,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=1000,
        beacon_window=144,
        initializer_range=0.1,
        max_position_embeddings=4096,
    )
    return VideoXLForConditionalGeneration(config).to(dtype).eval()


def watched(model, frames, seed):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(frames * 144, 256, generator=generator).to(model.dtype)
    return model.watch(visual_features=features, input_ids=torch.arange(1, 15), ratio=8)


def questions(count):
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(1, 1000, (5 + 3 * i,), generator=generator) for i in range(count)]


def answers(memory, asked, new=NEW):
    return [memory.ask(ids, new, do_sample=False, eos_token_id=None).tolist() for ids in asked]


def engine(checkpoint, dtype="float32", **options):
    """A new engine. The workers of a process share one connector, so an older engine is done."""
    ensure_kv_transfer_shutdown()
    transfer = KVTransferConfig(
        kv_connector="VxlConnector",
        kv_role="kv_consumer",
        kv_connector_extra_config=options.pop("extra", {}),
    )
    return LLM(
        str(checkpoint),
        dtype=dtype,
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=options.pop("max_model_len", 2048),
        kv_transfer_config=transfer,
        **options,
    )


def ask(llm, requests, new=NEW):
    """Ids of (prefix, question ids) pairs, all asked at once. None where vLLM says "error"."""
    prompts = [prefix.prompt(ids) for prefix, ids in requests]
    options = {"max_tokens": new, "temperature": 0.0, "ignore_eos": True, "detokenize": False}
    sampling = [prefix.sampling(**options) for prefix, _ in requests]
    found = [out.outputs[0] for out in llm.generate(prompts, sampling, use_tqdm=False)]
    return [None if out.finish_reason == "error" else list(out.token_ids) for out in found]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("vllm")


@pytest.fixture(scope="module")
def model(place):
    made = tiny_model()
    made.save_pretrained(place / "model")
    return made


@pytest.fixture(scope="module")
def memories(model):
    return [watched(model, frames, seed) for seed, frames in enumerate(FRAMES)]


@pytest.fixture(scope="module")
def prefixes(memories, place):
    return [publish(memory, place / f"{i}.vxl") for i, memory in enumerate(memories)]


@pytest.fixture(scope="module")
def llm(model, place):
    return engine(place / "model", max_num_batched_tokens=64)  # less than any video


@pytest.fixture
def loads(monkeypatch):
    """(first, tokens) of each load of a memory."""
    seen, load = [], VxlConnector._load

    def recorded(self, request, *rest):
        seen.append((request.first, request.tokens))
        return load(self, request, *rest)

    monkeypatch.setattr(VxlConnector, "_load", recorded)
    return seen


def test_twenty_questions_over_five_videos_at_once(llm, memories, prefixes):
    asked = questions(4)
    wanted = [ids for memory in memories for ids in answers(memory, asked)]
    assert ask(llm, [(prefix, ids) for prefix in prefixes for ids in asked]) == wanted


def test_a_second_question_loads_what_the_prefix_cache_lacks(llm, memories, prefixes, loads):
    llm.reset_prefix_cache()
    first, second = questions(2)
    block = llm.llm_engine.vllm_config.cache_config.block_size
    kept = prefixes[2].tokens
    assert ask(llm, [(prefixes[2], first)]) == answers(memories[2], [first])
    assert ask(llm, [(prefixes[2], second)]) == answers(memories[2], [second])
    assert loads == [(0, kept), (kept // block * block, kept % block)]


def test_a_wrong_memory_fails_its_request_and_no_other(llm, memories, prefixes, place):
    llm.reset_prefix_cache()
    ids = questions(1)[0]
    missing = Prefix(str(place / "missing.vxl"), 50, "a" * 64)
    damaged = place / "damaged.vxl"
    raw = bytearray((place / "1.vxl").read_bytes())
    raw[-100] ^= 1
    damaged.write_bytes(raw)
    replaced = place / "replaced.vxl"
    shutil.copy(place / "0.vxl", replaced)
    before = Prefix.read(replaced)
    shutil.copy(place / "3.vxl", replaced)
    foreign = publish(watched(tiny_model(seed=1), 9, 0), place / "foreign.vxl")
    wrong = [missing, Prefix.read(damaged), before, foreign]
    right = answers(memories[4], [ids])[0]
    requests = [(prefix, ids) for bad in wrong for prefix in (bad, prefixes[4])]
    assert ask(llm, requests) == [None, right] * len(wrong)


@pytest.mark.parametrize(
    "parameters",
    [3, [], {}, {"path": "x", "tokens": 2.0, "identity": ""}, {"path": 1, "tokens": 1}],
)
def test_parameters_of_another_form_fail_their_request(llm, memories, prefixes, parameters):
    ids = questions(1)[0]
    sampling = SamplingParams(
        max_tokens=NEW, extra_args={"kv_transfer_params": {"vxl": parameters}}
    )
    out = llm.generate([{"prompt_token_ids": [1, 2, 3]}], sampling, use_tqdm=False)[0]
    assert out.outputs[0].finish_reason == "error"
    assert ask(llm, [(prefixes[0], ids)]) == answers(memories[0], [ids])


def test_a_request_without_the_memory_s_salt_fails(llm, prefixes):
    prompt = {**prefixes[0].prompt([1, 2]), "cache_salt": "other"}
    out = llm.generate([prompt], prefixes[0].sampling(max_tokens=2), use_tqdm=False)[0]
    assert out.outputs[0].finish_reason == "error"


def test_text_without_a_memory_is_stock_qwen2(llm, model):
    ids = questions(1)[0]
    options = {"max_tokens": NEW, "temperature": 0.0, "ignore_eos": True, "detokenize": False}
    out = llm.generate([{"prompt_token_ids": ids.tolist()}], SamplingParams(**options))[0]
    wanted = model.generate(ids[None], max_new_tokens=NEW, do_sample=False, eos_token_id=None)
    assert list(out.outputs[0].token_ids) == wanted[0, len(ids) :].tolist()


def test_a_folder_bounds_what_a_request_may_name(model, memories, prefixes, place):
    inside = place / "inside"
    inside.mkdir()
    saved = publish(memories[0], inside / "a.vxl")
    named = Prefix("a.vxl", saved.tokens, saved.identity)
    llm = engine(place / "model", extra={"folder": str(inside)})
    ids = questions(1)[0]
    outside = Prefix("../1.vxl", prefixes[1].tokens, prefixes[1].identity)
    assert ask(llm, [(named, ids), (outside, ids)]) == [answers(memories[0], [ids])[0], None]


def test_requests_that_are_preempted_load_again(model, memories, prefixes, place, loads):
    """Pages for few of the requests: they push each other out as they grow."""
    llm = engine(
        place / "model",
        max_model_len=512,
        block_size=32,
        num_gpu_blocks_override=32,
        enable_prefix_caching=False,
    )
    asked = questions(4)
    pairs = [(i, ids) for i in (0, 1, 3) for ids in asked]
    wanted = [answers(memories[i], [ids], 50)[0] for i, ids in pairs]
    assert ask(llm, [(prefixes[i], ids) for i, ids in pairs], 50) == wanted
    assert len(loads) > len(pairs)


def test_bfloat16(place):
    half = tiny_model(seed=2, dtype=torch.bfloat16)
    half.save_pretrained(place / "bf16")
    memory = watched(half, 20, 3)
    prefix = publish(memory, place / "bf16.vxl")
    asked = questions(4)
    llm = engine(place / "bf16", dtype="bfloat16")
    assert ask(llm, [(prefix, ids) for ids in asked]) == answers(memory, asked)


def test_a_memory_that_may_go_on_is_refused(memories, place):
    memories[1].save(place / "open.vxl")
    with pytest.raises(ValueError, match="final"):
        Prefix.read(place / "open.vxl")


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="each rank is bound to a core of its own")
def test_two_ranks_take_their_heads():
    """Tensor parallelism over gloo: each rank loads its own KV heads of a memory."""
    done = subprocess.run(
        [sys.executable, str(TESTS / "helpers" / "vllm_parallel_worker.py")],
        env={**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "0|1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "20 of 20 are equal" in done.stdout.splitlines(), done.stdout[-4000:]
