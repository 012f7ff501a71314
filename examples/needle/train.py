"""Teaches a tiny Video-XL to find needles, then looks for them in videos it was never trained on.

    python examples/needle/train.py                    # trains (12 minutes), then the map
    python examples/needle/train.py --map-only         # the map of the shipped weights
    python examples/needle/train.py --steps 20 --videos 2 --lengths 16,32   # only to see it run

`task.py` defines a needle. Training draws videos of up to 32 frames (eight windows, a ratio of 2
to 16 for each) and asks about every needle in them. It starts with two windows and takes longer
videos once it answers the shorter ones. The package computes everything: attention through the
accumulated VSTs, its gradients, and the cache that questions share.

The map shows accuracy over the depth of the needle and the length of the video, here up to eight
times the longest training video. Two controls use the same weights:
    no VSTs       the text alone, as if nothing of the video had been kept
    other video   questions on a video whose answers were drawn anew
Both can only guess, with one animal in ten right.

Source: Video-XL section 4 (needle in a haystack), section 3.4 (training).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a checkout need not be installed

from examples.needle.task import (
    ANIMALS,
    COLOURS,
    FRAME_TOKENS,
    TRAINED_FRAMES,
    WEIGHTS,
    WINDOW_FRAMES,
    Needle,
    answer,
    draw_needles,
    load_needle_model,
    make_video,
    new_needle_model,
    question,
)
from vxl_model import WindowRatios
from vxl_model.inputs.arguments import IMAGE_TOKEN

if TYPE_CHECKING:
    from vxl_model import VideoXLForConditionalGeneration

RATIOS = (2, 4, 8, 16)
STEPS = 2000
LENGTHS = (16, 32, 64, 128, 256)
DEPTHS = 8  # of the needle, from the first frame to the last
KINDS = ("video", "no VSTs", "other video")


# -- training ----------------------------------------------------------------------------------


def chat(
    model: VideoXLForConditionalGeneration, needles: Sequence[Needle], whole: bool
) -> tuple[list[int], list[int]]:
    """Ids and labels of a conversation that asks about every needle. The animals are
    supervised, or the whole answers with their ends."""
    processor = model.processor
    ids = [*processor.prefix_ids()[0].tolist(), IMAGE_TOKEN]
    labels = [-100] * len(ids)
    turn = processor.prefix_ids()[0, -2:].tolist()  # <|im_start|>user
    for needle in needles:
        asked = processor.suffix_ids(question(needle.colour))[0].tolist()
        said = [*words(model, answer(needle)), processor.stop_ids[0]]
        ids += [*asked, *said, *turn]
        animal = [-100, said[1], -100]
        labels += [-100] * len(asked) + (said if whole else animal) + [-100] * len(turn)
    return ids[: -len(turn)], labels[: -len(turn)]


def words(model: VideoXLForConditionalGeneration, text: str) -> list[int]:
    ids: list[int] = model.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


class Curriculum:
    """The most windows of a video: 2 at first, one more whenever the smoothed loss is below
    `goal`."""

    def __init__(self, goal: float = 0.3, patience: int = 20) -> None:
        self.windows, self.goal, self.patience = 2, goal, patience
        self.loss, self._since = math.inf, 0

    def update(self, loss: float) -> None:
        self.loss = loss if math.isinf(self.loss) else 0.9 * self.loss + 0.1 * loss
        self._since += 1
        if self.loss < self.goal and self._since >= self.patience:
            self.windows = min(TRAINED_FRAMES // WINDOW_FRAMES, self.windows + 1)
            self._since = 0


def make_optimizers(
    model: VideoXLForConditionalGeneration, rate: float
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embeddings, norms and biases."""
    layers = list(model.model.layers.parameters())
    matrices = [p for p in layers if p.dim() == 2]
    inside = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in inside]
    return [
        torch.optim.Muon(matrices, lr=7 * rate, weight_decay=0.01),
        torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def update(
    loss: torch.Tensor,
    optimizers: Sequence[torch.optim.Optimizer],
    weights: Iterable[torch.Tensor],
) -> None:
    """A step of the optimizers, by gradients of `weights` with a norm of at most 1."""
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(weights, 1.0)
    for optimizer in optimizers:
        optimizer.step()


def train(
    model: VideoXLForConditionalGeneration,
    steps: int,
    seed: int = 0,
    learning_rate: float = 3e-3,
    tokens: int = 9216,
    whole_from: float = 0.35,
    say: Callable[[str], None] = print,
) -> list[float]:
    """Trains in place and returns the loss of every step. The same seed gives the same run.

    Args:
        tokens: visual tokens of a step, in videos of one length; 64 videos at most.
        whole_from: share of the steps after which whole answers are supervised, not only animals.
    """
    model.train()
    generator = torch.Generator().manual_seed(seed)
    optimizers = make_optimizers(model, learning_rate)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    rates = [group["lr"] for group in groups]
    curriculum = Curriculum()
    losses = []
    begin = time.perf_counter()
    for step in range(steps):
        decay = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate * min(1.0, (step + 1) / 50) * decay
        # Mostly videos near the present limit, which teach the most.
        windows = int(torch.randint(curriculum.windows, (2,), generator=generator).max()) + 1
        frames = windows * WINDOW_FRAMES
        frames -= int(torch.randint(WINDOW_FRAMES, (), generator=generator))
        batch = max(2, min(64, tokens // (frames * FRAME_TOKENS)))
        picks = torch.randint(len(RATIOS), (windows,), generator=generator).tolist()
        if torch.rand((), generator=generator) < 0.5:  # the same for all: the longest caches too
            picks = picks[:1] * windows
        # The words around the animal are soon learned. From the start they would be most of the
        # loss, and animals be learned later (by a hundred steps and more).
        whole = step >= whole_from * steps
        videos, ids, labels = [], [], []
        for _ in range(batch):
            needles = draw_needles(generator, frames)
            videos.append(make_video(frames, needles, generator))
            text, supervised = chat(model, needles, whole)
            ids.append(text)
            labels.append(supervised)
        loss = model(
            torch.tensor(ids),
            visual_features=videos,
            labels=torch.tensor(labels),
            ratio=WindowRatios([RATIOS[i] for i in picks]),
            loss_only=True,
        ).loss
        update(loss, optimizers, model.parameters())
        losses.append(loss.item())
        curriculum.update(losses[-1])
        if step % 50 == 49 or step == steps - 1:
            say(
                f"step {step + 1:5} of {steps}   loss {curriculum.loss:.3f}   videos of up to "
                f"{curriculum.windows} windows   {time.perf_counter() - begin:5.0f} s"
            )
    model.eval()
    return losses


# -- the map -----------------------------------------------------------------------------------


def apart(frames: int) -> int:
    """The stride between depths whose needles fit into one video with at most one a window."""
    return max(1, math.ceil((DEPTHS - 1) * WINDOW_FRAMES / max(frames - 1, 1)))


@torch.no_grad()
def found(
    model: VideoXLForConditionalGeneration, frames: int, ratio: int, videos: int, seed: int
) -> dict[str, Tensor]:
    """Which questions were answered right, at `DEPTHS` depths from the first frame to the last.

    Args:
        videos: questions for each depth.

    Returns:
        bool `(videos, DEPTHS)`: "video", the whole generated answer is right and ends there; and
        for the controls "no VSTs" and "other video", the likeliest animal is right.
    """
    generator = torch.Generator().manual_seed(seed)
    stride = apart(frames)
    places = [round(i * (frames - 1) / (DEPTHS - 1)) for i in range(DEPTHS)]
    colours = torch.tensor([words(model, colour) for colour in COLOURS])
    animals = torch.tensor([words(model, animal) for animal in ANIMALS])[:, 0]
    asked = torch.cat([model.processor.suffix_ids(question(c)) for c in range(len(COLOURS))])
    half = torch.cat([asked, colours], dim=1)  # the answer's colour given away
    prompt = model.processor.prefix_ids().expand(len(asked), -1)
    blind = model(torch.cat([prompt, half], dim=1)).logits[:, -1, animals].argmax(-1)
    stop = model.processor.stop_ids[0]
    hits = {name: torch.zeros(videos, DEPTHS, dtype=torch.bool) for name in KINDS}
    for video in range(videos):
        for first in range(min(stride, DEPTHS)):
            depths = range(first, DEPTHS, stride)
            needles = draw_needles(generator, [places[d] for d in depths])
            strangers = draw_needles(generator, [places[d] for d in depths])
            shown = make_video(frames, needles, generator)
            memory = model.watch(visual_features=shown, ratio=ratio)
            said = model.generate(
                asked,
                memory=memory,
                max_new_tokens=3,
                eos_token_id=stop,
                pad_token_id=stop,
                attention_mask=torch.ones_like(asked),
            )[:, asked.shape[1] :]
            guess = model(half, memory=memory).logits[:, -1, animals].argmax(-1)
            for depth, needle, stranger in zip(depths, needles, strangers, strict=True):
                cell = (video, depth)
                right = [*words(model, answer(needle)), stop]
                hits["video"][cell] = said[needle.colour].tolist() == right
                hits["no VSTs"][cell] = int(blind[needle.colour]) == needle.animal
                hits["other video"][cell] = int(guess[stranger.colour]) == stranger.animal
    return hits


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
    say(
        f"{'frames':>7}{'tokens':>8}{'x trained':>10}{'ratio':>6}{'kept':>7}"
        f"{'found':>9}{'worst depth':>13}{'no VSTs':>9}{'other video':>13}"
    )
    result: dict[str, Any] = {}
    for ratio in ratios:
        rows: dict[str, list[Any]] = {"depths": []}
        for frames in lengths:
            # Each length has its own seed, so a part of the map equals that part of the whole map.
            hits = found(model, frames, ratio, videos, seed=1_000_003 * frames)
            depths = hits["video"].float().mean(0)
            rows["depths"].append(depths.tolist())
            rates = {name: hit.float().mean().item() for name, hit in hits.items()}
            for name, rate in rates.items():
                rows.setdefault(name, []).append(rate)
            tokens = frames * FRAME_TOKENS
            say(
                f"{frames:7}{tokens:8}{frames / TRAINED_FRAMES:10.1f}{ratio:6}{tokens // ratio:7}"
                f"{rates['video']:9.4f}{depths.min().item():13.3f}{rates['no VSTs']:9.3f}"
                f"{rates['other video']:13.3f}"
            )
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
        image = axes.imshow(cells, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        for (depth, length), value in {
            (d, n): cells[d, n] for d in range(len(cells)) for n in range(len(lengths))
        }.items():
            ink = "black" if value > 0.6 else "white"
            axes.text(
                length, depth, f"{value:.2f}", color=ink, ha="center", va="center", fontsize=8
            )
        axes.set_xticks(range(len(lengths)), [str(n) for n in lengths])
        axes.set_yticks(range(DEPTHS), [f"{100 * d // (DEPTHS - 1)} %" for d in range(DEPTHS)])
        inside = sum(n <= TRAINED_FRAMES for n in lengths)
        if 0 < inside < len(lengths):
            axes.axvline(inside - 0.5, color="black", linestyle="--", linewidth=1.5)
        blind = [sum(rows[kind]) / len(lengths) for kind in KINDS[1:]]
        axes.set_title(
            f"ratio {ratio}   (no VSTs: {blind[0]:.2f}, other video: {blind[1]:.2f})", fontsize=10
        )
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
    parser.add_argument("--videos", type=int, default=25, help="questions of a cell of the map")
    parser.add_argument("--lengths", type=_numbers, default=LENGTHS, help="frames, with commas")
    parser.add_argument("--ratios", type=_numbers, default=RATIOS[1:])
    parser.add_argument("--output", type=Path, default=Path("build/needle"))
    options = parser.parse_args()
    for name in ("steps", "videos"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: got {getattr(options, name)}, expected at least 1")
    if min(options.lengths) < DEPTHS:
        parser.error(f"--lengths: got {min(options.lengths)}, expected at least {DEPTHS} frames")
    for ratio in options.ratios:
        if ratio > WINDOW_FRAMES * FRAME_TOKENS:
            most = WINDOW_FRAMES * FRAME_TOKENS
            parser.error(f"--ratios: got {ratio}, expected at most a window, {most} tokens")
    if importlib.util.find_spec("matplotlib") is None:
        parser.error("matplotlib draws the map and is not installed: pip install matplotlib")
    options.output.mkdir(parents=True, exist_ok=True)
    if options.map_only:
        model = load_needle_model(options.model)
    else:
        model = new_needle_model(options.seed)
        weights = sum(p.numel() for p in model.parameters())
        print(f"training {weights} weights on {torch.get_num_threads()} threads")
        begin = time.perf_counter()
        losses = train(model, options.steps, options.seed)
        run = {
            "steps": options.steps,
            "seed": options.seed,
            "seconds": time.perf_counter() - begin,
            "losses": losses,
        }
        (options.output / "training.json").write_text(json.dumps(run) + "\n")
        model.save_pretrained(options.output / "model")
        model.processor.tokenizer.save_pretrained(options.output / "model")
    found = search(model, options.lengths, options.ratios, options.videos)
    chart = {"lengths": list(options.lengths), "questions": options.videos, "ratios": found}
    (options.output / "map.json").write_text(json.dumps(chart) + "\n")
    draw(found, options.lengths, options.output / "map.png")
    print(f"\n{options.output}: map.png, map.json{'' if options.map_only else ', model'}")


def _numbers(text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected numbers like 16,32")
    return numbers


if __name__ == "__main__":
    main()
