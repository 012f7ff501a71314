"""The tuner leaves out tiles that are wrong or do not compile."""

import pytest
import torch
import triton

from vxl_kernels._triton import configs, tune
from vxl_kernels.testing import make_inputs

GOOD, BETTER = (configs.AttentionConfig(32, n, 16, 4, 1) for n in (32, 16))
WRONG = configs.AttentionConfig(32, 16, 32, 4, 1)  # keys of some blocks count twice
BROKEN = configs.AttentionConfig(32, 24, 24, 4, 1)  # no power of two: does not compile
TIMES = {GOOD: 3.0, BETTER: 2.0, WRONG: 1.0, BROKEN: 0.5}


@pytest.fixture
def played(monkeypatch):
    """A small call, with times from a table."""
    x = make_inputs((40,), rows=20, heads=2, kv_heads=1, page_size=64)
    call = dict(
        zip(
            ("q", "k", "v", "k_cache", "v_cache", "block_table", "cache_seqlens"),
            x.args()[:-1],
            strict=True,
        )
    )
    monkeypatch.setattr(tune, "_call", lambda *_: call | {"layout": [], "scale": 0.25})
    monkeypatch.setattr(configs, "split_size", lambda packed_rows, kv_heads: None)

    def of_tile(planned, **_):
        c = planned.constexprs
        tile = configs.AttentionConfig(c["BLOCK_M"], c["BLOCK_N"], c["MASKED_BLOCK_N"], 4, 1)
        return TIMES[tile]

    monkeypatch.setattr(triton.testing, "do_bench", of_tile)
    return lambda *tiles: monkeypatch.setattr(tune, "candidates", lambda *_: list(tiles))


@pytest.mark.parametrize("tiles", [(GOOD, BETTER, WRONG, BROKEN), (BROKEN, WRONG, BETTER, GOOD)])
def test_the_fastest_right_tile_wins(tiles, played, capsys):
    played(*tiles)
    assert tune.tune(torch.float32, 16) == [32, 16, 16, 4, 1]
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 4
    (wrong,) = [line for line in said if str(WRONG) in line]
    assert "left out, its result is not the shipped tile's" in wrong
    (broken,) = [line for line in said if str(BROKEN) in line]
    assert "left out, InterpreterError" in broken


def test_no_tile_at_all_is_reported(played):
    played(WRONG, BROKEN)
    with pytest.raises(RuntimeError, match=r"no tile works for torch\.float32 at head_dim 16"):
        tune.tune(torch.float32, 16)
