"""What Triton's Python backend runs: one scheduler a model, whose answers go out as they are made.

Triton knows `triton_python_backend_utils`, which its own process alone can import.
"""

from __future__ import annotations

import json
import os
import queue
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from threading import Event, Thread
from time import perf_counter
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from PIL import Image

from skipvision.pictures import ImageError
from svcli.engines import EngineName, open_pool
from svcli.errors import explain
from svcli.server.replies import FINISHES
from svcli.triton.asking import Arrays, Asked, AskedError, decode, read
from svcli.triton.config import COUNTS, INPUTS
from svcli.triton.metrics import Metrics
from svcli.triton.repository import BUNDLE_FOLDER
from svcli.triton.settings import Settings
from svcli_engines.answer import Stats
from svcli_engines.processor import Processor, PromptError
from svcli_engines.question import Question
from svcli_engines.sampling import SamplingError
from svcli_engines.schedule import BusyError, LateError, Request, Scheduler
from svcli_engines.turn import Piece
from svcli_export.manifest import load_manifest
from svcli_export.template import ChatError

News = Piece | Stats | Exception
_INVALID = (AskedError, ImageError, PromptError, ChatError, SamplingError)
_LOOK_SECONDS = 0.1
"""How often callers are asked whether they are still there."""
_NOTHING = Image.new("RGB", (1, 1))


class _CancelledError(Exception):
    """The caller went away."""


@dataclass(eq=False)
class _Call:
    """A request of Triton's that has no last response yet."""

    sender: Any
    started_at: float
    seconds: float
    stream: bool = False
    said: str = ""
    """What waits for the one response, where they are not one for each piece."""
    taken: Request | None = None
    over: Event = field(default_factory=Event)
    """Set by the teller, with or behind the last response."""


