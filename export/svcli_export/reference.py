"""The PyTorch model that graphs are held against: in fp32 whatever it is stored in, one module's weights at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

Weights = Callable[[str], Tensor]
"""From the name of a parameter to its values in fp32."""


def own_weights(model: nn.Module) -> Weights:
    """Those of `model` as they are now."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return lambda name: parameters[name].detach().float()


@contextmanager
def computing_in_fp32(model: nn.Module, weights: Weights) -> Iterator[None]:
    """Lets each module of `model` compute with its `weights` in fp32, which are there for that call only.

    So a model that is mapped from fp16 files is never in memory as a whole. What a module is made of is swapped around
    its `forward`; parameters must not be read from outside meanwhile, but for their shape.
    """
    with ExitStack() as stack:
        for prefix, module in model.named_modules():
            if names := [name for name, _ in module.named_parameters(recurse=False)]:
                swap = _Swap(prefix, names, weights)
                for handle in (
                    module.register_forward_pre_hook(swap.begin),
                    module.register_forward_hook(swap.end, always_call=True),
                ):
                    stack.callback(handle.remove)
        yield


class _Swap:
    """The hooks around one module."""

    def __init__(self, prefix: str, names: list[str], weights: Weights) -> None:
        self._prefix, self._names, self._weights = prefix, names, weights
        self._stored: dict[str, nn.Parameter] = {}

    def begin(self, module: nn.Module, *_: Any) -> None:
        self._stored = {name: getattr(module, name) for name in self._names}
        for name in self._names:
            values = self._weights(f"{self._prefix}.{name}".removeprefix("."))
            setattr(module, name, nn.Parameter(values, requires_grad=False))

    def end(self, module: nn.Module, *_: Any) -> None:
        for name, parameter in self._stored.items():
            setattr(module, name, parameter)
        self._stored = {}
