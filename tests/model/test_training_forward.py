"""Loss and gradients beyond the goldens: batches, padding, prefixes, checkpointing, partial
windows."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers.model_goldens import relative, small_model

from vxl_model import WindowRatios
from vxl_model.decoder.context import PackedContext
from vxl_model.decoder.layers import VideoXLDecoder


@pytest.fixture
def model():
    return small_model()


@pytest.fixture(scope="module")
def features():
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(n, 64, generator=generator) * 0.1 for n in (110, 61)]


IDS = torch.tensor([[1, 5, 6, -200, 9, 10, 11], [5, 6, 7, -200, 12, 13, 1]])
MASK = torch.tensor([[0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0]])
LABELS = torch.tensor([[-100, 5, 6, -100, 9, -100, 11], [-100, 6, -100, -200, 12, 13, -100]])


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_a_batch_is_the_mean_over_its_tokens(model, features):
    both = model(IDS, visual_features=features, labels=LABELS, attention_mask=MASK)
    total, tokens = 0.0, 0
    for i in range(2):
        keep = MASK[i].bool()
        ids, labels = IDS[i : i + 1, keep], LABELS[i : i + 1, keep]
        out = model(ids, visual_features=[features[i]], labels=labels)
        # Row 0's first token is supervised too, but nothing predicts it.
        count = int(((labels != -100) & (ids != -200))[0, 1:].sum())
        total, tokens = total + float(out.loss.detach()) * count, tokens + count
    assert float(both.loss.detach()) == pytest.approx(total / tokens, rel=1e-5)


def test_loss_by_hand(model, features):
    """The loss from the logits of forward. Those of the prefix come from a pass over it alone."""
    ids, labels = IDS[:1, 1:], LABELS[:1, 1:]
    out = model(ids, visual_features=features[:1], labels=labels)
    prompt = model(ids[:, :2]).logits[0]
    # The last raw row predicts the first suffix token. Logits do not show it, so leave it out.
    labels = labels.clone()
    labels[0, 3] = -100
    without_first = model(ids, visual_features=features[:1], labels=labels).loss
    want = F.cross_entropy(torch.stack([prompt[0], out.logits[0, 1]]), torch.tensor([6, 11]))
    assert float(without_first.detach()) == pytest.approx(float(want.detach()), rel=1e-5)


def test_training_equals_inference(model, features):
    with torch.no_grad():
        trained = model(IDS, visual_features=features, labels=LABELS, attention_mask=MASK)
        plain = model(IDS, visual_features=features, attention_mask=MASK)
    assert relative(trained.logits, plain.logits) < 1e-5
    for i in range(2):
        for layer in range(3):
            pairs = zip(
                trained.memory.keys_values(layer, i),
                plain.memory.keys_values(layer, i),
                strict=True,
            )
            assert all(relative(a, b) < 1e-5 for a, b in pairs)
    assert trained.memory.vst_counts == plain.memory.vst_counts
    more = torch.tensor([[20], [21]])
    a, b = (model(more, memory=x.memory).logits for x in (trained, plain))
    assert relative(a, b) < 1e-5


MIXED = torch.tensor(
    [
        [1, 5, 6, -200, 9, 10, 11, 1],
        [5, -200, 7, 8, 9, 10, 12, 13],
        [5, 6, 7, 8, -200, 14, 1, 1],
        [3, 4, 5, 6, 7, 8, 9, 10],
        [-200, 9, 11, 12, 13, 14, 1, 1],
        [8, 9, -200, 10, 12, 14, 16, 18],
    ]
)
MIXED_MASK = torch.ones_like(MIXED)
MIXED_MASK[0, 0] = MIXED_MASK[2, -2:] = MIXED_MASK[3, :2] = MIXED_MASK[4, -1] = 0
MIXED_RATIOS = [
    WindowRatios([2, 8, 4]),
    WindowRatios([4, 2]),
    WindowRatios([16]),
    None,
    WindowRatios([16, 2]),  # the last window of 1 token has no VST
    WindowRatios([16, 16, 8]),  # windows of 48, 48 and 2 tokens
]


@pytest.fixture(scope="module")
def mixed_videos():
    generator = torch.Generator().manual_seed(6)
    sizes = (110, 61, 48, None, 49, 98)
    return [n and torch.randn(n, 64, generator=generator) * 0.1 for n in sizes]


def trained(model, videos, **more):
    """Loss, logits and gradients of the mixed batch."""
    model.zero_grad()
    videos = [None if x is None else x.clone().requires_grad_() for x in videos]
    out = model(
        MIXED,
        visual_features=videos,
        attention_mask=MIXED_MASK,
        ratio=MIXED_RATIOS,
        labels=MIXED.masked_fill(MIXED_MASK == 0, -100),
        **more,
    )
    out.loss.backward()
    grads = {k: g.clone() for k, g in gradients(model).items()}
    grads |= {f"video {i}": x.grad for i, x in enumerate(videos) if x is not None}
    return out.loss.detach(), out.logits.detach(), grads


def noted_passes(monkeypatch):
    """The numbers of segments of the passes that follow."""
    passes = []
    run = VideoXLDecoder.run

    def noted(self, hidden, context, *rest, **more):
        if isinstance(context, PackedContext):
            passes.append(len(context.layout))
        return run(self, hidden, context, *rest, **more)

    monkeypatch.setattr(VideoXLDecoder, "run", noted)
    return passes


@pytest.mark.parametrize("kernels", ["ragged", "fixed"])
@pytest.mark.parametrize("page_size", [16, 128])
def test_packed_samples_get_the_gradients_of_one_by_one(
    model, mixed_videos, monkeypatch, kernels, page_size
):
    """Samples of other prefixes, videos, ratios and texts share a pass, also where a device has no
    kernels of ragged calls. Text alone and a last window without a VST are among them.

    Both ways round, so both are held against the gradients in float64."""
    exact = copy.deepcopy(model).double()
    exact.settings.backend, exact.settings.packing = "reference", False
    truth = trained(exact, [x if x is None else x.double() for x in mixed_videos])[2]
    passes = noted_passes(monkeypatch)
    model.settings.packing = False
    loss, logits, wanted = trained(model, mixed_videos)
    assert passes == [5, 4, 3, 1, 3, 4]
    passes.clear()
    model.settings.packing, model.settings.page_size = True, page_size
    if kernels == "fixed":
        monkeypatch.setattr("vxl_model.decoder.context.serves", lambda *x: False)
        monkeypatch.setattr("vxl_model.decoder.context.vst_attention_varlen", None)
    packed_loss, packed_logits, grads = trained(model, mixed_videos)
    assert passes == [20]
    assert float(packed_loss) == pytest.approx(float(loss), rel=1e-6)
    assert relative(packed_logits, logits) < 2e-6
    assert grads.keys() == wanted.keys() == truth.keys()
    packed, one_by_one = (max(relative(x[k], truth[k]) for k in truth) for x in (grads, wanted))
    assert packed < 1.5 * one_by_one < 5e-6


def test_a_packed_pass_computes_the_same(model, mixed_videos):
    """In float64 nothing is left of the rounding."""
    model.double().settings.backend = "reference"
    videos = [None if x is None else x.double() for x in mixed_videos]
    model.settings.packing = False
    loss, logits, wanted = trained(model, videos)
    model.settings.packing = True
    packed_loss, packed_logits, grads = trained(model, videos)
    assert float(packed_loss) == pytest.approx(float(loss), rel=1e-13)
    assert relative(packed_logits, logits) < 1e-13
    assert max(relative(grads[k], wanted[k]) for k in wanted) < 1e-13


def test_a_pass_has_a_bounded_number_of_rows(model, mixed_videos, monkeypatch):
    """Neighbours share a pass up to a number of rows. A sample of more is alone."""
    passes = noted_passes(monkeypatch)
    for most, segments in ((10_000, [20]), (140, [5, 4, 7, 4]), (50, [5, 4, 3, 1, 3, 4])):
        monkeypatch.setattr("vxl_model.training_forward._PACK_ROWS", most)
        passes.clear()
        trained(model, mixed_videos)
        assert passes == segments


def test_when_a_pass_is_packed(model, mixed_videos, monkeypatch):
    """Without gradients a row has the same bits in every batch, unless settings say otherwise."""
    passes = noted_passes(monkeypatch)
    call = {"visual_features": mixed_videos, "attention_mask": MIXED_MASK, "ratio": MIXED_RATIOS}
    with torch.no_grad():
        apart = model(MIXED, labels=MIXED, **call)
        model.settings.batch_invariant = False
        packed = model(MIXED, labels=MIXED, **call)
    assert passes == [5, 4, 3, 1, 3, 4, 20]
    assert relative(packed.logits, apart.logits) < 1e-5
    assert packed.memory.vst_counts == apart.memory.vst_counts
    for i in range(len(MIXED)):
        for layer in range(3):
            pairs = zip(
                packed.memory.keys_values(layer, i), apart.memory.keys_values(layer, i), strict=True
            )
            assert all(relative(a, b) < 1e-5 for a, b in pairs)


def test_gradient_checkpointing_changes_nothing(model, features):
    model.train()
    out = model(IDS, visual_features=features, labels=LABELS, attention_mask=MASK)
    out.loss.backward()
    plain = {k: g.clone() for k, g in gradients(model).items()}
    model.zero_grad()
    # transformers 5.17 has only the old name, later versions warn about it
    name = "checkpointing_enable"
    getattr(model, f"activation_{name}", getattr(model, f"gradient_{name}"))()
    assert all(layer.gradient_checkpointing for layer in model.model.layers)
    again = model(IDS, visual_features=features, labels=LABELS, attention_mask=MASK)
    again.loss.backward()
    assert float(again.loss.detach()) == float(out.loss.detach())
    assert gradients(model).keys() == plain.keys()
    for name, gradient in gradients(model).items():
        assert torch.equal(gradient, plain[name]), name


@pytest.mark.parametrize("tokens", [3, 50])
def test_last_window_without_a_vst_still_predicts(model, features, tokens):
    """Ratio 4 and 3 (or 48 + 2) tokens give no VST at the end, yet the last raw row predicts a
    token."""
    visual = features[0][:tokens].clone().requires_grad_()
    ids, labels = torch.tensor([[5, -200, 9]]), torch.tensor([[-100, -100, 9]])
    out = model(ids, visual_features=[visual], labels=labels)
    out.loss.backward()
    assert float(visual.grad[-1].abs().max()) > 0
    if tokens == 3:  # then the window is plain causal text
        embeds = torch.cat([model.model.embed_tokens(ids[0, :1]), visual])
        want = causal_logits(model, embeds)[-1]
        assert float(out.loss.detach()) == pytest.approx(
            float(F.cross_entropy(want, ids[0, 2]).detach()), rel=1e-5
        )


def causal_logits(model, embeds):
    """Logits of Qwen2 itself with the same weights."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    names = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
        "rms_norm_eps",
        "rope_parameters",
    )
    plain = Qwen2ForCausalLM(Qwen2Config(**{n: getattr(model.config, n) for n in names})).eval()
    weights = {k: v for k, v in model.state_dict().items() if "beacon" not in k}
    plain.load_state_dict(weights)
    return plain(inputs_embeds=embeds[None]).logits[0]


