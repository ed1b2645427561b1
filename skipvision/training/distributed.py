"""The processes of a run: one alone, or as many as torchrun starts (RANK, WORLD_SIZE, LOCAL_RANK in the environment).

torchrun and FSDP2 rather than accelerate: what runs is then plain PyTorch; states are sharded safetensors of our own,
where accelerate's are pickles; and what is sharded is seen here, not behind a wrapper. gloo on CPUs, nccl on GPUs.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor

from skipvision.decoder import DecoderLayer
from skipvision.training.errors import TrainError

_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting")
"""What gloo says where another process has died."""


@dataclass(frozen=True)
class Processes:
    """This process among those of the run."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def exchange(self, value: Any) -> list[Any]:
        """What each process says, in order, as JSON; numbers arrive to the last bit."""
        if self.world == 1:
            return [value]
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(self.device)
        lengths = [torch.zeros(1, dtype=torch.long, device=self.device) for _ in range(self.world)]
        dist.all_gather(lengths, torch.tensor([len(text)], device=self.device))
        longest = max(int(length) for length in lengths)
        texts = [text.new_zeros(longest) for _ in range(self.world)]
        dist.all_gather(texts, nn.functional.pad(text, (0, longest - len(text))))
        return [json.loads(bytes(each[: int(length)].tolist())) for each, length in zip(texts, lengths, strict=True)]

    def add_up(self, tensors: list[Tensor]) -> None:
        """Sums each over all processes, in place."""
        if self.world > 1:
            for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
                work.wait()

    def wait(self) -> None:
        """Until all are here."""
        self.exchange(None)


@contextmanager
def joined(device: str = "auto") -> Iterator[Processes]:
    """Joins the processes of this run, and leaves them at the end; inside of another `joined`, those that are joined.

    `auto` takes a GPU where there is one. Where several processes fail, one lets its exception through and the others
    end with SystemExit(1), so that the user reads one sentence. Raises TrainError where another process died.
    """
    if dist.is_initialized():
        yield _member(device)
        return
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Processes(device=_device(device))
        return
    store, rank, world = next(iter(rendezvous("env://")))
    found = _device(device)
    if found.type == "cuda":
        torch.cuda.set_device(found)
    dist.init_process_group(
        "nccl" if found.type == "cuda" else "gloo", store=store, rank=rank, world_size=world, timeout=timedelta(hours=1)
    )
    try:
        yield Processes(rank, world, found)
    except Exception as error:
        if not _is_first_to_fail(store):
            raise SystemExit(1) from None
        if isinstance(error, dist.DistError) or any(words in str(error) for words in _GONE):
            raise TrainError(
                "another process of this run has ended; start the run again, and it goes on from its last state"
            ) from None
        raise
    # Not where one has failed: the others may be waiting, and leaving would wait for them.
    dist.destroy_process_group()


def _is_first_to_fail(store: Any) -> bool:
    try:
        return cast("int", store.add("svcli-failed", 1)) == 1
    except RuntimeError:  # whoever keeps the store has gone, and has told why
        return False


def _member(device: str) -> Processes:
    return Processes(dist.get_rank(), dist.get_world_size(), _device(device))


def _device(device: str) -> torch.device:
    """Of this process: of several GPUs, the one with the number of the process on its machine."""
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def shard(module: nn.Module, processes: Processes) -> None:
    """Splits each weight, its gradient and its moments by rows over all processes (FSDP2), in place.

    A decoder layer is whole while it computes; all else, the vision tower too, in every forward pass, whatever is
    shown: a process that sees text alone must not miss what the others exchange. Gradients are summed, not averaged.
    """
    # A layer returns its values as a view, for a KV cache; nothing writes into them.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .FSDPDecoderLayer. returned a view", UserWarning)
    mesh = init_device_mesh(processes.device.type, (processes.world,))
    for layer in [each for each in module.modules() if isinstance(each, DecoderLayer)]:
        fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)
    for each in module.modules():
        if isinstance(each, FSDPModule):
            each.set_gradient_divide_factor(1.0)
            each.set_force_sum_reduction_for_comms(True)


def split_again(module: nn.Module) -> None:
    """After forward passes that no backward pass followed: FSDP leaves the root whole until one does, and what is then
    written or filled would be copies that it throws away."""
    if isinstance(module, FSDPModule):
        module.reshard()


def local(tensor: Tensor) -> Tensor:
    """The rows that this process holds, as a plain tensor on the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All rows of all processes, which all have to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def rows_of(length: int, rank: int, world: int) -> range:
    """Which of so many rows a process holds: FSDP's split."""
    size = -(-length // world)
    return range(min(rank * size, length), min((rank + 1) * size, length))