class TritonPythonModel:
    """Triton calls the methods by these names, from one thread."""

    def initialize(self, args: dict[str, str]) -> None:
        """Opens the bundle beside model.py. Raises TritonModelException, with the sentence that svcli would print."""
        given = json.loads(args["model_config"]).get("parameters", {})
        try:
            self._settings = Settings.of({name: value["string_value"] for name, value in given.items()})
            self._scheduler = self._open(Path(args["model_repository"]) / args["model_version"] / BUNDLE_FOLDER)
        except Exception as error:
            raise pb_utils.TritonModelException(explain(error)[0]) from error
        load = self._scheduler.load()
        self._most_calls = load.num_slots + self._settings.queue
        self._calls: list[_Call] = []
        self._events: queue.SimpleQueue[tuple[_Call, News | None] | None] = queue.SimpleQueue()
        """What is to be told to whom; without an event, that there is somebody; None: no more."""
        self._metrics = Metrics(args["model_name"], args["model_version"])
        self._metrics.show(load)
        self._readers = ThreadPoolExecutor(min(4, len(os.sched_getaffinity(0))), "svcli-reader")
        self._teller = Thread(target=self._tell_all, name="svcli-teller", daemon=True)
        self._teller.start()

    def execute(self, requests: Sequence[Any]) -> None:
        """Takes requests, and is back at once: responses go out from a thread of their own."""
        for request in requests:
            own = request.timeout() / 1e6 or self._settings.timeout  # microseconds; 0: none of its own
            call = _Call(request.get_response_sender(), perf_counter(), min(own, self._settings.timeout))
            is_full = len(self._calls) >= self._most_calls
            self._calls.append(call)
            self._events.put((call, None))
            if is_full:
                self._events.put((call, BusyError(f"{self._most_calls} questions are read or answered already")))
                continue
            tensors = ((tensor.name, pb_utils.get_input_tensor_by_name(request, tensor.name)) for tensor in INPUTS)
            arrays = {name: tensor.as_numpy() for name, tensor in tensors if tensor is not None}
            self._readers.submit(self._ask, call, arrays)

    def finalize(self) -> None:
        """Ends what was taken, within the time for that, and frees everything."""
        self._readers.shutdown()
        self._scheduler.close(self._settings.drain)
        self._events.put(None)
        self._teller.join()

    def _open(self, bundle: Path) -> Scheduler:
        settings, manifest = self._settings, load_manifest(bundle, quick=True)
        manifest = manifest if settings.variant is None else manifest.variant(settings.variant)
        self._processor = Processor(bundle, manifest)
        engine = EngineName(settings.engine)
        pool = open_pool(engine, bundle, manifest, threads=settings.threads, parallel=settings.parallel)
        return Scheduler(pool, self._processor, max_waiting=settings.queue)

    def _ask(self, call: _Call, arrays: Arrays) -> None:
        """On a reader's thread: pictures decode, the prompt is tokenised."""
        try:
            asked = read(arrays, self._settings, self._processor.contract.max_images)
            call.stream = asked.stream
            if call.over.is_set():
                return
            question = self._question(asked)
            seconds = call.seconds - (perf_counter() - call.started_at)
            report = partial(self._report, call)
            call.taken = self._scheduler.submit(question, asked.sampling, report, seconds=seconds)
            if call.over.is_set():  # meanwhile
                self._scheduler.cancel(call.taken)
        except Exception as error:
            self._report(call, error)

    def _question(self, asked: Asked) -> Question:
        transparency = self._processor.manifest.image.transparency
        images = [decode(each, transparency, self._settings.max_pixels) for each in asked.pictures]
        question = self._scheduler.question(asked.messages, images)
        # Views are what is encoded; decoded pictures of all who wait would be a hundred times that.
        question.pictures = tuple(replace(each, image=_NOTHING) for each in question.pictures)
        return question

    def _report(self, call: _Call, event: News) -> None:
        """Called by the scheduler, which must not wait for Triton."""
        self._events.put((call, event))

    def _tell_all(self) -> None:
        """The teller's thread: what is said goes out, and callers that have gone are noticed."""
        looked_at, is_idle = perf_counter(), True
        while True:
            with suppress(queue.Empty):
                found = self._events.get(timeout=None if is_idle and not self._calls else _LOOK_SECONDS)
                if found is None:
                    return
                self._tell(*found)
            if perf_counter() - looked_at >= _LOOK_SECONDS:
                for call in [call for call in self._calls if call.sender.is_cancelled()]:
                    self._tell(call, _CancelledError("the request was cancelled"))
                load = self._scheduler.load()
                self._metrics.show(load)
                looked_at, is_idle = perf_counter(), load.num_running + load.num_waiting == 0
            else:
                is_idle = False

    def _tell(self, call: _Call, event: News | None) -> None:
        if event is None or call.over.is_set():
            return
        if isinstance(event, Piece) and not call.stream:
            call.said += event.text
            return
        is_last = not isinstance(event, Piece)
        if is_last:
            call.over.set()
            self._calls.remove(call)
            if call.taken is not None:
                self._scheduler.cancel(call.taken)  # without effect where it has ended
        if isinstance(event, Stats):
            self._metrics.count(event)
        flags = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL if is_last else 0
        try:
            call.sender.send(_response(call, event), flags=flags)
        except Exception as error:  # one caller's trouble is nobody else's
            pb_utils.Logger.log_error(f"svcli: a response could not be sent ({error!r})")


def _response(call: _Call, event: News) -> Any:
    if isinstance(event, Exception):
        return pb_utils.InferenceResponse(error=_error(event))
    if isinstance(event, Piece):
        return pb_utils.InferenceResponse([_tensor("text_output", event.text.encode(), np.object_)])
    counts = (
        event.num_rows_of_prompt,
        event.num_tokens,
        event.num_shared_rows,
        event.visual_tokens_full,
        event.visual_tokens_kept,
    )
    tensors = [
        _tensor("text_output", call.said.encode(), np.object_),
        _tensor("finish_reason", FINISHES[event.stop_reason].encode(), np.object_),
        *(_tensor(name, count, np.int32) for name, count in zip(COUNTS, counts, strict=True)),
    ]
    return pb_utils.InferenceResponse(tensors)


def _tensor(name: str, value: Any, kind: Any) -> Any:
    return pb_utils.Tensor(name, np.array([value], kind))


def _error(error: Exception) -> Any:
    """What a caller is told; of what nobody expects, nothing but that it happened."""
    kinds = pb_utils.TritonError
    if isinstance(error, _INVALID):
        return kinds(str(error), kinds.INVALID_ARG)
    if isinstance(error, _CancelledError):
        return kinds(str(error), kinds.CANCELLED)
    if isinstance(error, (BusyError, LateError)):
        return kinds(str(error), kinds.UNAVAILABLE)
    pb_utils.Logger.log_error(f"svcli: an answer failed ({error!r})")
    return kinds("the model failed; the server's log says why", kinds.INTERNAL)
