"""What remains after a call does not depend on the mode in which the call was made."""

import pytest
import torch
from helpers.model_goldens import (
    random_features,
    relative,
    small_model,
    tiny_expected,
    tiny_model,
)
from helpers.modes import default_dtype
from transformers import Trainer, TrainingArguments

from vxl_kernels import VarlenLayout, VstCache
from vxl_kernels.testing import inverse_frequencies
from vxl_model.decoder.context import CacheContext
from vxl_model.settings import ExecutionSettings

IDS = torch.tensor([[5, 6, 7, -200, 9, 10, 11]])
SUFFIX = torch.tensor([9, 10, 11])


@pytest.fixture
def model():
    return small_model()


@pytest.fixture(scope="module")
def features():
    return random_features(108)


MODES = {
    "inference mode": torch.inference_mode,
    "no gradients": torch.no_grad,
    "float64 by default": lambda: default_dtype(torch.float64),
    "bfloat16 by default": lambda: default_dtype(torch.bfloat16),
    "meta device by default": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


def loss_and_gradients(model, features):
    model.train()
    model.zero_grad()
    loss = model(IDS, visual_features=[features], labels=IDS).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("mode", MODES)
def test_a_first_call_in_a_mode_changes_no_later_one(model, features, mode):
    """Later calls of the same model: loss and gradients, logits, a memory and its answer."""
    fresh = small_model()
    with MODES[mode]():
        model.watch(input_ids=IDS[0, :3], visual_features=features)
        model(IDS, visual_features=[features])
    for a, b in zip(
        loss_and_gradients(model, features), loss_and_gradients(fresh, features), strict=True
    ):
        assert torch.equal(a, b)
    model.eval(), fresh.eval()
    logits = [m(IDS, visual_features=[features]).logits for m in (model, fresh)]
    assert torch.equal(*logits)
    answers = [
        m.watch(input_ids=[5, 6, 7], visual_features=features).ask(SUFFIX, max_new_tokens=6)
        for m in (model, fresh)
    ]
    assert torch.equal(*answers)


@pytest.mark.parametrize("mode", [m for m in MODES if m != "autocast"])
@pytest.mark.parametrize("asked_within", [False, True])
def test_a_memory_made_in_a_mode_is_asked_outside_and_inside(model, features, mode, asked_within):
    """A memory that is watched, asked, appended to, forked and saved has the bits of no mode."""
    plain = model.watch(input_ids=[5, 6, 7], visual_features=features[:100])
    with MODES[mode]():
        memory = model.watch(input_ids=[5, 6, 7], visual_features=features[:100])
        if asked_within:
            memory.ask(SUFFIX, max_new_tokens=3)
            memory.append(visual_features=features[:20])
    if not asked_within:
        memory.append(visual_features=features[:20])
    plain.append(visual_features=features[:20])
    fork = memory.fork()
    for asked in (memory, fork):
        answer = asked.ask(SUFFIX, max_new_tokens=6)
        assert torch.equal(answer, plain.ask(SUFFIX, max_new_tokens=6))
    fork.append(visual_features=features)
    for a, b in zip(memory.keys_values(1), plain.keys_values(1), strict=True):
        assert torch.equal(a, b)


def test_frames_do_not_depend_on_the_default_dtype():
    model = tiny_model(ratio=4)
    frames = tiny_expected()["first_frame"].to(torch.uint8)[None]
    plain = model.watch(frames, input_ids=[5])
    with default_dtype(torch.bfloat16):
        other = model.watch(frames, input_ids=[5])
    for a, b in zip(plain.keys_values(1), other.keys_values(1), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_autocast(model, features, checkpoint):
    """In autocast, watching, asking, generating and both kinds of loss are near the plain numbers.
    A memory that is made inside may be asked outside, and the other way round."""
    source = {"visual_features": features}
    if checkpoint:
        model, source = tiny_model(ratio=4), {"pixel_values": tiny_expected()["pixel_values"]}
    plain = model.watch(input_ids=[5], **source)
    logits = model(SUFFIX[None], memory=plain).logits
    arguments = {name: [x] for name, x in source.items()}
    loss = model(IDS, labels=IDS, **arguments).loss.detach()
    with torch.autocast("cpu", torch.bfloat16):
        memory = model.watch(input_ids=[5], **source)
        inside = [model(SUFFIX[None], memory=m).logits for m in (memory, plain)]
        memory.ask(SUFFIX, max_new_tokens=4, num_beams=2)
        model.generate(IDS, max_new_tokens=3, **arguments)
        with torch.no_grad():
            losses = [model(IDS, labels=IDS, **arguments)]
        losses.append(model.train()(IDS, labels=IDS, **arguments))
        losses[-1].loss.backward()
    model.eval()
    for got in (*inside, model(SUFFIX[None], memory=memory).logits):
        assert relative(got.float(), logits) < 0.05
    for out in losses:
        assert relative(out.loss.detach().float(), loss) < 0.02
    more = model(torch.tensor([[12]]), memory=losses[0].memory)  # kept by a pass in autocast
    assert torch.isfinite(more.logits).all()


@pytest.mark.parametrize("ragged", [False, True])
def test_autocast_rounds_what_is_attended_to_once(ragged):
    """Rows of bf16 are rotated and attended to in the precision of a float32 cache."""
    cache, sizes = VstCache(1, 1, 16, num_pages=8, page_size=8), [5, 5]
    rows = [torch.randn(2, 5, heads, 16, dtype=torch.bfloat16) for heads in (2, 1, 1)]
    layout = VarlenLayout(sizes, torch.device("cpu")) if ragged else None
    rows = [x.flatten(0, 1)[None] if ragged else x for x in rows]
    found = []
    for inside in (True, False):
        batch = cache.batch([cache.new(), cache.new()])
        batch.reserve(5)
        settings = ExecutionSettings(batch_invariant=False)
        context = CacheContext(batch, layout, inverse_frequencies(16), settings)
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            qkv = tuple(x.clone() if inside else x.float() for x in rows)
            found.append(torch.cat(context.attend(0, [qkv])))
    assert torch.equal(found[0], found[1].to(torch.bfloat16))


def test_a_trainer_evaluates_in_bf16(model, features, tmp_path):
    labels = IDS.masked_fill(IDS < 0, -100)
    data = [{"input_ids": IDS[0], "labels": labels[0], "x": features}] * 2
    modes = []

    def collate(items):
        batch = {name: torch.stack([x[name] for x in items]) for name in ("input_ids", "labels")}
        return {**batch, "visual_features": [x["x"] for x in items]}

    settings = TrainingArguments(
        tmp_path, use_cpu=True, bf16=True, remove_unused_columns=False, report_to=[]
    )
    trainer = Trainer(model, settings, collate, eval_dataset=data)
    model.model.layers[0].register_forward_hook(
        lambda *_: modes.append(torch.is_autocast_enabled("cpu"))
    )
    loss = trainer.evaluate()["eval_loss"]
    assert modes == [True] * 2
    plain = small_model()(IDS, visual_features=[features], labels=labels).loss
    assert loss == pytest.approx(float(plain.detach()), rel=0.02)


@pytest.mark.parametrize("how", ["append", "watch"])
def test_a_buffer_may_be_filled_again(model, features, how):
    """A camera's loop does this while a window or a step is not full."""
    pieces = features.split(12)
    wanted = model.watch(input_ids=[5, 6, 7], visual_features=[x.clone() for x in pieces])
    buffer = torch.empty_like(pieces[0])
    if how == "append":
        memory = model.watch(input_ids=[5, 6, 7], visual_features=[])
        for piece in pieces:
            memory.append(visual_features=buffer.copy_(piece))
    else:
        memory = model.watch(
            input_ids=[5, 6, 7], visual_features=(buffer.copy_(x) for x in pieces), tokens=108
        )
    buffer.fill_(torch.nan)
    for layer in range(3):
        for a, b in zip(memory.keys_values(layer), wanted.keys_values(layer), strict=True):
            assert relative(a, b) < 1e-5