def test_nothing_supervised(model, features):
    out = model(IDS[:1, 1:], visual_features=features[:1], labels=torch.full((1, 6), -100))
    assert float(out.loss.detach()) == 0
    out.loss.backward()


def test_only_the_projector_learns(features):
    """Stage 1: gradients reach the projector through frozen layers."""
    from helpers.model_goldens import tiny_expected, tiny_model

    model = tiny_model(ratio=4).train().requires_grad_(False)
    model.model.mm_projector.requires_grad_(True)
    pixels = tiny_expected()["pixel_values"]
    ids = torch.tensor([[5, -200, 9, 10]])
    model(ids, pixel_values=pixels, labels=ids).loss.backward()
    found = gradients(model)
    assert len(found) == 4
    assert all("mm_projector" in k and float(g.abs().max()) > 0 for k, g in found.items())


def test_loss_only_and_parts_of_a_batch(model, features):
    """Returns no logits. Sums over parts, divided by the tokens of the whole, add up to the
    mean."""
    arguments = {"visual_features": features, "attention_mask": MASK}
    both = model(IDS, labels=LABELS, loss_only=True, **arguments)
    assert both.logits is None
    assert torch.equal(both.loss, model(IDS, labels=LABELS, **arguments).loss)
    parts = []
    for i in range(2):
        keep = MASK[i].bool()
        parts.append(
            model(
                IDS[i : i + 1, keep],
                visual_features=[features[i]],
                labels=LABELS[i : i + 1, keep],
                loss_only=True,
                num_items_in_batch=torch.tensor(6),
            ).loss
        )
    # 6, 9 and 11 of the first row (its first token has no predictor), 6, 12 and 13 of the second.
    assert float(sum(parts).detach()) == pytest.approx(float(both.loss.detach()), rel=1e-5)
    with pytest.raises(ValueError, match="loss_only: got True without labels"):
        model.train()(IDS, loss_only=True, **arguments)


