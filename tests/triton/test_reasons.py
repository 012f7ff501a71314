"""Reasons why Triton cannot run are given before it fails."""

import pytest

import vxl_kernels
from vxl_kernels import _triton


@pytest.mark.parametrize(
    ("triton_version", "numpy_version", "works"),
    [("3.6.0", "2.4.6", False), ("3.6.0", "2.3.5", True), ("3.9.0", "2.4.6", True)],
)
def test_an_interpreter_that_numpy_breaks(monkeypatch, triton_version, numpy_version, works):
    triton, numpy = pytest.importorskip("triton"), pytest.importorskip("numpy")
    monkeypatch.setattr(triton, "__version__", triton_version)
    monkeypatch.setattr(numpy, "__version__", numpy_version)
    monkeypatch.setattr(_triton, "_missing", lambda: None)
    monkeypatch.setattr(_triton, "interpreted", lambda: True)
    reasons = vxl_kernels.backends()["triton"]
    assert bool(reasons) is not works
    if not works:
        assert "numpy 2.4.6" in reasons[0]
        assert "triton 3.6.0" in reasons[0]
        assert "numpy < 2.4" in reasons[0]
    monkeypatch.setattr(_triton, "interpreted", lambda: False)  # compiled kernels need no numpy
    assert not any("numpy" in reason for reason in vxl_kernels.backends()["triton"])
