"""The Triton kernels on a CPU, under Triton's interpreter.

TRITON_INTERPRET=1 must be set before triton is imported, and turns every kernel of the process into
Python. So these tests run in processes of their own. `tests/triton/test_interpreter.py` starts
them. By hand:

    TRITON_INTERPRET=1 python -m pytest tests/triton_interpreter

Only float32 and float16, as the interpreter computes products of bfloat16 wrongly.
"""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["*.py"]
else:
    torch.set_num_threads(1)  # the interpreter is one thread of Python


@pytest.fixture(autouse=True)
def rows_multiplied_alone(monkeypatch):
    """`tl.dot` multiplies each row of its left tile by itself.

    NumPy's product of whole tiles may give a row other bits at another place in its tile, which no
    GPU does. OpenBLAS's kernels for AVX2 are of this kind."""
    from triton.runtime import interpreter

    dot = interpreter.InterpreterBuilder.create_dot

    def by_rows(self, a, b, d, *rest):
        def handle(x, data):
            return interpreter.TensorHandle(data, x.dtype)

        rows = handle(a, a.data[..., :, None, :])
        columns = handle(b, b.data[..., None, :, :])
        out = dot(self, rows, columns, handle(d, d.data[..., :, None, :]), *rest)
        return handle(out, out.data[..., 0, :])

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", by_rows)


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles so small that short calls have full, masked and partial tiles."""
    from vxl_kernels._triton import configs

    small = configs.AttentionConfig(32, 32, 16, 4, 2)
    monkeypatch.setattr(configs, "prefill_config", lambda *args: small)
    monkeypatch.setattr(configs, "decode_config", lambda *args: small)
    monkeypatch.setattr(
        configs, "split_size", lambda packed_rows, kv_heads: 64 if packed_rows <= 32 else None
    )
