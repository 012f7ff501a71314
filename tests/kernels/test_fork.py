"""What a forked child may do after its parent has computed with several threads, as
docs/cpu-kernels.md says."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")

# The parent uses OpenMP's threads, by the kernels and by PyTorch, before it forks.
PARENT = """
import os, signal, torch
from vxl_kernels import ChunkLayout, VstCache, rope_append, vst_attention
from vxl_kernels.testing import inverse_frequencies, make_inputs

def compute():
    torch.manual_seed(0)
    inputs = make_inputs((300, 301), ChunkLayout(64, 8, 2), heads=4, kv_heads=2, head_dim=32)
    for cache in (inputs.k_cache, inputs.v_cache):
        cache.nan_to_num_()
    q, k = rope_append(*inputs.args(), inverse_frequencies(32))
    q.requires_grad_()
    out = vst_attention(q, k, *inputs.args()[2:])
    out.square().sum().backward()
    return torch.stack([out.detach(), q.grad, q.detach()])

torch.set_num_threads(2)
expected = compute()
torch.randn(600, 600) @ torch.randn(600, 600)

def child(work):
    pid = os.fork()
    if pid == 0:
        signal.alarm(30)  # a child that hangs is killed
        os._exit(0 if work() else 1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
"""


def run(code):
    done = subprocess.run(
        [sys.executable, "-c", PARENT + code],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_child_with_one_thread_computes_the_same_bits():
    run("""
def work():
    torch.set_num_threads(1)
    return torch.equal(compute(), expected)

assert child(work) == 0
""")


def test_a_child_may_use_a_cache(tmp_path):
    """Sequences, pages and files, which are copied by one thread."""
    run(f"""
cache = VstCache(2, 2, 64, num_pages=64)
video = cache.new()
cache.reserve(video, 1000)
cache.commit(video, 1000)
cache.k_cache.fill_(2), cache.v_cache.fill_(3)

def work():
    torch.set_num_threads(1)
    question = cache.fork(video)
    cache.reserve(question, 10)
    cache.commit(question, 10)
    cache.save({str(tmp_path / "file.vxl")!r}, question)
    loaded = cache.load({str(tmp_path / "file.vxl")!r})
    return bool((cache.gather(loaded, 1)[1] == 3).all())

assert child(work) == 0
assert cache.stats()["sequences"] == 1
""")


def test_workers_of_a_data_loader():
    """PyTorch gives each of them one thread."""
    run("""
class Samples(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        return compute()

signal.alarm(60)
loader = torch.utils.data.DataLoader(
    Samples(), batch_size=None, num_workers=2, multiprocessing_context="fork"
)
found = list(loader)
assert len(found) == 4
assert all(torch.equal(one, expected) for one in found)
""")
