"""Video-XL as a model of lmms-eval: `lmms-eval --model vxl --model_args pretrained=...`.

The questions about one video are answered one after another, whatever their order in the task, so
that each video is watched once. With several processes the videos are dealt out among them, since
lmms-eval itself deals out questions.
"""

from __future__ import annotations

import atexit
import gc
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from tqdm import tqdm
from transformers import GenerationConfig

from vxl_cli.common import clock
from vxl_model import VideoMemory, VideoXLForConditionalGeneration
from vxl_model.inputs.prompts import PROMPT

from .answers import Answers, model_identity, request_key
from .arguments import fail
from .watching import Sampling, Watcher, visual_identity

__all__ = ["VideoXL"]

_DTYPES = ("float32", "bfloat16", "float16")
_SAMPLED = ("temperature", "top_p", "top_k")
_UNUSED = ("image_aspect_ratio", "modalities")  # of other models


@dataclass
class _Request:
    """One request.

    Attributes:
        kind: the method of the model that answers it.
        place: task, split and index of its document.
        about: what JSON takes of the request, without its place.
        visuals: what tells its visual input from others.
        show: makes the visual input. None: it is the files of `paths`, and any process can
            answer the request.
    """

    kind: str
    place: tuple[str, str, int]
    about: dict[str, Any]
    visuals: str
    paths: tuple[str, ...] = ()
    show: Callable[[], Any] | None = None
    rounds: Callable[..., Any] | None = None

    def shown(self) -> list[Any]:
        return list(self.paths) if self.show is None else _listed(self.show())


class Likelihood(GenerationResult):
    """A pair of a logarithm and whether the words are the model's own. lmms-eval 0.7.3 makes a
    string of every other result that is not text."""

    def __iter__(self) -> Iterator[float | bool]:
        return iter(self.text)

    def __getitem__(self, index: int) -> float | bool:
        return self.text[index]


