"""A tiny image-text model with random weights, as transformers saves one, and a captioner that
reads the number a picture shows."""

import numpy as np
import torch
from helpers.clips import read_number

TEXT = """
    apple bridge candle dragon eagle forest guitar hammer island jacket kettle ladder mirror
    needle orange pencil quartz rocket saddle tunnel violin walnut yellow zebra anchor basket
    carpet desert engine flower garden helmet iceberg jungle kitten lemon magnet napkin oyster
"""
WORDS = TEXT.split()
TEMPLATE = (
    "{% for m in messages %}user {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }} {% endif %}{% endfor %}"
    "{% endfor %}assistant"
)


def save_llava(folder, template=TEMPLATE):
    """Llava of CLIP and Qwen2, 2 layers each, whose vocabulary is `WORDS`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessorPil,
        CLIPVisionConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
        Qwen2Config,
    )

    special = ["<unk>", "<eos>", "<image>", "user", "assistant"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        unk_token="<unk>",
        eos_token="<eos>",
        pad_token="<eos>",
        additional_special_tokens=["<image>"],
    )
    edge = {"height": 32, "width": 32}
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=edge)
    LlavaProcessor(
        pictures,
        tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=16,
        ),
        text_config=Qwen2Config(
            vocab_size=len(vocabulary),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            initializer_range=0.5,
        ),
        image_token_id=vocabulary["<image>"],
    )
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():  # so that pictures matter, which they do not with small random weights
        for parameter in model.model.multi_modal_projector.parameters():
            parameter.normal_(std=0.5)
    model.generation_config.eos_token_id = vocabulary["<eos>"]
    model.save_pretrained(folder)
    return folder


class Reader:
    """A captioner that gives the numbers in the pictures of `clips.write_clip`. `seen`: those of
    every call."""

    name = "reader"

    def __init__(self, says=None, identity="reader 1"):
        self.identity = identity
        self.says = says or (
            lambda numbers: "scene " + " ".join(WORDS[n % len(WORDS)] for n in numbers)
        )
        self.seen = []

    def caption(self, pictures):
        numbers = [read_number(np.asarray(picture)) for picture in pictures]
        self.seen.append(numbers)
        return self.says(numbers)
