"""Paths of the project and of the tests' data."""

from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
GOLDENS = TESTS / "goldens"
CHECKPOINT = GOLDENS / "checkpoint_tiny"
BENCHMARKS = ROOT / "benchmarks"