class VideoXL(lmms):
    """The model that lmms-eval makes of `--model_args`.

    Args:
        pretrained: checkpoint, a folder or a name on the Hub.
        device, dtype: by default the process's GPU and bfloat16; on a CPU float32.
        frames, fps: as `watch` takes them. `max_frames_num` is another name of `frames`.
        ratio: visual tokens per cached token; "2:4:8" to draw from.
        repeat_frames: short videos are shown `frames` times, as in the published evaluation.
        answer_prefix: what each answer begins with; the model goes on from there.
        answers: a folder for the answers. What is there is not asked again.
        on_error: "stop", or "skip" for an empty answer where a video cannot be read.
        batch_size: 1. A question is answered by itself.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        dtype: str | None = None,
        batch_size: int | str = 1,
        frames: int | None = None,
        max_frames_num: int | None = None,
        fps: float | None = None,
        ratio: int | str | None = None,
        repeat_frames: bool | str = False,
        answer_prefix: str = "",
        answers: str | None = None,
        on_error: str = "stop",
        max_batch_size: int | None = None,
    ) -> None:
        from accelerate import Accelerator

        super().__init__()
        if str(batch_size) != "1":
            fail("batch_size", batch_size, "1")
        if frames is not None and max_frames_num is not None:
            fail("max_frames_num", "frames too", "one of the two")
        if dtype is not None and dtype not in _DTYPES:
            fail("dtype", repr(dtype), ", ".join(_DTYPES))
        if on_error not in ("stop", "skip"):
            fail("on_error", repr(on_error), "stop or skip")
        if str(repeat_frames) not in ("True", "False"):
            fail("repeat_frames", repr(repeat_frames), "True or False")
        self.sampling = Sampling(
            max_frames_num if frames is None else frames,
            fps,
            _parse_ratio(ratio),
            str(repeat_frames) == "True",
        )
        self.answer_prefix, self.on_error = str(answer_prefix), on_error
        self.accelerator = Accelerator()
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if started != self.accelerator.num_processes:
            # accelerate joins no group of processes on a CPU unless it is told to use that.
            expected = "a GPU for each, or on a CPU ACCELERATE_USE_CPU=true in the environment"
            fail("WORLD_SIZE", f"{started} processes that do not know each other", expected)
        self._rank = self.accelerator.process_index
        self._world_size = self.accelerator.num_processes
        if started > 1:
            atexit.register(_leave_group)
        self._device = _device(device, self.accelerator)
        dtype = dtype or ("float32" if self._device.type == "cpu" else "bfloat16")
        model = VideoXLForConditionalGeneration.from_pretrained(
            pretrained, dtype=getattr(torch, dtype)
        )
        self._model = model.to(self._device).eval()
        self._watcher = Watcher(self._model, self.sampling)
        self.settings = {
            "model": model_identity(pretrained),
            "dtype": dtype,
            "sampling": vars(self.sampling),
            "answer_prefix": self.answer_prefix,
        }
        self.answers = Answers(answers, self._rank)

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def batch_size(self) -> int:
        return 1

    @property
    def model(self) -> VideoXLForConditionalGeneration:
        return self._model

    @property
    def watched(self) -> int:
        """How many visual inputs this process has watched."""
        return self._watcher.watched

    def clean(self) -> None:
        """Frees the model, as lmms-eval asks for before it scores."""
        del self._watcher
        super().clean()

    # -- the three kinds of requests ---------------------------------------------------------

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """An answer to each question, cut at the first of the task's `until`."""
        made = []
        for request in requests:
            context, options, to_visual, doc_id, task, split = request.args
            about = {"context": context, "options": dict(options)}
            made.append(self._made("generate_until", about, to_visual, task, split, doc_id))
        return self._run(made)

    def loglikelihood(self, requests: list[Instance]) -> list[Likelihood]:
        """Logarithm of the probability of each continuation after its context, and whether the
        model would have said it."""
        made = []
        for request in requests:
            if len(request.args) == 2:  # without document: text alone
                context, target = request.args
                about = {"context": context, "target": target}
                made.append(_Request("loglikelihood", ("", "", -1), about, "[]"))
                continue
            context, target, to_visual, doc_id, task, split = request.args
            if callable(target):
                target = target(self.task_dict[task][split][doc_id])
            about = {"context": context, "target": str(target)}
            made.append(self._made("loglikelihood", about, to_visual, task, split, doc_id))
        return [Likelihood((float(score), bool(greedy))) for score, greedy in self._run(made)]

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """The answers of all rounds. From the second on, the task's own function tells a round's
        visual input and question, and when to stop."""
        made = []
        for request in requests:
            context, options, to_visual, to_text, doc_id, task, split = request.args
            about = {"context": context, "options": dict(options)}
            kind = "generate_until_multi_round"
            one = self._made(kind, about, to_visual, task, split, doc_id)
            # Only this process has the function of the task.
            one.show, one.rounds = one.show or partial(list, one.paths), to_text
            made.append(one)
        return self._run(made)

    # -- requests, dealt out and sorted by video ---------------------------------------------

    def _made(
        self, kind: str, about: dict[str, Any], to_visual: Any, task: str, split: str, doc_id: int
    ) -> _Request:
        def show() -> Any:
            return to_visual(self.task_dict[task][split][doc_id])

        shown = _listed(show())
        identity = visual_identity(shown)
        place = (task, split, doc_id)
        if identity is None:  # pictures in memory have no name but that of their document
            return _Request(kind, place, about, repr(place), show=show)
        paths = tuple(os.fspath(visual) for visual in shown)
        return _Request(kind, place, about, repr(identity), paths)

    def _run(self, requests: Sequence[_Request]) -> list[Any]:
        """Results in the order of the requests. With several processes, each answers all
        questions about its videos, also those that lmms-eval gave to another process."""
        if self._world_size == 1:
            results = self._answered(requests)
        else:
            from accelerate.utils import gather_object

            own = [request for request in requests if request.show is not None]
            free: list[_Request] = gather_object([x for x in requests if x.show is None])
            unique = {self._key(request): request for request in free}
            mine = deal(list(unique.values()), self._world_size)[self._rank]
            answered = self._answered([*own, *mine])
            results = dict(gather_object(list(answered.items())))
        return [results[self._key(request)] for request in requests]

    def _key(self, request: _Request) -> str:
        named = {"kind": request.kind, "place": request.place, "visuals": request.visuals}
        return request_key(self.settings, {**named, **request.about})

    def _answered(self, requests: Iterable[_Request]) -> dict[str, Any]:
        """Results by key. What the folder of answers holds is taken from there."""
        todo: dict[str, _Request] = {}
        results: dict[str, Any] = {}
        for request in requests:
            key = self._key(request)
            known = self.answers.get(key)
            if known is not None:
                results[key] = known["answer"]
            else:
                todo.setdefault(key, request)
        ordered = sorted(todo.items(), key=lambda item: item[1].visuals)  # stable
        for key, request in tqdm(ordered, disable=self._rank != 0, desc="vxl"):
            watched, begin = self._watcher.watched, clock(self._device)
            try:
                memory = self._watcher.memory(request.visuals, request.shown)
                ready = clock(self._device)
                result = self._answer(request, memory)
            except (ValueError, OSError) as error:
                if self.on_error == "stop":
                    raise
                warnings.warn(f"{request.place}: {error}", stacklevel=2)
                results[key] = _nothing(request.kind)  # not kept: another run tries again
                continue
            task, split, doc_id = request.place
            record = {"kind": request.kind, "task": task, "split": split, "doc_id": doc_id}
            record |= {"answer": result, "watched": self._watcher.watched - watched}
            record["watch_seconds"] = round(ready - begin, 4)
            record["answer_seconds"] = round(clock(self._device) - ready, 4)
            self.answers.add(key, record)
            results[key] = result
        return results

    # -- one request -------------------------------------------------------------------------

    def _answer(self, request: _Request, memory: VideoMemory) -> Any:
        about = request.about
        if request.kind == "generate_until":
            return self._generate(memory, about["context"], about["options"])
        if request.kind == "loglikelihood":
            return list(self._score(memory, about["context"], about["target"]))
        return self._converse(request, memory)

    def _generate(self, memory: VideoMemory, context: str, options: dict[str, Any]) -> str:
        options = generation_options(options)
        until = options.pop("until")
        text = memory.ask(context, answer_prefix=self.answer_prefix, **options)
        return cut(text, until)

    @torch.no_grad()
    def _score(self, memory: VideoMemory, context: str, target: str) -> tuple[float, bool]:
        processor = self._model.processor
        if context.strip():
            asked = processor.suffix_ids(context, self.answer_prefix)
        else:  # a continuation without a question, for the mutual information of the two
            asked = processor.text_ids(PROMPT[1].replace("{question}", ""))
        said = processor.text_ids(target)
        ids, count = torch.cat((asked, said), dim=1), said.shape[1]
        logits = self._model(
            input_ids=ids.to(self._device), memory=memory, logits_to_keep=count + 1
        ).logits[0, :-1]
        said = said[0].to(logits.device)
        chances = logits.float().log_softmax(-1)
        score = chances.gather(1, said[:, None]).sum().item()
        return score, bool((chances.argmax(-1) == said).all())

    def _converse(self, request: _Request, memory: VideoMemory) -> list[str]:
        task, split, doc_id = request.place
        document = self.task_dict[task][split][doc_id]
        answers = [self._generate(memory, request.about["context"], request.about["options"])]
        info = None
        while True:
            assert request.rounds is not None
            visuals, context, done, answers, info = request.rounds(
                document,
                previous_output=list(answers),
                round_idx=len(answers),
                previous_round_info=info,
            )
            if done:
                return list(answers)
            shown = _listed(visuals)
            identity = visual_identity(shown)
            key = repr([*request.place, len(answers)] if identity is None else identity)
            memory = self._watcher.memory(key, shown.copy)
            answers = [*answers, self._generate(memory, context, request.about["options"])]


