"""Asks vLLM with tensor parallelism 2 on a CPU, and prints how many answers equal `memory.ask`'s.

vLLM starts its ranks by importing the main module again, so this is a program and no test.
"""

import importlib.util
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).parents[1]


def main() -> None:
    spec = importlib.util.spec_from_file_location("cases", TESTS / "serve" / "test_vllm.py")
    cases = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(cases)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        model = cases.tiny_model()
        model.save_pretrained(place / "model")
        memories = [cases.watched(model, frames, seed) for seed, frames in enumerate(cases.FRAMES)]
        prefixes = [cases.publish(m, place / f"{i}.vxl") for i, m in enumerate(memories)]
        asked = cases.questions(4)
        wanted = [ids for memory in memories for ids in cases.answers(memory, asked)]
        llm = cases.engine(place / "model", tensor_parallel_size=2)
        got = cases.ask(llm, [(prefix, ids) for prefix in prefixes for ids in asked])
    equal = sum(a == b for a, b in zip(got, wanted, strict=True))
    print(f"{equal} of {len(wanted)} are equal")


if __name__ == "__main__":
    sys.path[:0] = [str(TESTS.parent), str(TESTS)]
    main()