def test_text_alone_beside_a_video(model, features):
    """Each row gets the same numbers as alone. Every parameter gets a gradient, some of them 0."""
    model.train()
    ids = torch.tensor([[5, 6, 7, -200, 12, 13], [5, 6, 9, 10, 11, 1]])
    labels = ids.masked_fill(ids == -200, -100)
    both = model(ids, visual_features=[features[0], None], labels=labels)
    video = model(ids[:1], visual_features=features[:1], labels=labels[:1])
    text = model(ids[1:], labels=labels[1:])
    want = (float(video.loss.detach()) * 4 + float(text.loss.detach()) * 5) / 9
    assert float(both.loss.detach()) == pytest.approx(want, rel=1e-5)
    text.loss.backward()
    found = gradients(model)
    assert found.keys() == dict(model.named_parameters()).keys()
    idle = [name for name, g in found.items() if not bool(g.any())]
    assert idle
    assert all("beacon" in name for name in idle)
    with pytest.raises(ValueError, match=r"input_ids: got -200 in row 0, expected visual input"):
        model(ids, visual_features=[None, features[0]], labels=labels)


def test_ratios_for_each_row(model, features):
    ratios = [WindowRatios([2, 8, 4]), WindowRatios([4, 2])]
    with torch.no_grad():
        both = model(
            IDS, visual_features=features, labels=LABELS, attention_mask=MASK, ratio=ratios
        )
        assert both.memory.vst_counts == [[0, 24, 6, 3, 0], [0, 12, 6, 0]]
        for i in range(2):
            keep = MASK[i].bool()
            one = model(
                IDS[i : i + 1, keep],
                visual_features=[features[i]],
                labels=LABELS[i : i + 1, keep],
                ratio=ratios[i],
            )
            rows = keep.nonzero().flatten()
            assert relative(both.logits[i, rows[rows > 3] - 4], one.logits[0]) < 1e-5
    with pytest.raises(ValueError, match="ratio: got 1 WindowRatios, expected 2"):
        model(IDS, visual_features=features, labels=LABELS, attention_mask=MASK, ratio=ratios[:1])


def test_compiled_layers(model, features):
    """All layers share one graph without a break. Loss and gradients are the same."""
    model.train()
    arguments = {"visual_features": features[:1], "labels": LABELS[:1, 1:], "loss_only": True}
    plain = model(IDS[:1, 1:], **arguments)
    plain.loss.backward()
    want = {k: g.clone() for k, g in gradients(model).items()}
    model.zero_grad()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for layer in model.model.layers:
        layer.compile(backend="aot_eager", fullgraph=True)
    compiled = model(IDS[:1, 1:], **arguments)
    compiled.loss.backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch.equal(compiled.loss, plain.loss)
    assert all(torch.equal(g, want[k]) for k, g in gradients(model).items())
    torch._dynamo.reset()
