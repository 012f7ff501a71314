"""A user's first minutes with an sdist, which is installed in the environment of the Python that
runs this: `vxl` on a clip and a tiny checkpoint of the published layout (`make test-sdist`).
"""

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from helpers.checkpoint import write_checkpoint
from helpers.clips import write_clip

QUESTION = "What is shown?"


def vxl(folder, *arguments):
    command = [str(Path(sys.executable).with_name("vxl")), *arguments]
    print("$ vxl", *arguments, flush=True)
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
    print(done.stdout, end="", flush=True)
    return done.stdout


def main():
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder) / "model")
        write_clip(Path(folder) / "clip.mp4", count=60, fps=10)
        model = ("--model", "model")
        ask = ("ask", *model, "--max-new-tokens", "6", QUESTION)
        video = ("--video", "clip.mp4", "--ratio", "4")
        answer = vxl(folder, *ask, *video)
        vxl(folder, "watch", *model, *video, "--save", "watched.vxl")
        if vxl(folder, *ask, "--memory", "watched.vxl") != answer:
            sys.exit("the saved memory answers something else")


if __name__ == "__main__":  # pytest imports every file for its doctests
    main()
