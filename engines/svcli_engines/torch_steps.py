"""A decode step that is done over and over: compiled, and recorded as a CUDA graph.

A step reads and writes tensors that stay where they are. Imports torch only when it is called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from skipvision.decoder import Decoder, KVCache

Step = Callable[[], None]

_WARM_UP = 2
"""Steps that run before one is captured: libraries set themselves up in the first ones."""


class DecodeStep:
    """One id in each of n sequences, by a graph as soon as there is one."""

    def __init__(self, decoder: Decoder, cache: KVCache, *, compiled: bool) -> None:
        """`cache` is of the n sequences; what it says of their lengths is told anew at each call."""
        self._decoder, self._cache = decoder, cache
        weight, num_sequences = decoder.embed.weight, len(cache.lengths)
        self.mode = "warming up" if weight.device.type == "cuda" else "eager"
        """`eager`, `warming up`, `graph`, or `eager: ` and why there is no graph."""
        self.code = "compiled" if compiled else "as written"
        """`as written`, `compiled`, or `as written: ` and why it is not compiled."""
        self._new_ids = weight.new_zeros((num_sequences, 1), dtype=cache.lengths.dtype)
        self._logits = weight.new_zeros((num_sequences, decoder.config.vocab_size))
        self._compiled = compile_step(self._step) if compiled else None
        self._replay: Step | None = None
        self._num_runs = 0

    def __call__(self, rows: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Logits [n, vocab]; `rows` as the decode graph takes them, wherever they are."""
        self._new_ids.copy_(rows["input_ids"])
        self._cache.next_positions.copy_(rows["position_ids"][:, 0])
        self._cache.lengths.copy_(rows["write_index"])
        if self._num_runs == _WARM_UP and self.mode == "warming up":
            self._capture()
        self._num_runs += 1
        (self._replay or self._run)()
        return self._logits.clone()

    def _run(self) -> None:
        if self._compiled is not None:
            try:
                self._compiled()
                return
            except Exception as error:
                if not is_compilers(error):
                    raise
                self._compiled = None
                self.code = f"as written: {reason(error)}"
        self._step()

    def _step(self) -> None:
        decoder = self._decoder
        self._logits.copy_(decoder.logits(decoder.extend(decoder.embed(self._new_ids), self._cache))[:, -1])

    def _capture(self) -> None:
        try:
            self._replay = capture(self._run)
            self.mode = "graph"
        except RuntimeError as error:  # what torch raises for CUDA's errors
            self.mode = f"eager: {reason(error)}"


def compile_step(step: Step) -> Step:
    """`step`, compiled at its first call; `is_compilers` tells the errors that may bring."""
    import torch

    made: Step = torch.compile(step, fullgraph=True, dynamic=False)
    return made


def is_compilers(error: Exception) -> bool:
    """Whether torch's compiler raised it, before anything ran."""
    return type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))


def capture(step: Step) -> Step:
    """Records what `step` does on CUDA instead of doing it; what comes back does it. Raises RuntimeError."""
    import torch

    graph = torch.cuda.CUDAGraph()
    # Thread-local: what other threads do meanwhile is not our business.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step()
    replay: Step = graph.replay
    return replay


def reason(error: Exception) -> str:
    """What happened, without the advice that torch gives: "backend='inductor' raised:" goes on in the next line."""
    first, *more = str(error).splitlines() or [type(error).__name__]
    return f"{first} {more[0]}" if more and first.endswith(":") else first
