"""Teaches the shipped needle model a colour that it has never seen, by LoRA alone.

    python examples/needle/adapter.py                 # trains and counts
    python examples/needle/adapter.py --steps 5 --videos 2   # only to see it run

The weights of the model stay as they are. Adapters on every projection, those of the VSTs included,
learn to tell pink from the eight known colours. Half of the questions are about known colours, so
that they are not forgotten. Needs PEFT.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a checkout need not be installed

from examples.needle.task import (
    FRAME_TOKENS,
    NEW_COLOUR,
    WINDOW_FRAMES,
    Needle,
    add_new_colour,
    answer,
    draw_needles,
    load_needle_model,
    make_video,
    question,
)
from examples.needle.train import RATIOS, chat, update
from vxl_model import WindowRatios

RANK, RATE, STEPS = 16, 5e-3, 300
MOST_WINDOWS = 4  # of a training video
MODULES = r".*(?:self_attn|mlp)\..*_proj|lm_head"


def adapted() -> Any:
    """The shipped model with a word for the new colour, under new adapters."""
    from peft import LoraConfig, get_peft_model

    model = load_needle_model()
    add_new_colour(model)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=MODULES)
    return get_peft_model(model, config)


def draw(generator: torch.Generator, frames: int) -> list[Needle]:
    """As `draw_needles`, with the new colour for the first needle."""
    first, *rest = draw_needles(generator, frames)
    return [first._replace(colour=NEW_COLOUR), *rest]


def train(
    model: Any, steps: int, tokens: int = 3072, say: Callable[[str], None] = print
) -> list[float]:
    """Trains the adapters in place and returns the loss of every step.

    Args:
        tokens: visual tokens of a step.
    """
    model.train()
    generator = torch.Generator().manual_seed(0)
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=max(steps, 2))
    losses, begin = [], time.perf_counter()
    for step in range(steps):
        windows = int(torch.randint(1, MOST_WINDOWS + 1, (), generator=generator))
        frames = windows * WINDOW_FRAMES
        videos, ids, labels = [], [], []
        for _ in range(max(2, tokens // (frames * FRAME_TOKENS))):
            needles = draw(generator, frames)
            videos.append(make_video(frames, needles, generator))
            text, supervised = chat(model, needles[:2], whole=True)
            ids.append(text)
            labels.append(supervised)
        ratios = torch.randint(len(RATIOS), (windows,), generator=generator).tolist()
        loss = model(
            input_ids=torch.tensor(ids),
            visual_features=videos,
            labels=torch.tensor(labels),
            ratio=WindowRatios([RATIOS[i] for i in ratios]),
            loss_only=True,
        ).loss
        update(loss, [optimizer], learning)
        schedule.step()
        losses.append(loss.item())
        if step % 25 == 24 or step == steps - 1:
            mean = sum(losses[-25:]) / len(losses[-25:])
            say(f"step {step + 1:4}   loss {mean:.3f}   {time.perf_counter() - begin:4.0f} s")
    model.eval()
    return losses


def count(model: Any, frames: int, ratio: int, videos: int, seed: int = 1) -> dict[str, float]:
    """Share of right answers about the new colour and about known ones, a question of each kind a
    video."""
    generator = torch.Generator().manual_seed(seed)
    right = {"new": 0, "known": 0}
    for _ in range(videos):
        needles = draw(generator, frames)
        shown = make_video(frames, needles, generator)
        memory = model.watch(visual_features=shown, ratio=ratio)
        for kind, needle in zip(right, needles, strict=False):
            said = memory.ask(question(needle.colour), max_new_tokens=3)
            right[kind] += said == answer(needle)
    return {kind: hits / videos for kind, hits in right.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--videos", type=int, default=200, help="of a line of the table")
    parser.add_argument("--output", type=Path, help="folder for the adapter")
    options = parser.parse_args()
    for name in ("steps", "videos"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: got {getattr(options, name)}, expected at least 1")
    model = adapted()
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"{learning:,} weights of adapters learn")
    before = count(model.eval(), 16, 8, options.videos)
    print(f"before    new colour {before['new']:.3f}   known colours {before['known']:.3f}")
    train(model, options.steps)
    if options.output:
        model.save_pretrained(options.output)
    for name, one in (("adapters", model), ("merged", model.merge_and_unload())):
        for frames, ratio in ((16, 8), (32, 8), (64, 16)):
            found = count(one, frames, ratio, options.videos)
            print(
                f"{name:<9} {frames:3} frames, ratio {ratio:2}   new colour {found['new']:.3f}   "
                f"known colours {found['known']:.3f}"
            )


if __name__ == "__main__":
    main()
