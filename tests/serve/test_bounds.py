"""Every bound of a sampling parameter: the last value inside is answered, the first one outside is
refused by a status 400 that names the parameter."""

from types import SimpleNamespace

import pytest

pytest.importorskip("fastapi", reason="make serve-check installs it in an environment of its own")

import httpx
from helpers.server import make_place, serving

from vxl_serve.chat import ChatRequest, sampling_of
from vxl_serve.settings import RequestError, ServerSettings

# The last token of the tiny vocabulary ends an answer. So answers of any length end at once.
END_AT_ONCE = {"127": 100}
PENALTY = ([-2, 2], [-2.01, 2.01])
# What is accepted, what is refused.
BOUNDS = {
    "max_tokens": ([1, 4096], [0, 4097, 1.0, True]),
    "max_completion_tokens": ([1, 4096], [0, 4097]),
    "temperature": ([0, 2], [-0.01, 2.01, "1"]),
    "top_p": ([1e-9, 1], [0, 1.01]),
    "n": ([1, 16], [0, 17]),
    "seed": ([-(2**63), 2**63 - 1], [-(2**63) - 1, 2**63, 0.5]),
    "stop": (
        [[], "a" * 200, ["a", "b", "c", "d" * 200]],
        ["", "a" * 201, ["a", ""], list("abcde")],
    ),
    "frequency_penalty": PENALTY,
    "presence_penalty": PENALTY,
    "logit_bias": (
        [{"0": -100, "127": 100}],
        [{"127": 100.01}, {"0": -100.01}, {"128": 0}, {"-1": 0}, {"a": 0}, {"0" * 10: 0}],
    ),
    "top_logprobs": ([0, 20], [-1, 21]),
}
CASES = [
    (name, value, accepted)
    for name, (inside, outside) in BOUNDS.items()
    for values, accepted in ((inside, True), (outside, False))
    for value in values
]


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    with serving(make_place(tmp_path_factory.mktemp("bounds"))) as (url, _):
        yield url


def ask(url, **given):
    messages = [{"role": "user", "content": "Hello"}]
    body = {"model": "tiny", "messages": messages, "logit_bias": END_AT_ONCE, **given}
    return httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)


@pytest.mark.parametrize(("name", "value", "accepted"), CASES)
def test_a_bound(url, name, value, accepted):
    reply = ask(url, **{name: value}, **({"logprobs": True} if name == "top_logprobs" else {}))
    if accepted:
        assert reply.status_code == 200, reply.text
        assert len(reply.json()["choices"]) == (value if name == "n" else 1)
    else:
        assert reply.status_code == 400, reply.text
        error = reply.json()["error"]
        assert (error["param"].split(".")[0], error["message"].split(":")[0]) == (
            name,
            error["param"],
        )


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"top_logprobs": 1, "logprobs": False}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
    ],
)
def test_parameters_that_need_another(url, given, name):
    reply = ask(url, **given)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, name), reply.text


def test_the_number_of_biases(tmp_path):
    """The tiny vocabulary has fewer tokens than a request may bias."""
    model = SimpleNamespace(
        config=SimpleNamespace(vocab_size=2000),
        generation_config=SimpleNamespace(do_sample=False),
        processor=SimpleNamespace(stop_ids=[0]),
    )

    def sampling(count):
        asked = ChatRequest(
            model="tiny",
            messages=[{"role": "user", "content": "Hello"}],
            logit_bias={str(i): 1.0 for i in range(count)},
        )
        return sampling_of(asked, model, ServerSettings(tmp_path / "store"))

    assert len(sampling(1024).logit_bias) == 1024
    with pytest.raises(RequestError, match="logit_bias: got 1025 ids, expected at most 1024"):
        sampling(1025)
