"""Continuous batching: questions about any memories of one model are decoded together.

One thread owns the model. Questions join and leave at every step. Long work (watching) lets them
have their steps in between. A question that was let in has room to its last token, so nothing is
ever taken back. A question that does not fit waits, and clients take turns.
"""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch

from vxl_kernels import PoolExhausted
from vxl_model.streaming.batch import StreamBatch
from vxl_model.streaming.ratios import RatioPlan
from vxl_model.streaming.state import VideoState

from .questions import Answer, Event, FullError, Question, TooLargeError, Turns
from .sampling import AnswerText, Sampler

__all__ = ["Engine"]

log = logging.getLogger(__name__)

# Rows of questions that one step reads at most, so that answers under way do not wait long for
# their next token. A longer question is read in one step all the same.
QUESTION_ROWS = 512


@dataclass
class _Run:
    """One answer that is being decoded. `unread`: the ids that its next step reads. `index`: which
    answer of its question it is; None until the question is read."""

    answer: Answer
    state: VideoState
    unread: list[int]
    sampler: Sampler
    text: AnswerText
    index: int | None = None
    tokens: int = 0
    ended: bool = False


class Engine:
    """Answers questions with one model.

    Args:
        model: a `VideoXLForConditionalGeneration` in evaluation mode. Its memories share one cache
            from now on (`share_cache`).
        cache_tokens: cached tokens that there is room for, of memories and questions together.
        most_running: answers that are decoded together.
        most_waiting: questions that wait; `ask` raises `FullError` beyond.
        make_room: frees pages of the cache, in the engine's thread. It returns False if there is
            nothing to free.

    Attributes:
        promised: pages that long work is going to take.
        tokens, answers, errors, steps: how many there were. first_token: called with the seconds
            from a question to its first token.
    """

    def __init__(
        self,
        model: Any,
        cache_tokens: int,
        *,
        most_running: int = 64,
        most_waiting: int = 256,
        make_room: Callable[[], bool] = lambda: False,
    ) -> None:
        self.model, self.cache = model, model.share_cache(cache_tokens)
        self.most_running, self.most_waiting, self.make_room = most_running, most_waiting, make_room
        self.tokens = self.answers = self.errors = self.steps = 0
        self.promised = 0
        self.first_token: Callable[[float], None] = lambda seconds: None
        self._wake = threading.Condition()
        self._waiting, self._running = Turns(), list[_Run]()
        self._short: deque[tuple[Callable[[], Any], Future]] = deque()
        self._long: deque[tuple[Callable[[], Any], Future]] = deque()
        self._closing = self._busy = False
        self._thread = threading.Thread(target=self._work, name="vxl-engine", daemon=True)
        self._thread.start()

    # -- from other threads --------------------------------------------------------------

    def ask(self, question: Question) -> Answer:
        """Puts a question into the queue. Called in an event loop.

        Raises:
            FullError: too many wait.
            TooLargeError: it would not even fit alone.
        """
        most = self.cache.pages.num_pages * self.cache.pages.page_size
        needed = len(question.ids) + question.sampling.n * question.sampling.max_tokens
        if needed > most:
            raise TooLargeError(f"max_tokens: got {needed} tokens of text, expected at most {most}")
        answer = Answer(question, self._leave)
        with self._wake:
            if self._closing:
                raise FullError("the engine is closing")
            if len(self._waiting) >= self.most_waiting:
                raise FullError(f"{len(self._waiting)} questions wait already")
            self._waiting.add(answer)
            self._wake.notify()
        return answer

    def _leave(self, answer: Answer) -> None:
        with self._wake:
            self._waiting.remove(answer)

    def call(self, work: Callable[[], Any], long: bool = False) -> Future:
        """Runs a function in the engine's thread. `long` ones run one after another and call
        `share` now and then; others come before the next step."""
        future: Future = Future()
        with self._wake:
            if self._closing:
                raise FullError("the engine is closing")
            (self._long if long else self._short).append((work, future))
            self._wake.notify()
        return future

    def close(self) -> None:
        """Ends the thread. Questions that are not answered yet get an error."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    @property
    def waiting(self) -> int:
        with self._wake:
            return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    # -- in the engine's thread ----------------------------------------------------------

    def share(self, seconds: float) -> None:
        """Steps for questions between two pieces of long work: about as much time as the last
        piece took, at least one step."""
        end = time.perf_counter() + seconds
        while self._turn() and time.perf_counter() < end and not self._closing:
            pass

    def fits(self, pages: int) -> bool:
        """Whether this many pages are free, after freeing what can be freed."""
        while self.cache.pages.free_pages < pages:
            if not self.make_room():
                return False
        return True

    def pages(self, tokens: int) -> int:
        """Pages of a new sequence, and one more for a copy of its last one."""
        return self._pages(0, tokens) + 1

    def _work(self) -> None:
        with torch.inference_mode(False), torch.no_grad():
            while not self._closing:
                if self._turn():
                    continue
                with self._wake:
                    job = self._long.popleft() if self._long else None
                    if job is None:
                        # What waits for room is looked at again now and then.
                        busy = self._short or self._closing
                        self._wake.wait_for(
                            lambda: self._short or self._long or self._closing or self._fresh(),
                            timeout=0.05 if len(self._waiting) or busy else None,
                        )
                        continue
                self._busy = True
                _finish(*job)
                self._busy = False
            self._end()

    def _fresh(self) -> bool:
        return not self._running and len(self._waiting) > 0

    def _end(self) -> None:
        gone = FullError("the engine is closing")
        for run in self._running:
            run.answer.put(gone)
        with self._wake:
            while (answer := self._waiting.first()) is not None:
                answer.put(gone)
                self._waiting.remove(answer)
        for _, future in (*self._short, *self._long):
            if future.set_running_or_notify_cancel():
                future.set_exception(gone)
        self._running.clear()
        self._short.clear()
        self._long.clear()

    def _turn(self) -> bool:
        """Short work, new questions, one step. False if there was nothing to do."""
        done = False
        while self._short:
            _finish(*self._short.popleft())
            done = True
        self._running = [run for run in self._running if not run.answer.cancelled]
        self._running += self._admit()
        if self._running:
            self._step()
            done = True
        return done

    def _admit(self) -> list[_Run]:
        """Lets questions in while there is room, up to `QUESTION_ROWS` of text."""
        new: list[_Run] = []
        rows = 0  # of text
        forks = 0  # pages that further answers of the new questions are going to take
        while True:
            with self._wake:
                answer = self._waiting.first()
            if answer is None or len(self._running) + len(new) >= self.most_running:
                return new
            rows += len(answer.question.ids)
            if new and rows > QUESTION_ROWS:
                return new
            try:
                run, more = self._begin(answer, forks)
                new.append(run)
                forks += more
            except PoolExhausted:
                if new or self._running or self._busy or self.make_room():
                    return new  # it waits for pages
                self.errors += 1
                answer.put(TooLargeError("the cache has no room for this video and question"))
            except Exception as error:
                log.error("a question failed\n%s", traceback.format_exc())  # no frame is kept
                self.errors += 1
                answer.put(error)
            with self._wake:
                self._waiting.remove(answer, served=True)

    def _begin(self, answer: Answer, promised: int) -> tuple[_Run, int]:
        """Makes room for a question. All or nothing: its pages go back if it raises.

        Args:
            promised: pages that other questions of this step are going to take.

        Returns:
            What reads the question, and the pages that its further answers are going to take.
        """
        question, sampling = answer.question, answer.question.sampling
        if question.memory is None:
            state = VideoState(self.cache.new(), RatioPlan(1))
        else:
            state = question.memory().forks(1).states[0]
        before = state.sequence.length
        after = before + len(question.ids)
        room = self._pages(before, after + sampling.max_tokens)
        forks = (sampling.n - 1) * self._pages(after, after + sampling.max_tokens)
        if not self.fits(room + forks + promised + self.promised):
            raise PoolExhausted("the cache is full")
        self._reserve(state, len(question.ids) + sampling.max_tokens)
        text = AnswerText(self._decode, sampling.stop)
        return _Run(answer, state, list(question.ids), Sampler(sampling, 0), text), forks

    def _split(self, run: _Run) -> list[_Run]:
        """The answers of a question that has just been read."""
        self.first_token(time.perf_counter() - run.answer.begun)
        sampling = run.answer.question.sampling
        run.index = 0
        runs = [run]
        for index in range(1, sampling.n):
            text = AnswerText(self._decode, sampling.stop)
            state = run.state.fork()
            runs.append(_Run(run.answer, state, [], Sampler(sampling, index), text, index))
        for each in runs if sampling.n > 1 else ():  # each its own copy of the last page
            self._reserve(each.state, sampling.max_tokens)
        return runs

    def _pages(self, shared: int, length: int) -> int:
        """Pages that a sequence of this length takes beside those that it shares in full."""
        size = self.cache.pages.page_size
        return -(-length // size) - shared // size

    def _reserve(self, state: VideoState, rows: int) -> None:
        cache, sequence = state.sequence.place
        cache.reserve(sequence, rows)

    def _decode(self, ids: Sequence[int]) -> str:
        return self.model.processor.tokenizer.decode(ids, skip_special_tokens=True)

    def _advance(self, run: _Run, logits: torch.Tensor) -> None:
        """Takes the next token."""
        assert run.index is not None
        sampling = run.answer.question.sampling
        chosen = run.sampler.choose(logits)
        run.unread = [chosen.token]
        run.tokens += 1
        self.tokens += 1
        text, finish = "", None
        if chosen.token in sampling.stop_ids:
            finish = "stop"
        else:
            text = run.text.add(chosen.token)
            if run.text.stopped:
                finish = "stop"
            elif run.tokens >= sampling.max_tokens:
                finish = "length"
        if finish:
            text += run.text.finish()
            self.answers += 1
            run.ended = True
        run.answer.put(Event(run.index, chosen, text, finish))

    def _step(self) -> None:
        """One token more of every answer, and the first one of every new question."""
        self.steps += 1
        runs = self._running
        try:
            self._running = self._read(runs)
        except Exception as error:
            log.error("a step of %d answers failed\n%s", len(runs), traceback.format_exc())
            # Nothing was committed, so each may try alone, and only the one at fault fails.
            self._running = []
            if len(runs) == 1:
                self._fail(runs[0], error)
                return
            for run in runs:
                try:
                    self._running += self._read([run])
                except Exception as own:
                    self._fail(run, own)

    def _fail(self, run: _Run, error: Exception) -> None:
        run.answer.put(error)
        run.answer.cancel()
        self.errors += 1

    def _read(self, runs: Sequence[_Run]) -> list[_Run]:
        """Reads what is unread. Returns the answers that go on."""
        device, batch = self.model.device, StreamBatch(run.state for run in runs)
        if all(len(run.unread) == 1 for run in runs):
            ids = torch.tensor([run.unread for run in runs], device=device)
            logits = self.model.decode_step(ids, batch).logits[:, -1]
        else:
            texts = [torch.tensor(run.unread, device=device) for run in runs]
            logits = self.model.text_step(texts, batch)
        going: list[_Run] = []
        for run, row in zip(runs, logits, strict=True):
            try:
                answers = [run] if run.index is not None else self._split(run)
                for each in answers:
                    self._advance(each, row)
                going += [each for each in answers if not each.ended]
            except Exception as error:  # its tokens are in the cache already, so no second try
                self._fail(run, error)
        return going


def _finish(work: Callable[[], Any], future: Future) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(work())
    except BaseException as error:
        future.set_exception(error)
