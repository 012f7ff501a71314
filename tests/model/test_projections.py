"""Projections that are more than a weight and a bias are called as modules, wherever they run."""

import accelerate
import pytest
import torch
from helpers.model_goldens import TINY, input_ids, relative, tiny_expected, tiny_model
from torch import nn
from torch.nn.utils import parametrize, prune

from vxl_model import VideoXLForConditionalGeneration, apply_vst_to_qwen2
from vxl_model.decoder.projections import is_plain, linear_map
from vxl_model.decoder.qwen2 import TextConfig, TextForCausalLM

NAMES = [f"{prefix}{name}_proj" for prefix in ("", "beacon_") for name in "qkv"]
IDS = torch.tensor([[5, 6, 7, -200, 9, 10]])
ASK = torch.tensor([9, 10, 11])


@pytest.fixture
def model():
    return tiny_model(ratio=4)


@pytest.fixture
def video(model):
    torch.manual_seed(0)
    return torch.randn(100, model.config.hidden_size) * 0.1


def attentions(model):
    return [layer.self_attn for layer in model.model.layers]


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


class Wrapped(nn.Module):
    """A module that is not an `nn.Linear` and has no weight of its own."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 2 * self.inner(x)


def twice_by_hook(module, arguments, out):
    return 2 * out


def double(attention, name, way):
    """A projection of twice the output, by other means than its weight."""
    module = getattr(attention, name)
    if way == "module":
        setattr(attention, name, Wrapped(module))
    elif way == "hook":
        module.register_forward_hook(twice_by_hook)
    elif way == "pre-hook":
        module.register_forward_pre_hook(lambda _, x: 2 * x[0])
        module.bias.data *= 2
    elif way == "forward":
        own = module.forward
        module.forward = lambda x: 2 * own(x)
    else:
        parametrize.register_parametrization(module, "weight", Doubled())
        module.bias.data *= 2


@pytest.mark.parametrize("order", ["split", "interleaved"])
@pytest.mark.parametrize("way", ["module", "hook", "pre-hook", "forward", "parametrization"])
def test_whatever_a_projection_is_it_counts(model, video, way, order):
    """Twice the output equals twice the weights, in inference, over a memory and its forks, and in
    training."""
    other = tiny_model(ratio=4)
    other.settings.order = model.settings.order = order
    for attention in attentions(other):
        for name in NAMES:
            getattr(attention, name).weight.data *= 2
            getattr(attention, name).bias.data *= 2
    for attention in attentions(model):
        for name in NAMES:
            double(attention, name, way)
    labels = IDS.masked_fill(IDS < 0, -100)
    with torch.no_grad():
        want, got = (m(IDS, visual_features=[video]).logits for m in (other, model))
        assert relative(got, want) < 1e-6
        assert relative(want, tiny_model(ratio=4)(IDS, visual_features=[video]).logits) > 1e-3
        batch = torch.cat([IDS, IDS])
        want, got = (m(batch, visual_features=[video, video[:30]]).logits for m in (other, model))
        assert relative(got, want) < 1e-6
    memories = [m.watch(input_ids=[5], visual_features=video) for m in (other, model)]
    for memory in memories:
        memory.append(visual_features=video[:20])
    said = [memory.fork().ask(ASK, max_new_tokens=5) for memory in memories]
    assert torch.equal(*said)
    losses = []
    for one in (other, model):
        one.train()
        losses.append(one(IDS, visual_features=[video], labels=labels).loss)
        losses[-1].backward()
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-6)
    want = attentions(other)[0].beacon_k_proj.weight.grad
    found = next(p.grad for p in attentions(model)[0].beacon_k_proj.parameters() if p.dim() == 2)
    assert relative(found / 2, want) < 1e-5


AFTER = ("self_attn.o_proj", "mlp", "mlp.down_proj")
WAYS = [(name, way) for name in AFTER for way in ("module", "hook", "forward")]


# Dynamo does not compile a torch.nn.Linear.
@pytest.mark.parametrize(("name", "way"), [*WAYS, ("mlp", "compiled")])
def test_whatever_follows_attention_counts(model, video, name, way):
    """In the pass over a window and over text, the output of one module is doubled by other means
    than its weight."""
    other = tiny_model(ratio=4)
    compiled = []

    def doubled(graph, inputs):
        compiled.append(graph)
        return lambda *args: [2 * x for x in graph(*args)]

    for one in (other, model):
        for layer in one.model.layers[:1]:
            holder, _, last = name.rpartition(".")
            holder = layer.get_submodule(holder)
            if one is other:
                layer.get_submodule({"mlp": "mlp.down_proj"}.get(name, name)).weight.data *= 2
            elif way == "compiled":
                getattr(holder, last).compile(backend=doubled)
            elif way == "module" and last == "mlp":
                setattr(layer, last, Wrapped(layer.mlp))
            else:
                double(holder, last, way)
    with torch.no_grad():
        want, got = (m(IDS, visual_features=[video]).logits for m in (other, model))
    assert relative(got, want) < 1e-6
    assert bool(compiled) == (way == "compiled")


def test_checkpointing_calls_a_module_again(model, video):
    """The backward pass of a layer whose projection is a module gives the same gradients."""
    for attention in attentions(model):
        double(attention, "q_proj", "module")
    model.train()
    labels = IDS.masked_fill(IDS < 0, -100)
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model(IDS, visual_features=[video], labels=labels).loss.backward()
        gradients.append(attentions(model)[0].q_proj.inner.weight.grad.clone())
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert torch.equal(*gradients)
    assert gradients[0].any()


def test_text_alone_trains_modules_too(model):
    """A parameter of a VST projection has a gradient, 0, whatever the projection is."""
    for attention in attentions(model):
        double(attention, "beacon_q_proj", "module")
    model.train()
    ids = torch.tensor([[5, 6, 7]])
    model(ids, labels=ids).loss.backward()
    for attention in attentions(model):
        assert not attention.beacon_q_proj.inner.weight.grad.any()
        assert not attention.beacon_k_proj.bias.grad.any()
    assert not model.model.beacon_embed_tokens.weight.grad.any()


def test_a_pruned_projection_is_not_stale(model, video):
    q = attentions(model)[0].q_proj
    prune.l1_unstructured(q, "weight", 0.5)
    with torch.no_grad():
        q.weight_orig.mul_(3)
        pruned = model(IDS, visual_features=[video]).logits
        prune.remove(q, "weight")
        assert is_plain(q)
        assert relative(model(IDS, visual_features=[video]).logits, pruned) < 1e-6


def test_a_hook_of_all_modules_sees_the_projections(model, video):
    seen = set()
    handle = nn.modules.module.register_module_forward_hook(lambda m, _, out: seen.add(id(m)))
    try:
        model(IDS, visual_features=[video])
    finally:
        handle.remove()
    wanted = {id(getattr(a, name)) for a in attentions(model) for name in NAMES}
    wanted.discard(id(attentions(model)[-1].beacon_q_proj))  # nobody reads the last layer's VSTs
    assert wanted <= seen


def test_a_backward_hook_fires(model, video):
    seen = []
    hook = lambda module, inputs, outputs: seen.append(outputs[0].abs().max())  # noqa: E731
    attentions(model)[0].beacon_v_proj.register_full_backward_hook(hook)
    model.train()
    labels = IDS.masked_fill(IDS < 0, -100)
    model(IDS, visual_features=[video], labels=labels).loss.backward()
    assert len(seen) == 1
    assert seen[0] > 0


def test_the_module_of_the_vst_embedding_is_called(model, video):
    twice = tiny_model(ratio=4)
    twice.model.beacon_embed_tokens.weight.data *= 2
    model.model.beacon_embed_tokens.register_forward_hook(twice_by_hook)
    for training in (False, True):
        want, got = (m.train(training)(IDS, visual_features=[video]).logits for m in (twice, model))
        assert torch.equal(got, want)


def test_plain_modules_are_not_called(model, video, monkeypatch):
    """They give their weights to `vst_linear`, which takes both products at once."""
    projections = {id(getattr(a, name)) for a in attentions(model) for name in NAMES}
    called, real = set(), nn.Linear.forward

    def forward(module, x):
        called.add(id(module))
        return real(module, x)

    monkeypatch.setattr(nn.Linear, "forward", forward)
    model(IDS, visual_features=[video])
    assert called
    assert not projections & called


def test_linear_map_is_exact():
    module = nn.Linear(7, 5)
    weight, bias = linear_map(Wrapped(module), 7, torch.zeros(1))
    torch.testing.assert_close(weight, 2 * module.weight, rtol=1e-6, atol=1e-6)
    assert torch.equal(bias, 2 * module.bias)


# -- other homes of weights ---------------------------------------------------------------------


def dynamic(model):
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*quantiz.*:UserWarning")
def test_dynamic_int8(video, tmp_path):
    """Modules whose `weight` is a method: no more is lost than a Qwen2 loses."""
    torch.manual_seed(0)
    config = {**tiny_model().config.to_dict(), "num_hidden_layers": 2}
    plain = TextForCausalLM(TextConfig(**{k: v for k, v in config.items() if k != "model_type"}))
    ids = torch.randint(3, 100, (1, 60))
    with torch.no_grad():
        want = plain.eval()(ids).logits
        lost = relative(dynamic(plain)(ids).logits, want)
        want = tiny_model(ratio=4)(IDS, visual_features=[video]).logits
        quantised = dynamic(tiny_model(ratio=4))
        got = quantised(IDS, visual_features=[video]).logits
    assert 0 < relative(got, want) < 1.5 * lost
    memory = quantised.watch(input_ids=[5], visual_features=video)
    memory.save(tmp_path / "memory")
    said = quantised.load_memory(tmp_path / "memory").ask(ASK, max_new_tokens=4)
    assert torch.equal(said, memory.ask(ASK, max_new_tokens=4))


def offloaded(way, folder):
    if way == "device_map":
        return VideoXLForConditionalGeneration.from_pretrained(
            TINY,
            ratio=4,
            device_map="auto",
            max_memory={"cpu": "150KB"},
            offload_folder=folder / "weights",
        )
    if way == "cpu":
        return accelerate.cpu_offload(tiny_model(ratio=4), execution_device=torch.device("cpu"))
    return accelerate.disk_offload(tiny_model(ratio=4), folder / "weights")


@pytest.mark.parametrize("way", ["device_map", "cpu", "disk"])
def test_offloaded_weights(way, tmp_path):
    """Layers whose weights come for the call alone: the same bits, and the same memory files."""
    expected, model = tiny_expected(), tiny_model(ratio=4)
    moved = offloaded(way, tmp_path)
    assert any(p.device.type == "meta" for p in moved.model.layers.parameters())
    assert moved.device == torch.device("cpu")
    ids, pixels = input_ids(expected), expected["pixel_values"]
    with torch.no_grad():
        want, got = (m(ids, pixel_values=pixels).logits for m in (model, moved))
    assert torch.equal(got, want)
    files = [tmp_path / name for name in ("model", "moved")]
    for one, file in zip((model, moved), files, strict=True):
        one.watch(input_ids=[5, 6], pixel_values=pixels).save(file)
    assert files[0].read_bytes() == files[1].read_bytes()
    said = [m.load_memory(files[0]).ask(ASK, max_new_tokens=4) for m in (model, moved)]
    assert torch.equal(*said)


def test_several_devices_are_refused_before_anything_runs(model, video):
    model.hf_device_map = {"model.embed_tokens": 0, "model.layers": 1, "lm_head": "cpu"}
    called = []
    model.model.register_forward_pre_hook(lambda *_: called.append(1))
    calls = (
        lambda: model(IDS, visual_features=[video]),
        lambda: model(IDS, visual_features=[video], labels=IDS.clamp(min=-100)),
        lambda: model.generate(IDS, visual_features=[video], max_new_tokens=2),
        lambda: model.watch(input_ids=[5], visual_features=video),
    )
    for call in calls:
        with pytest.raises(
            ValueError, match=r"device_map: got parts on \['0', '1'\], expected one"
        ):
            call()
    assert not called


# -- a plain Qwen2 ------------------------------------------------------------------------------


def qwen2():
    torch.manual_seed(0)
    config = TextConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=2,
    )
    return TextForCausalLM(config).eval()


def test_apply_keeps_what_a_projection_is():
    """Hooks and parametrizations stay, and VSTs start as copies of what is computed."""
    plain = qwen2()
    for layer in plain.model.layers:
        double(layer.self_attn, "k_proj", "parametrization")
        double(layer.self_attn, "v_proj", "hook")
    watching = apply_vst_to_qwen2(plain, beacon_window=16, beacon_ratio=4)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        assert relative(watching(ids).logits, plain(ids).logits) < 1e-5
    x = torch.randn(3, 64)
    for layer in watching.model.layers:
        for name in "qkv":
            own, vst = (getattr(layer.self_attn, f"{p}{name}_proj") for p in ("", "beacon_"))
            assert is_plain(vst)
            torch.testing.assert_close(vst(x), own(x))


def test_apply_refuses_offloaded_weights():
    moved = accelerate.cpu_offload(qwen2(), execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="model: got weights that are offloaded, expected all"):
        apply_vst_to_qwen2(moved)
