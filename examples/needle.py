"""Teaches a tiny Video-XL to find needles, then looks for them in videos it was never trained on.

    python examples/needle.py                    # trains (15 minutes on two cores), then the map
    python examples/needle.py --map-only         # the map of the shipped weights
    python examples/needle.py --steps 20 --videos 2 --lengths 16,32   # only to see it run

What a needle is stands in `vxl_model/_needle.py`. Training draws videos of up to 32 frames (four
windows, a ratio of 4, 8 or 16 for each) and asks about every needle in them; it starts with
single frames and takes longer videos once it answers the shorter ones. Everything is computed by
the package: attention through the accumulated VSTs, its gradients, the cache that questions share.

The map is the field's usual one: accuracy over the depth of the needle and the length of the
video, here up to eight times the longest video of the training. Two controls use the same weights:
    no VSTs       the text alone, as if nothing of the video had been kept
    other video   questions on a video whose answers were drawn anew
Both can only guess one animal in ten.

Source: Video-XL section 4 (needle in a haystack), section 3.4 (training).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vxl_model import WindowRatios
from vxl_model._needle import (
    ANIMALS,
    COLOURS,
    FRAME_TOKENS,
    TRAINED_FRAMES,
    WEIGHTS,
    draw_needles,
    load_needle_model,
    make_video,
    new_needle_model,
    question,
)

if TYPE_CHECKING:
    from vxl_model import VideoXLForConditionalGeneration

RATIOS = (4, 8, 16)
STEPS = 2500
LENGTHS = (16, 32, 64, 128, 256)
DEPTHS = 8  # a needle of each colour at 8 depths, from the first frame to the last


# -- training ----------------------------------------------------------------------------------


def chat(
    model: VideoXLForConditionalGeneration, needles: Sequence[Any], stops: bool
) -> tuple[list[int], list[int]]:
    """Ids and labels of a conversation that asks about every needle. The animals are supervised,
    and with `stops` the ends of the answers."""
    processor = model.processor
    ids = [*processor.prompt_ids()[0].tolist(), -200]
    labels = [-100] * len(ids)
    turn = processor.prompt_ids()[0, -2:].tolist()  # <|im_start|>user
    for needle in needles:
        asked = processor.tail_ids(question(needle.colour))[0].tolist()
        animal = processor.tokenizer.convert_tokens_to_ids(ANIMALS[needle.animal])
        end = processor.stop_ids[0]
        ids += [*asked, animal, end, *turn]
        labels += [-100] * len(asked) + [animal, end if stops else -100] + [-100] * len(turn)
    return ids[: -len(turn)], labels[: -len(turn)]


class Curriculum:
    """The longest video that is drawn: from 1 frame to `TRAINED_FRAMES`, by a third whenever the
    smoothed loss is below `goal`."""

    def __init__(self, goal: float = 0.3, patience: int = 20) -> None:
        self.frames, self.goal, self.patience = 1, goal, patience
        self.loss, self._since = math.inf, 0

    def update(self, loss: float) -> None:
        self.loss = loss if math.isinf(self.loss) else 0.9 * self.loss + 0.1 * loss
        self._since += 1
        if self.loss < self.goal and self._since >= self.patience:
            self.frames = min(TRAINED_FRAMES, max(self.frames + 1, self.frames * 4 // 3))
            self._since = 0


def train(
    model: VideoXLForConditionalGeneration,
    steps: int,
    seed: int = 0,
    learning_rate: float = 3e-3,
    tokens: int = 9216,
    say: Callable[[str], None] = print,
) -> list[float]:
    """Trains in place and returns the loss of every step. The same seed gives the same run.

    Args:
        tokens: visual tokens of a step, in videos of one length; 48 videos at most.
    """
    model.train()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    curriculum = Curriculum()
    losses = []
    begin = time.perf_counter()
    for step in range(steps):
        decay = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (step + 1) / 50) * decay
        # Mostly videos near the present limit: there is the most to learn.
        drawn = torch.randint(1, curriculum.frames + 1, (2,), generator=generator)
        frames = int(drawn.max())
        batch = max(2, min(48, tokens // (frames * FRAME_TOKENS)))
        windows = -(-frames // 10)
        # Where an answer ends is learned in no time, and half of the loss from the start would
        # be about it: 250 steps then taught nothing, where otherwise the loss fell to a third.
        stops = step >= 0.9 * steps
        picks = torch.randint(len(RATIOS), (windows,), generator=generator).tolist()
        videos, ids, labels = [], [], []
        for _ in range(batch):
            needles = draw_needles(generator, frames)
            videos.append(make_video(frames, needles, generator))
            text, supervised = chat(model, needles, stops)
            ids.append(text)
            labels.append(supervised)
        loss = model(
            torch.tensor(ids),
            visual_features=videos,
            labels=torch.tensor(labels),
            ratio=WindowRatios([RATIOS[i] for i in picks]),
        ).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        curriculum.update(losses[-1])
        if step % 50 == 49 or step == steps - 1:
            say(
                f"step {step + 1:5} of {steps}   loss {curriculum.loss:.3f}   videos of up to "
                f"{curriculum.frames:2} frames   {time.perf_counter() - begin:5.0f} s"
            )
    model.eval()
    return losses


# -- the map -----------------------------------------------------------------------------------


def places(frames: int) -> list[int]:
    """Frames at `DEPTHS` depths, from the first to the last."""
    return [round(i * (frames - 1) / (DEPTHS - 1)) for i in range(DEPTHS)]


@torch.no_grad()
def found(
    model: VideoXLForConditionalGeneration, frames: int, ratio: int, videos: int, seed: int
) -> dict[str, Tensor]:
    """Whether each question was answered with the needle's animal.

    Returns:
        bool `(videos, DEPTHS)` for "video", and for the controls "no VSTs" and "other video".
    """
    generator = torch.Generator().manual_seed(seed)
    answers = torch.tensor(model.processor.tokenizer.convert_tokens_to_ids(list(ANIMALS)))
    asked = torch.cat([model.processor.tail_ids(question(c)) for c in range(len(COLOURS))])
    prompt = model.processor.prompt_ids().expand(len(asked), -1)
    blind = model(torch.cat([prompt, asked], dim=1)).logits[:, -1].argmax(-1)
    hits: dict[str, list[Tensor]] = {"video": [], "no VSTs": [], "other video": []}
    for _ in range(videos):
        needles = draw_needles(generator, places(frames))
        truth = answers[torch.tensor([n.animal for n in needles])]
        colours = torch.tensor([n.colour for n in needles])
        video = make_video(frames, needles, generator)
        memory = model.watch(visual_features=video, ratio=ratio)
        said = model(asked, memory=memory).logits[:, -1].argmax(-1)
        hits["video"].append(said[colours] == truth)
        hits["no VSTs"].append(blind[colours] == truth)
        # Animals of a video that this memory has not seen: drawn once more.
        strangers = draw_needles(generator, places(frames))
        said = said[torch.tensor([n.colour for n in strangers])]
        hits["other video"].append(said == answers[torch.tensor([n.animal for n in strangers])])
    return {name: torch.stack(rows) for name, rows in hits.items()}


def search(
    model: VideoXLForConditionalGeneration,
    lengths: Sequence[int],
    ratios: Sequence[int],
    videos: int,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """The whole map.

    Returns:
        For every ratio: "depths" `[lengths][DEPTHS]`, accuracy of a cell over `videos` questions;
        and for "video" and each control, `[lengths]`, over `videos * DEPTHS` questions.
    """
    chance = 1 / len(ANIMALS)
    say(f"\naccuracy over {videos * DEPTHS} questions for each length, chance {chance:.2f}")
    say(f"{'frames':>7}{'tokens':>8}{'x trained':>10}{'ratio':>6}{'kept':>7}"
        f"{'found':>9}{'worst depth':>13}{'no VSTs':>9}{'other video':>13}")  # fmt: skip
    result: dict[str, Any] = {}
    for ratio in ratios:
        rows: dict[str, list[Any]] = {"depths": []}
        for frames in lengths:
            # The seed of a length is its own, so that a part of the map is that part of the whole.
            hits = found(model, frames, ratio, videos, seed=1_000_003 * frames)
            depths = hits["video"].float().mean(0)
            rows["depths"].append(depths.tolist())
            rates = {name: hit.float().mean().item() for name, hit in hits.items()}
            for name, rate in rates.items():
                rows.setdefault(name, []).append(rate)
            tokens = frames * FRAME_TOKENS
            say(f"{frames:7}{tokens:8}{frames / TRAINED_FRAMES:10.1f}{ratio:6}{tokens // ratio:7}"
                f"{rates['video']:9.4f}{depths.min().item():13.3f}{rates['no VSTs']:9.3f}"
                f"{rates['other video']:13.3f}")  # fmt: skip
        result[str(ratio)] = rows
    return result


def draw(result: dict[str, Any], lengths: Sequence[int], path: Path) -> None:
    """Heat maps of accuracy over depth x length, a panel for each ratio."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        1, len(result), figsize=(1 + 4.2 * len(result), 4), squeeze=False, layout="constrained"
    )
    for axes, (ratio, rows) in zip(panels[0], result.items(), strict=True):
        cells = torch.tensor(rows["depths"]).T.numpy()
        image = axes.imshow(cells, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        for (depth, length), value in {
            (d, n): cells[d, n] for d in range(len(cells)) for n in range(len(lengths))
        }.items():
            axes.text(length, depth, f"{value:.2f}", ha="center", va="center", fontsize=8)
        axes.set_xticks(range(len(lengths)), [str(n) for n in lengths])
        axes.set_yticks(range(DEPTHS), [f"{100 * d // (DEPTHS - 1)} %" for d in range(DEPTHS)])
        inside = sum(n <= TRAINED_FRAMES for n in lengths)
        if 0 < inside < len(lengths):
            axes.axvline(inside - 0.5, color="black", linestyle="--", linewidth=1.5)
        blind = max(rows["no VSTs"] + rows["other video"])
        axes.set_title(f"ratio {ratio}   (controls: at most {blind:.2f})", fontsize=10)
        axes.set_xlabel("frames of the video")
    panels[0][0].set_ylabel("depth of the needle")
    figure.colorbar(image, ax=panels[0].tolist(), label="accuracy", shrink=0.9)
    figure.suptitle(
        f"Needles found. Left of the dashed line: as long as in training. Chance: "
        f"{1 / len(ANIMALS)}",
        fontsize=11,
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--map-only", action="store_true", help="no training: --model's map")
    parser.add_argument("--model", type=Path, default=WEIGHTS, help="for --map-only")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--videos", type=int, default=50, help="for each length and ratio")
    parser.add_argument("--lengths", type=_numbers, default=LENGTHS, help="frames, with commas")
    parser.add_argument("--ratios", type=_numbers, default=RATIOS)
    parser.add_argument("--output", type=Path, default=Path("build/needle"))
    options = parser.parse_args()
    for name in ("steps", "videos"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: got {getattr(options, name)}, expected at least 1")
    if min(options.lengths) < DEPTHS:
        parser.error(f"--lengths: got {min(options.lengths)}, expected at least {DEPTHS} frames")
    options.output.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {"seed": options.seed, "lengths": list(options.lengths)}
    if options.map_only:
        model = load_needle_model(options.model)
    else:
        model = new_needle_model(options.seed)
        weights = sum(p.numel() for p in model.parameters())
        print(f"training {weights} weights on {torch.get_num_threads()} threads")
        begin = time.perf_counter()
        losses = train(model, options.steps, options.seed)
        record |= {"steps": options.steps, "train_seconds": time.perf_counter() - begin}
        record["losses"] = losses
        model.save_pretrained(options.output)
        model.processor.tokenizer.save_pretrained(options.output)
    begin = time.perf_counter()
    record["map"] = search(model, options.lengths, options.ratios, options.videos)
    record["map_seconds"] = time.perf_counter() - begin
    (options.output / "needle.json").write_text(json.dumps(record) + "\n")
    draw(record["map"], options.lengths, options.output / "needle.png")
    print(
        f"\n{options.output}: needle.png, needle.json" + ("" if options.map_only else ", weights")
    )


def _numbers(text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected numbers like 16,32")
    return numbers


if __name__ == "__main__":
    sys.exit(main())