def _listed(visuals: Any) -> list[Any]:
    return [] if visuals is None else list(visuals)


def deal(requests: Sequence[_Request], processes: int) -> list[list[_Request]]:
    """Requests by process. Those about one video stay together. The video with the most
    questions comes first, and goes to the process that has the fewest."""
    by_video: dict[str, list[_Request]] = {}
    for request in requests:
        by_video.setdefault(request.visuals, []).append(request)
    dealt: list[list[_Request]] = [[] for _ in range(processes)]
    for group in sorted(by_video.values(), key=lambda group: (-len(group), group[0].visuals)):
        min(dealt, key=len).extend(group)
    return dealt


def generation_options(options: dict[str, Any]) -> dict[str, Any]:
    """Options of a task as `ask` takes them, and `until`, a list of strings.

    Greedy decoding drops the settings of sampling. A temperature without `do_sample` means
    sampling.
    """
    options = {name: value for name, value in options.items() if name not in _UNUSED}
    until = options.pop("until", None) or []
    given = {"max_new_tokens": options.pop("max_new_tokens", None) or 256}
    sample = options.pop("do_sample", None)
    if sample is None:
        sample = bool(options.get("temperature"))
    if not sample:
        for name in _SAMPLED:
            options.pop(name, None)
    known = GenerationConfig()
    unknown = sorted(name for name in options if not hasattr(known, name))
    if unknown:
        fail("generation_kwargs", ", ".join(unknown), "options of transformers' generate")
    until = [until] if isinstance(until, str) else list(until)
    return {**given, **options, "do_sample": bool(sample), "until": until}


def cut(text: str, until: Sequence[str]) -> str:
    """The text before the first of some strings."""
    for stop in until:
        if stop:
            text = text.split(stop)[0]
    return text


def _nothing(kind: str) -> Any:
    return {"generate_until": "", "loglikelihood": [float("-inf"), False]}.get(kind, [""])


def _parse_ratio(ratio: int | str | None) -> int | list[int] | None:
    if ratio is None:
        return None
    try:
        values = [int(part) for part in str(ratio).split(":")]
    except ValueError:
        fail("ratio", repr(ratio), "an integer, or several as 2:4:8")
    return values[0] if len(values) == 1 else values


def _leave_group() -> None:
    """Leaves the group of processes, which lmms-eval does not. A thread of gloo would abort the
    process when it asks for the lock of an interpreter that is being taken down."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    gc.collect()


def _device(device: str | None, accelerator: Any) -> torch.device:
    """The device of this process: with several of them, each takes the GPU of its own number."""
    if accelerator.num_processes > 1 and device in (None, "cuda"):
        return accelerator.device
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and accelerator.num_processes > 1:
        threads = os.environ.get("OMP_NUM_THREADS")
        if threads is None:  # else every process would take all cores
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // accelerator.num_processes))
    return torch.device(device)
