"""Watches a video once and answers questions about it.

python examples/ask_a_video.py CHECKPOINT VIDEO QUESTION...
"""

import sys

import torch

from vxl_model import VideoXLForConditionalGeneration

checkpoint, video, *questions = sys.argv[1:]
device = "cuda" if torch.cuda.is_available() else "cpu"
model = VideoXLForConditionalGeneration.from_pretrained(
    checkpoint, dtype=torch.bfloat16, device_map=device, ratio=8
)
memory = model.watch(video)  # 1 frame a second, at most 128
for question in questions:
    print(memory.ask(question, max_new_tokens=64))
