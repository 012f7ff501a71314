"""How an answer's tokens are chosen, and the text that they make so far."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

__all__ = ["AnswerText", "Chosen", "Sampler", "Sampling"]

_MOST_BYTES = 4  # of a character in UTF-8
_LEAST_TEMPERATURE = 1e-5


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters under OpenAI's names.

    Attributes:
        max_tokens: the longest answer.
        temperature: 0 is greedy, and so is what float32 scores cannot be divided by (below 1e-5).
        n: answers to one question. They share its tokens.
        seed: of the draws. The same request with a seed gets the same answer.
        stop: texts that end an answer. They are not part of it.
        logit_bias: added to the logits of ids.
        top_logprobs: how many alternatives of each token to tell; None for no log probabilities.
        stop_ids: ids that end an answer.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    n: int = 1
    seed: int | None = None
    stop: tuple[str, ...] = ()
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    top_logprobs: int | None = None
    stop_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Chosen:
    """A token. `logprob` and `top` (pairs of id and log probability) only where asked for."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Chooses the tokens of one answer. They do not depend on what else is decoded.

    Args:
        sampling: how.
        index: of the answer among the `n` of its question. Each draws from a seed of its own.
    """

    def __init__(self, sampling: Sampling, index: int = 0) -> None:
        self._sampling = sampling
        self._counts: dict[int, int] = {}
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed((sampling.seed + index * 0x9E3779B97F4A7C15) % 2**63)
        self._warpers = LogitsProcessorList()
        if sampling.temperature >= _LEAST_TEMPERATURE:
            self._warpers.append(TemperatureLogitsWarper(float(sampling.temperature)))
            if sampling.top_p < 1:
                self._warpers.append(TopPLogitsWarper(float(sampling.top_p)))

    def choose(self, logits: Tensor) -> Chosen:
        """The next token by logits `(vocabulary,)`."""
        sampling, scores = self._sampling, logits.detach().float().cpu().clone()
        for token, bias in sampling.logit_bias.items():
            scores[token] += bias
        if sampling.frequency_penalty or sampling.presence_penalty:
            for token, count in self._counts.items():
                scores[token] -= count * sampling.frequency_penalty + sampling.presence_penalty
        if sampling.temperature >= _LEAST_TEMPERATURE:
            warped = self._warpers(torch.empty(1, 0, dtype=torch.long), scores[None])
            draws = torch.multinomial(warped.softmax(-1), 1, generator=self._generator)
            token = int(draws)
        else:
            token = int(scores.argmax())
        self._counts[token] = self._counts.get(token, 0) + 1
        if sampling.top_logprobs is None:
            return Chosen(token)
        logprobs = scores.log_softmax(-1)
        best = logprobs.topk(sampling.top_logprobs)
        top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        return Chosen(token, float(logprobs[token]), top)


class AnswerText:
    """Text of ids as they come: whole characters, and nothing that may turn out to begin a stop
    text.

    Args:
        decode: ids to text.
        stop: texts that end the answer.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode, self._stop = decode, stop
        self._ids: list[int] = []
        self._start = self._read = 0  # of the ids that give the next text its context, of the next
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that is certain now and was not before. Sets `stopped` at a stop text."""
        self._ids.append(token)
        return self._release(self._new_text(last=False))

    def finish(self) -> str:
        """The rest, once no token follows."""
        if self.stopped:
            return ""
        text = self._release(self._new_text(last=True)) + self._held
        self._held = ""
        return text

    def _new_text(self, last: bool) -> str:
        whole = self._decode(self._ids[self._start :])
        # A character may be cut between tokens. What is still broken after this many is not one.
        waits = len(self._ids) - self._read < _MOST_BYTES
        if whole.endswith("\ufffd") and waits and not last:
            return ""
        before = len(self._decode(self._ids[self._start : self._read]))
        self._start, self._read = self._read, len(self._ids)
        return whole[before:]

    def _release(self, new: str) -> str:
        text, self._held = self._held + new, ""
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped = True
            return text[: min(found)]
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        if held:
            text, self._held = text[:-held], text[-held:]
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins."""
    return next(
        (n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0
    )
