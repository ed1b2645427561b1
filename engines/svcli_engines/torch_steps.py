"""A decode step that is done over and over: compiled, and recorded as a CUDA graph.

A step reads and writes tensors that stay where they are. Imports torch only when it is called.
"""

from __future__ import annotations

from collections.abc import Callable

Step = Callable[[], None]


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
