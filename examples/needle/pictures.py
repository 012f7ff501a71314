"""Teaches the needle model to see, then hides cards in real video: the map of `vxl eval needle`.

    python examples/needle/pictures.py --videos a.mp4 b.mp4 --output build/pictures
    vxl eval needle --model build/pictures/model --needles build/pictures/needles.json \\
        --haystack c.mp4 --lengths 16,32,64,128 --depths 8 --ratio 8

The decoder starts as the shipped needle model. Before it comes a vision tower of random weights,
which never learn, and a projector. A needle is a card: a word, the animal, on a ground of its
colour. The rest of a video are frames of real ones. First the projector learns by itself to give
cards the looks that the decoder knows, and other frames none. Then everything but the tower learns
from questions about whole videos with a needle in each window.

Take a haystack that is not among the videos of the training.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a checkout need not be installed

from examples.needle.task import (
    ANIMALS,
    COLOURS,
    WINDOW_FRAMES,
    appearances,
    draw_needles,
    load_needle_model,
    question,
)
from examples.needle.train import RATIOS, Curriculum, chat, make_optimizers, update
from vxl_model import WindowRatios
from vxl_model.video.decoders.base import VideoWarning

if TYPE_CHECKING:
    from vxl_model import VideoXLForConditionalGeneration

EDGE, PATCH, TOWER = 112, 14, 128  # pixels of a frame and a patch; features of the tower
STEPS, RATE = 300, 1e-3
PROJECTOR_STEPS = 1500
MOST_FRAMES = 2000  # of a video of the training
_FRAME_TOKENS = (EDGE // PATCH // 2) ** 2


# -- what is shown -----------------------------------------------------------------------------


def card(animal: int, colour: int) -> Any:
    """A picture of the animal's word on a ground of its colour."""
    from PIL import Image, ImageDraw, ImageFont

    picture = Image.new("RGB", (EDGE, EDGE), COLOURS[colour])
    draw = ImageDraw.Draw(picture)
    draw.rectangle((0, 28, EDGE, 84), fill="gray")
    font = ImageFont.load_default(38)
    draw.text((EDGE // 2, 54), ANIMALS[animal], fill="white", font=font, anchor="mm")
    return picture


def seeing_model(seed: int = 0) -> VideoXLForConditionalGeneration:
    """The shipped needle model with a vision tower and a projector of random weights."""
    from vxl_model import VideoXLConfig, VideoXLForConditionalGeneration
    from vxl_model.inputs.processing import VideoXLProcessor

    blind = load_needle_model()
    tower = {"hidden_size": TOWER, "intermediate_size": TOWER, "num_attention_heads": 4}
    tower |= {"num_hidden_layers": 1, "image_size": EDGE, "patch_size": PATCH}
    shown = WINDOW_FRAMES * _FRAME_TOKENS
    config = VideoXLConfig.from_dict(
        {
            **blind.config.to_dict(),
            "beacon_window": shown,
            "beacon_stride": shown,
            "mm_vision_tower": "random",
            "mm_hidden_size": TOWER,
            "mm_vision_select_layer": -1,
            "vision_config": tower,
        }
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = VideoXLForConditionalGeneration(config)
    model.load_state_dict(blind.state_dict(), strict=False)
    model.processor = VideoXLProcessor(blind.processor.tokenizer, size=EDGE)
    return model


class Pictures:
    """Features of the fixed tower, `(pictures, patches, TOWER)`: of cards and of frames.

    Args:
        videos: files, whose first `MOST_FRAMES` frames are read.
    """

    def __init__(self, model: VideoXLForConditionalGeneration, videos: Sequence[Path]) -> None:
        self.model = model
        pixels = model.processor.images_to_pixels(
            [card(a, c) for a in range(len(ANIMALS)) for c in range(len(COLOURS))]
        )
        self.cards = self._tower(pixels).reshape(len(ANIMALS), len(COLOURS), -1, TOWER)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", VideoWarning)  # there are fewer frames than that
            self.videos = [
                torch.cat([self._tower(x) for x in model.processor.video_pixels(v, MOST_FRAMES)])
                for v in videos
            ]

    @torch.no_grad()
    def _tower(self, pixels: Tensor) -> Tensor:
        return self.model.model.vision_tower(pixels)

    def tokens(self, features: Tensor) -> Tensor:
        """Features of pictures to visual tokens `(pictures, tokens, hidden)`, through the
        projector as it is now."""
        from vxl_model.decoder.vision_tower import project_and_pool

        return project_and_pool(features, self.model.model.mm_projector)

    def draw(self, frames: int, generator: torch.Generator) -> Tensor:
        """Frames of one video, evenly spaced from a place on; a short one is shown to and fro."""
        video = self.videos[int(torch.randint(len(self.videos), (), generator=generator))]
        stride = int(torch.randint(1, max(1, len(video) // frames) + 1, (), generator=generator))
        start = int(torch.randint(len(video), (), generator=generator))
        places = (start + stride * torch.arange(frames)) % (2 * len(video))
        return video[torch.where(places < len(video), places, 2 * len(video) - 1 - places)]


# -- learning ----------------------------------------------------------------------------------


def align(
    pictures: Pictures, steps: int, seed: int = 0, say: Callable[[str], None] = print
) -> list[float]:
    """The projector alone: cards get the looks of what is on them, other frames none, and the
    length of noise. Returns the loss of every step."""
    looks = appearances()
    generator = torch.Generator().manual_seed(seed)
    learning = list(pictures.model.model.mm_projector.parameters())
    optimizer = torch.optim.AdamW(learning, 1e-2, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=max(steps, 2))
    animals, colours = looks[: len(ANIMALS)], looks[len(ANIMALS) :][: len(COLOURS)]
    wanted = (animals[:, None] + colours).flatten(0, 1)[:, None]
    shown = torch.linalg.qr(torch.cat([animals, colours]).T)[0]  # what looks are made of
    frames = torch.cat(pictures.videos)
    losses = []
    for step in range(steps):
        cards = pictures.tokens(pictures.cards.flatten(0, 1))
        some = torch.randint(len(frames), (64,), generator=generator)
        others = pictures.tokens(frames[some])
        loss = (cards - wanted).square().sum(-1).mean()
        loss = loss + 4 * (others @ shown).square().sum(-1).mean()
        loss = loss + (others.norm(dim=-1) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 250 == 249 or step == steps - 1:
            say(f"projector, step {step + 1:4} of {steps}   loss {losses[-1]:.3f}")
    return losses


def train(
    pictures: Pictures,
    steps: int,
    seed: int = 0,
    tokens: int = 6144,
    folder: Path | None = None,
    say: Callable[[str], None] = print,
) -> list[float]:
    """Everything but the tower, in place. Returns the loss of every step. Videos have a needle in
    each window and become longer as they are learned.

    Args:
        tokens: visual tokens of a step, in videos of one length; 64 videos at most.
        folder: for checkpoints on the way.
    """
    model = pictures.model.train()
    model.model.vision_tower.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    optimizers = make_optimizers(model, RATE)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    rates = [group["lr"] for group in groups]
    learning = [p for p in model.parameters() if p.requires_grad]
    curriculum, losses, begin = Curriculum(), [], time.perf_counter()
    for step in range(steps):
        decay = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate * min(1.0, (step + 1) / 50) * decay
        windows = int(torch.randint(curriculum.windows, (2,), generator=generator).max()) + 1
        frames = windows * WINDOW_FRAMES
        frames -= int(torch.randint(WINDOW_FRAMES, (), generator=generator))
        picks = torch.randint(len(RATIOS), (windows,), generator=generator).tolist()
        if torch.rand((), generator=generator) < 0.5:
            picks = picks[:1] * windows
        count = min(windows, len(COLOURS))
        shown, ids, labels = [], [], []
        for _ in range(max(2, min(64, tokens // (frames * _FRAME_TOKENS)))):
            needles = draw_needles(generator, frames, count)
            video = pictures.draw(frames, generator).clone()
            for needle in needles:
                video[needle.frame] = pictures.cards[needle.animal, needle.colour]
            shown.append(video)
            text, supervised = chat(model, needles, whole=True)
            ids.append(text)
            labels.append(supervised)
        videos = pictures.tokens(torch.cat(shown)).flatten(0, 1).chunk(len(shown))
        loss = model(
            torch.tensor(ids),
            visual_features=list(videos),
            labels=torch.tensor(labels),
            ratio=WindowRatios([RATIOS[i] for i in picks]),
            loss_only=True,
        ).loss
        update(loss, optimizers, learning)
        losses.append(loss.item())
        curriculum.update(losses[-1])
        if step % 20 == 19 or step == steps - 1:
            say(
                f"step {step + 1:5} of {steps}   loss {curriculum.loss:.3f}   videos of up to "
                f"{curriculum.windows} windows   {time.perf_counter() - begin:5.0f} s"
            )
            if folder is not None:
                save(model, folder)
    model.eval()
    return losses


def save(model: VideoXLForConditionalGeneration, folder: Path) -> None:
    model.save_pretrained(folder)
    model.processor.save_pretrained(folder)


def write_needles(folder: Path, count: int, seed: int = 1) -> None:
    """`needles.json` and its cards, for `vxl eval needle`: `count` of each colour, of animals
    drawn by chance."""
    generator = torch.Generator().manual_seed(seed)
    animals = torch.rand(len(COLOURS), len(ANIMALS), generator=generator).argsort(1)[:, :count]
    needles = []
    for number, colour in itertools.product(range(count), range(len(COLOURS))):
        animal = int(animals[colour, number])
        name = f"{COLOURS[colour]}-{ANIMALS[animal]}.png"
        card(animal, colour).save(folder / name)
        needles.append({"picture": name, "question": question(colour), "answer": ANIMALS[animal]})
    (folder / "needles.json").write_text(json.dumps(needles, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--videos", nargs="+", type=Path, required=True, help="of the training")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--needles", type=int, default=2, help="cards of each colour in the map")
    parser.add_argument("--output", type=Path, default=Path("build/pictures"))
    options = parser.parse_args()
    for name, most in (("steps", math.inf), ("needles", len(ANIMALS))):
        if not 1 <= getattr(options, name) <= most:
            parser.error(f"--{name}: got {getattr(options, name)}, expected 1 to {most}")
    for video in options.videos:
        if not os.path.isfile(video):
            parser.error(f"--videos: got {video}, expected a file that is there")
    options.output.mkdir(parents=True, exist_ok=True)
    write_needles(options.output, options.needles)
    model = seeing_model(options.seed)
    pictures = Pictures(model, options.videos)
    print(f"frames of {', '.join(str(len(video)) for video in pictures.videos)}", flush=True)
    say = lambda line: print(line, flush=True)  # noqa: E731
    begin = time.perf_counter()
    losses = align(pictures, PROJECTOR_STEPS, options.seed, say)
    folder = options.output / "model"
    losses += train(pictures, options.steps, options.seed, folder=folder, say=say)
    run = {"steps": options.steps, "seed": options.seed, "losses": losses}
    run["seconds"] = time.perf_counter() - begin
    (options.output / "training.json").write_text(json.dumps(run) + "\n")
    print(f"{options.output}: model, needles.json")


if __name__ == "__main__":
    main()
