import pytest
import torch

collect_ignore = ["helpers"]

# Marks on transformers' own tests (tests/transformers_suite).
TRANSFORMERS_MARKS = (
    "accelerate_tests",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "flash_attn_test",
    "is_training_test",
    "order",
    "slow",
    "torch_compile_test",
)


def pytest_configure(config):
    for name in TRANSFORMERS_MARKS:
        config.addinivalue_line("markers", f"{name}: of transformers' own tests")


try:
    from hypothesis import HealthCheck, settings
except ImportError:  # the GPU's tests run on machines that have only torch, triton and pytest
    pass
else:
    settings.register_profile(
        "default", deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow]
    )
    settings.load_profile("default")


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no GPU")
    for item in items:
        if item.get_closest_marker("gpu"):  # keywords include the names of folders
            item.add_marker(skip)
